"""The processes of a run know of each other, and end together.

Process 0 listens on the port that ``--coordinator`` names. Every other process keeps a
connection to it, a line, on which it says who it is and, every few seconds, that it
lives. A line that closes or falls silent is a process that is gone. Whoever learns of
it ends with one sentence and `EXIT_CODE`, and process 0 tells all others first. This
is done by threads, because the main thread waits inside a collective that never ends.

JAX connects the processes as well, and aborts a process with a stack trace as soon as
its connection to the coordination service in process 0 closes. That connection
therefore goes through a tunnel: two threads in each of the two processes pass the bytes
on, but never the end.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

# Of a process that ends because another is gone: EX_TEMPFAIL of sysexits.h, try again.
EXIT_CODE = 75
# Of an error that the user can mend: the others have no reason to try again.
_MENDABLE = 2
# Seconds between two signs of life, and without one after which a process is gone.
_BEAT, _SILENCE = 3, 45
# Seconds that an error of another process, which all may have in common, leaves this
# one to end by itself.
_GRACE = 5
_LONGEST_MESSAGE = 4096


def together(
  run: Callable[..., int], main: Any, argv: Sequence[str], **kwargs: Any
) -> int:
  """Runs a script so that all processes of a run end together.

  A process that has joined others (`watch`) ends with an error at once, without
  waiting for them, and they end with `EXIT_CODE`; one that ends well, or was told to
  stop, waits until all have.

  Args:
    run: `training.cli.run`.
    main: for it.
    argv: for it.
    **kwargs: for it.

  Returns:
    The exit code.
  """
  global _script
  _script = argv[0].rsplit('/', 1)[-1]
  agreed = False
  try:
    code = run(main, argv, **kwargs)
    agreed = code == 0
  except SystemExit as stopped:  # As all do that were told to stop.
    if _joined is None:
      raise
    agreed = True
    code = stopped.code if isinstance(stopped.code, int) else 1
  except BaseException as error:
    if _joined is None:
      raise
    if isinstance(error, jax.errors.JaxRuntimeError):
      _joined.end_if_another_has()
    traceback.print_exc()
    code = 1
  if _joined is not None:
    _joined.leave(code, agreed)
  return code


def watch(process: int, lines: dict[int, Line]) -> None:
  """Begins to watch the other processes, to whom this one has lines."""
  global _joined
  _joined = _Peers(process, lines)


def watched() -> bool:
  """Whether this process has joined others by `watch`."""
  return _joined is not None


def agree(requested: bool) -> bool:
  """Whether all processes stop at this call, because one has been requested to.

  All call it equally often, as after each step. The first that is requested to stop
  holds all at their next call until process 0 knows how many each has made; all stop at
  the first that none has. If there is no such call, because the last step is done, none
  does.
  """
  return _joined.agree(requested)


class Line:
  """A connection that carries JSON objects, one a line of text."""

  def __init__(self, connection: socket.socket):
    """Takes a socket."""
    self.socket = connection
    self._lock = threading.Lock()

  def send(self, **message: Any) -> None:
    """Sends a message; to a process that is gone, nothing."""
    try:
      with self._lock:
        self.socket.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
      pass  # Whoever receives on this line will see that it is closed.

  def receive(self, timeout: float | None) -> dict[str, Any] | None:
    """The next message, None after the last or after what is none.

    Raises:
      TimeoutError: none came for some seconds.
    """
    text = b''
    try:
      self.socket.settimeout(timeout)
      # Byte by byte, because the bytes after it may not be for this line.
      while not text.endswith(b'\n'):
        byte = self.socket.recv(1)
        if not byte or len(text) > _LONGEST_MESSAGE:
          return None
        text += byte
      message = json.loads(text)
    except TimeoutError:
      raise
    except (OSError, ValueError):
      return None
    return message if isinstance(message, dict) else None

  def closed(self) -> bool:
    """Whether the other side has closed it."""
    try:
      self.socket.settimeout(0)
      return not self.socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
      return False
    except OSError:
      return True


class _Peers:
  """Watches the other processes: process 0 all of them, they process 0."""

  def __init__(self, process: int, lines: dict[int, Line]):
    self._process, self._lines = process, lines
    self._news = threading.Condition()
    self._gone = None  # The process that is gone, and its exit code if it told one.
    self._calls = 0  # of `agree`, which all processes call equally often.
    self._last_calls: dict[int, int] = {}  # By process; of those in process 0.
    self._stop_asked, self._stop_at = False, None
    self._done: set[int] = set()
    self._all_done = False
    self._ending = threading.Lock()
    start(self._beat)
    for other, line in lines.items():
      start(self._listen, other, line)

  def leave(self, code: int, agreed: bool) -> None:
    """Returns when all others are done as well, or else ends at once, without them."""
    if agreed:
      if self._process == 0:
        self._is_done(0)
      else:
        self._tell(done=self._process)
      with self._news:
        self._news.wait_for(lambda: self._all_done)
      return
    with self._ending:
      self._tell(gone=self._process, code=code)
      _exit(code)

  def end_if_another_has(self) -> None:
    """Ends if a process is gone; the news may be slower than a broken collective."""
    with self._news:
      gone = self._news.wait_for(lambda: self._gone, _GRACE)
    if gone:
      self._end()

  def agree(self, requested: bool) -> bool:
    """Whether all stop now; see the function."""
    if requested and not self._stop_asked:
      self._ask_to_stop()
    with self._news:
      self._news.wait_for(lambda: self._stop_at or not self._stop_asked)
      self._calls += 1
      return self._calls == self._stop_at

  def _ask_to_stop(self) -> None:
    """Holds the main thread of every process at its next call, and counts the calls."""
    with self._news:
      if self._stop_asked:
        return
      self._stop_asked = True
      self._tell(stop=True, process=self._process, calls=self._calls)
    self._count_calls(self._process, self._calls)

  def _count_calls(self, process: int, calls: int) -> None:
    """In process 0: all stop at the first call that none has made."""
    with self._news:
      self._last_calls[process] = calls
      if self._process == 0 and len(self._last_calls) > len(self._lines):
        self._stop_now_at(max(self._last_calls.values()) + 1)

  def _stop_now_at(self, calls: int) -> None:
    with self._news:
      if self._process == 0:
        self._tell(stop_at=calls)
      self._stop_at = calls
      self._news.notify_all()

  def _tell(self, **message: Any) -> None:
    for line in self._lines.values():
      line.send(**message)

  def _beat(self) -> None:
    while True:
      self._tell()
      time.sleep(_BEAT)

  def _listen(self, other: int, line: Line) -> None:
    while True:
      try:
        message = line.receive(_SILENCE)
      except TimeoutError:
        message = None
      if message is None:
        self._lost(other, None)
        return
      if 'gone' in message:
        self._lost(message['gone'], message['code'])
      if 'stop' in message:
        self._ask_to_stop()
        self._count_calls(message['process'], message['calls'])
      if 'stop_at' in message:
        self._stop_now_at(message['stop_at'])
      if 'done' in message:
        self._is_done(message['done'])

  def _is_done(self, process: int) -> None:
    """Counts in process 0 who is done; elsewhere it is told when all are."""
    with self._news:
      self._done.add(process)
      if self._process == 0:
        if len(self._done) <= len(self._lines):
          return
        self._tell(done=0)
      self._all_done = True
      self._news.notify_all()

  def _lost(self, process: int, code: int | None) -> None:
    """Ends this process because another is gone."""
    with self._news:
      if self._all_done or self._gone:
        return
      self._gone = process, code
      self._news.notify_all()
    self._tell(gone=process, code=code)
    if code is not None:
      time.sleep(_GRACE)
    self._end()

  def _end(self) -> NoReturn:
    process, code = self._gone
    ended = f'process {process} of this run has ended'
    again = 'the same commands go on from the last checkpoint.'
    if code == _MENDABLE:
      text = f'{ended} with exit code {code}, and has said why: so does this one.'
    elif code is not None:
      text = (
        f'{ended} with exit code {code}, and has said why, so this one ends with exit '
        f'code {EXIT_CODE}: {again}'
      )
    elif process == self._process:
      text = (
        f'this process was silent for {_SILENCE} s (stopped, or cut off), the others '
        f'have ended, and it ends with exit code {EXIT_CODE}: {again}'
      )
    else:
      text = (
        f'{ended} without a word (killed or stopped, or its machine is lost), so this '
        f'one ends with exit code {EXIT_CODE}: {again}'
      )
    with self._ending:
      print(f'{_script}: {text}', file=sys.stderr)
      _exit(_MENDABLE if code == _MENDABLE else EXIT_CODE)


_joined: _Peers | None = None
_script = ''


def _exit(code: int) -> NoReturn:
  """Ends the process without waiting for others, as JAX would do at its exit."""
  for child in multiprocessing.active_children():
    child.kill()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # Nobody reads it.
      stream.flush()
  os._exit(code)


def start(target: Callable[..., None], *args: Any) -> None:
  """Starts a thread that does not keep the process alive."""
  threading.Thread(target=target, args=args, daemon=True).start()
