"""Progress of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_LIVE_SECONDS = 0.1
_PLAIN_SECONDS = 5.0


class Progress:
  """Shows epoch, step, loss, accuracy, examples/s and the time left."""

  def __init__(self, epochs: int, steps: int, stream: TextIO | None = None):
    """Takes the numbers of epochs and steps of the whole run; writes to stdout."""
    self._stream = stream or sys.stdout
    self._live = self._stream.isatty()
    self._epochs = epochs
    self._steps = steps
    self._first: tuple[float, int] | None = None
    self._shown = 0.0
    self._width = 0
    self._test = ''

  def step(self, epoch: int, step: int, means: dict[str, float]) -> None:
    """Reports a finished step (counted from 1) of an epoch (counted from 0)."""
    now = time.monotonic()
    if self._first is None:
      # The first step compiles, so the time left is counted from its end.
      self._first = (now, step)
    every = _LIVE_SECONDS if self._live else _PLAIN_SECONDS
    if now - self._shown < every and step < self._steps:
      return
    self._shown = now
    started, first_step = self._first
    left = ''
    if step > first_step:
      seconds = (now - started) / (step - first_step) * (self._steps - step)
      left = f'  {_clock(seconds)} left'
    self._write(
      f'epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}'
      f'  {_loss(means)}  accuracy {100 * means["accuracy"]:.2f} %'
      f'{self._test}  {means["examples_per_second"]:,.0f} examples/s{left}'
    )

  def test(self, accuracy: float) -> None:
    """Takes the newest test accuracy, shown from now on."""
    self._test = f'  test {100 * accuracy:.2f} %'

  def close(self) -> None:
    """Ends the live line."""
    if self._live and self._width:
      self._stream.write('\n')
      self._width = 0

  def _write(self, line: str) -> None:
    if self._live:
      self._stream.write('\r' + line.ljust(self._width))
      self._width = len(line)
    else:
      self._stream.write(line + '\n')
    self._stream.flush()


def _loss(means: dict[str, float]) -> str:
  """The loss, or for methods without a clean pass the perturbed loss."""
  if 'loss' in means:
    return f'loss {means["loss"]:.4f}'
  return f'perturbed loss {means["perturbed_loss"]:.4f}'


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
