"""Progress of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

import numpy as np

from training.problem import Score
from training.ticker import Ticker, clock

_PLAIN_SECONDS = 5.0


class Progress:
  """Shows epoch, step, loss, main score, examples/s and the time left."""

  def __init__(
    self, epochs: int, steps: int, score: Score, stream: TextIO | None = None
  ):
    """Takes the numbers of epochs and steps of the whole run; writes to stdout."""
    self._score = score
    self._ticker = Ticker(stream, _PLAIN_SECONDS)
    self._epochs = epochs
    self._steps = steps
    self._first: tuple[float, int] | None = None
    self._test = self._about = ''

  def step(self, epoch: int, step: int, means: dict[str, float]) -> None:
    """Reports a finished step (counted from 1) of an epoch (counted from 0)."""
    now = time.monotonic()
    if self._first is None:
      # The first step compiles, so the time left is counted from its end.
      self._first = (now, step)
    is_last = step == self._steps
    if not (is_last or self._ticker.is_due()):
      return
    started, first_step = self._first
    left = ''
    if step > first_step:
      seconds = (now - started) / (step - first_step) * (self._steps - step)
      left = f'  {clock(seconds)} left'
    self._ticker.show(
      f'epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}'
      f'{self._about}  {_loss(means)}  {self._score.show(means[self._score.name])}'
      f'{self._test}  {means["examples_per_second"]:,.0f} examples/s{left}',
      always=is_last,
    )

  def test(self, value: float) -> None:
    """Takes the newest main score of the test split, shown from now on."""
    self._test = f'  test {self._score.format(value)}'

  def say(self, message: str) -> None:
    """Writes a line of its own."""
    self._ticker.keep()
    self._ticker.show(message, always=True)
    self._ticker.keep()

  def close(self) -> None:
    """Ends the live line."""
    self._ticker.keep()


class MembersProgress(Progress):
  """Shows of a population how many members go on, their medians and their speed."""

  def step(
    self, epoch: int, step: int, means: dict[str, np.ndarray], alive: np.ndarray
  ) -> None:
    """Reports a finished step (counted from 1) of an epoch (counted from 0).

    Args:
      epoch: counted from 0.
      step: counted from 1.
      means: of the epoch, of each member.
      alive: bool (members,), those that have not diverged.
    """
    self._about = f'  {alive.sum()}/{alive.size} members'
    if alive.any():
      self._about += ', medians:'
      means = {
        name: x * alive.sum() if np.ndim(x) == 0 else np.median(x[alive])
        for name, x in means.items()
      }
      super().step(epoch, step, means)

  def test(self, values: np.ndarray) -> None:
    """Takes the newest main scores of the test split of those that go on."""
    if values.size:
      super().test(np.median(values))


def _loss(means: dict[str, float]) -> str:
  """The loss, or for methods without a clean pass the perturbed loss."""
  if 'loss' in means:
    return f'loss {means["loss"]:.4f}'
  return f'perturbed loss {means["perturbed_loss"]:.4f}'
