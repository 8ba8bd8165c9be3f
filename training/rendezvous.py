"""Where the processes of a run find each other: the port that --coordinator names.

Process 0 listens there and takes two kinds of connections: the lines of the others
(`training.peers`), which begin with who they are, and tunnels to JAX's coordination
service, which listens on a port of its own that only this machine reaches. So whoever
does not belong is told before JAX, which would wait or abort, is asked at all.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence

from training.errors import UsageError
from training.peers import Line, start

_LOCAL = '127.0.0.1'
# Seconds for an answer of a process that is there.
_ANSWER = 60


class Gate:
  """What process 0 listens with.

  Attributes:
    port: on which it does.
  """

  def __init__(self, port: int, num_processes: int):
    """Listens on a port of all interfaces; 0 takes any that is free.

    Raises:
      UsageError: the port is taken, or not allowed.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    dual = family == socket.AF_INET6
    try:
      self._server = socket.create_server(
        ('', port), family=family, dualstack_ipv6=dual, backlog=1024
      )
    except OSError as error:
      raise UsageError(
        f'--coordinator: port {port} cannot be used ({error}): another process 0 or '
        'another program may have it; give a free one to all processes.'
      ) from error
    self.port = self._server.getsockname()[1]
    self._num_processes = num_processes
    self._lines: dict[int, Line] = {}
    self._changed = threading.Condition()
    self._wrong = ''
    self._open = True
    self._service = 0
    start(self._accept)

  def lines(self, patience: float) -> dict[int, Line]:
    """Waits for the lines of all other processes, by their number.

    Raises:
      UsageError: they do not come in time, or do not fit together; all that have come
        are told.
    """
    with self._changed:
      self._changed.wait_for(
        lambda: self._wrong or len(self._lines) == self._num_processes - 1, patience
      )
      self._open = False
      missing = sorted(set(range(1, self._num_processes)) - set(self._lines))
      if missing and not self._wrong:
        self._wrong = (
          f'of --num_processes={self._num_processes} these did not come within '
          f'{patience} s: --process_id={",".join(map(str, missing))}.'
        )
      if self._wrong:
        for line in self._lines.values():
          line.send(refused=self._wrong)
        self._server.close()
        raise UsageError(self._wrong)
      return dict(self._lines)

  def tunnel(self, service: int) -> None:
    """Lets the others through to a port of this machine, and tells them."""
    self._service = service
    for line in self._lines.values():
      line.send(go=True)

  def _accept(self) -> None:
    with contextlib.suppress(OSError):  # It was closed.
      while True:
        connection, _ = self._server.accept()
        start(self._take, Line(connection))

  def _take(self, line: Line) -> None:
    """Takes a connection by what it says first; drops one that says something else."""
    hello = None
    with contextlib.suppress(TimeoutError):
      hello = line.receive(_ANSWER)
    if hello and 'tunnel' in hello and self._service:
      # It may be about to listen.
      service = _connect([_LOCAL], self._service, _ANSWER)
      line.send(go=True)
      _join(line.socket, service)
    elif hello and {'process', 'of'} <= hello.keys():
      self._introduce(line, hello['process'], hello['of'])
    else:
      line.socket.close()

  def _introduce(self, line: Line, process: int, num_processes: int) -> None:
    """Takes the line of a process, or tells it why not."""
    with self._changed:
      before = self._lines.get(process)
      wrong = ''
      if num_processes != self._num_processes:
        wrong = (
          f'--num_processes={num_processes} of --process_id={process} is '
          f'{self._num_processes} at --process_id=0: start all with the same.'
        )
      elif before and not (self._open and before.closed()):
        wrong = f'--process_id={process} was given to two processes: number them all.'
      if not wrong:
        self._lines[process] = line
      else:
        line.send(refused=wrong)
        # Where all have come, one more does no harm to them.
        self._wrong = wrong if self._open else ''
      self._changed.notify_all()


def visit(
  hosts: Sequence[str], port: int, process: int, num_processes: int, *, patience: float
) -> Line:
  """The line of a process to process 0, which listens at one of some hosts.

  Raises:
    UsageError: nobody answers within some seconds, or it does not belong there.
  """
  line = Line(_connect(hosts, port, patience))
  line.send(process=process, of=num_processes)
  try:
    answer = line.receive(patience + _ANSWER)
  except TimeoutError:
    answer = None
  if answer and 'go' in answer:
    return line
  line.socket.close()
  if answer and 'refused' in answer:
    raise UsageError(answer['refused'])
  raise UsageError(
    f'--coordinator={hosts[0]}:{port} has closed the connection before all processes '
    'had come: see what the process with --process_id=0 says, and whether it is what '
    'listens there.'
  )


def entrance(host: str, port: int) -> int:
  """A port of this machine that leads to the coordination service of process 0."""
  server = socket.create_server((_LOCAL, 0))

  def accept():
    with contextlib.suppress(OSError):  # It was closed, or process 0 is gone.
      while True:
        client, _ = server.accept()
        line = Line(socket.create_connection((host, port), _ANSWER))
        line.send(tunnel=True)
        if line.receive(_ANSWER):
          _join(client, line.socket)

  start(accept)
  return server.getsockname()[1]


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as found:
    found.bind((_LOCAL, 0))
    return found.getsockname()[1]


def addresses() -> list[str]:
  """Names under which the other machines of a cluster may know this one."""
  found = [socket.gethostname()]
  way = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
  with way, contextlib.suppress(OSError):
    way.connect(('198.51.100.1', 9))  # Sends nothing, but chooses an interface.
    found.append(way.getsockname()[0])
  return found


def _connect(hosts: Sequence[str], port: int, patience: float) -> socket.socket:
  end = time.monotonic() + patience
  while True:
    for host in hosts:
      try:
        left = max(end - time.monotonic(), 0.1)
        return socket.create_connection((host, port), left / len(hosts))
      except OSError as error:
        reason = error
    if time.monotonic() >= end:
      raise UsageError(
        f'--coordinator={hosts[0]}:{port} does not answer ({reason}): start the '
        'process with --process_id=0 there, or mend host and port.'
      )
    time.sleep(min(0.2, patience / 10))


def _join(client: socket.socket, service: socket.socket) -> None:
  """Passes bytes on both ways, but only the client's end: its JAX would abort."""
  for connection in (client, service):
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def to_service():
    _pass_on(client, service)
    with contextlib.suppress(OSError):
      service.shutdown(socket.SHUT_RDWR)

  start(to_service)
  start(_pass_on, service, client)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
  with contextlib.suppress(OSError):
    while data := source.recv(1 << 16):
      sink.sendall(data)
