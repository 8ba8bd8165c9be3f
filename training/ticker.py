"""One line that says what is going on: live on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_LIVE_SECONDS = 0.1


def clock(seconds: float) -> str:
  """A duration as minutes and seconds, from an hour on also with hours.

  >>> clock(61.6), clock(3600)
  ('1:02', '1:00:00')
  """
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Ticker:
  """Shows the newest of many messages."""

  def __init__(self, stream: TextIO | None = None, plain_seconds: float = 10.0):
    """Writes to stdout, or to another stream.

    Args:
      stream: where to write; a terminal has one line that is overwritten.
      plain_seconds: least time between two lines elsewhere.
    """
    self._stream = stream or sys.stdout
    self._live = self._stream.isatty()
    self._seconds = _LIVE_SECONDS if self._live else plain_seconds
    self._shown = float('-inf')
    self._width = 0

  def is_due(self) -> bool:
    """Whether the last message is old enough for another."""
    return time.monotonic() - self._shown >= self._seconds

  def show(self, message: str, *, always: bool = False) -> None:
    """Shows a message, unless the last one is too recent."""
    if not (always or self.is_due()):
      return
    self._shown = time.monotonic()
    if self._live:
      self._stream.write('\r' + message.ljust(self._width))
      self._width = len(message)
    else:
      self._stream.write(message + '\n')
    self._stream.flush()

  def clear(self) -> None:
    """Removes the live line."""
    if self._width:
      self._stream.write('\r' + ' ' * self._width + '\r')
      self._stream.flush()
      self._width = 0

  def keep(self) -> None:
    """Ends the live line and leaves it there."""
    if self._width:
      self._stream.write('\n')
      self._stream.flush()
      self._width = 0
