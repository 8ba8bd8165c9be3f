"""SIGTERM and SIGINT as a request to save and leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

from training import parallel


class Stop:
  """Whether a signal has asked the run to save and leave."""

  signal_number = 0

  def requested(self, step_number: int) -> bool:
    """Asked on every process after the same steps; all get the same answer."""
    return parallel.agree_to_stop(step_number, bool(self.signal_number))

  def leave(self) -> NoReturn:
    """Ends the process as the signal would have done."""
    raise SystemExit(128 + (self.signal_number or signal.SIGTERM))


@contextlib.contextmanager
def listen() -> Iterator[Stop]:
  """Turns SIGTERM and SIGINT into a request, where Python may handle signals."""
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return

  def handle(number, frame):
    del frame
    stop.signal_number = number

  before = {
    number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
