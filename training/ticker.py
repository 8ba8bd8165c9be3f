"""One line that says what is going on: live on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_LIVE_SECONDS = 0.1
_PLAIN_SECONDS = 10.0


class Ticker:
  """Shows the newest of many messages."""

  def __init__(self, stream: TextIO | None = None):
    """Writes to stdout, or to another stream."""
    self._stream = stream or sys.stdout
    self._live = self._stream.isatty()
    self._shown = time.monotonic()
    self._width = 0

  def show(self, message: str) -> None:
    """Shows a message, unless the last one is too recent."""
    now = time.monotonic()
    if now - self._shown < (_LIVE_SECONDS if self._live else _PLAIN_SECONDS):
      return
    self._shown = now
    if self._live:
      self._stream.write('\r' + message.ljust(self._width))
      self._width = len(message)
    else:
      self._stream.write(message + '\n')
    self._stream.flush()

  def close(self) -> None:
    """Clears the live line."""
    if self._width:
      self._stream.write('\r' + ' ' * self._width + '\r')
      self._stream.flush()
      self._width = 0
