"""Progress of a measurement: which stage of how many, and the time that it still takes.

The time left is that of the stage alone, and is told only where the stage counts its
pieces. A search for eigenpairs tells none: it ends when they have converged, and nobody
knows before when that is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from training.ticker import Ticker, clock


class Stages:
  """Says what a measurement of several stages is doing."""

  def __init__(
    self, ticker: Ticker, total: int, now: Callable[[], float] = time.monotonic
  ):
    """Starts before the first stage.

    Args:
      ticker: shows the messages.
      total: number of stages.
      now: a clock in seconds.
    """
    self._ticker = ticker
    self._total = total
    self._now = now
    self._number = 0
    self._forget()

  def _forget(self) -> None:
    self._total_pieces = 0
    self._first: tuple[float, int] | None = None
    self._end: float | None = None

  def begin(self, name: str) -> None:
    """Begins the next stage, and says so."""
    self._number += 1
    self._forget()
    self.show(name, always=True)

  def count(self, done: int, total: int) -> None:
    """Takes how many of its equal pieces the stage has done.

    Time is counted from the end of the first piece that is reported, because that one
    compiles, or was done before a kill.
    """
    now = self._now()
    if total != self._total_pieces:
      self._total_pieces, self._first, self._end = total, None, None
    if self._first is None:
      self._first = (now, done) if done else None
      return
    started, first = self._first
    if done > first:
      self._end = now + (now - started) / (done - first) * (total - done)

  def show(self, message: str, *, always: bool = False) -> None:
    """Shows a message with the number of the stage and the time it still takes."""
    left = ''
    if self._end is not None:
      left = f', {clock(max(self._end - self._now(), 0))} left'
    text = f'stage {self._number} of {self._total}: {message}{left}'
    self._ticker.show(text, always=always)
