"""SIGTERM and SIGINT as a request to save and leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax

from training import parallel


class Stop:
  """Whether a signal has asked the run to save and leave."""

  signal_number = 0
  agreed = False

  def requested(self, step_number: int) -> bool:
    """Asked on every process after the same steps; all get the same answer."""
    self.agreed = parallel.agree_to_stop(step_number, bool(self.signal_number))
    return self.agreed

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
    # The signal of one process, obeyed by all, may come to the others while they wait.
    obeyed = stop.agreed and jax.process_count() > 1
    for number, handler in before.items():
      signal.signal(number, signal.SIG_IGN if obeyed else handler)
