"""How processes find each other, and agree to stop: with threads in their place."""

import contextlib
import itertools
import random
import socket
import threading
import time

import pytest

from training import peers, rendezvous
from training.errors import UsageError


@pytest.fixture(autouse=True)
def _close_all(monkeypatch):
  """Closes every socket of a test at its end."""
  opened, init = [], socket.socket.__init__

  def record(self, *args, **kwargs):
    init(self, *args, **kwargs)
    opened.append(self)

  monkeypatch.setattr(socket.socket, '__init__', record)
  yield
  for one in opened:
    with contextlib.suppress(OSError):
      one.shutdown(socket.SHUT_RDWR)
    one.close()


def _in_threads(*functions):
  """Runs functions at once; returns what each has returned or raised."""
  results = [None] * len(functions)

  def run(number, function):
    try:
      results[number] = function()
    except Exception as error:
      results[number] = error

  threads = [
    threading.Thread(target=run, args=pair, daemon=True)
    for pair in enumerate(functions)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return results


def _meet(num_processes, others, patience=20.0):
  """What happens at process 0 and to others, who are (process, num_processes) each."""
  gate = rendezvous.Gate(0, num_processes)

  def first():
    lines = gate.lines(patience)
    gate.tunnel(0)
    return lines

  visits = [
    lambda process=process, of=of: rendezvous.visit(
      ['127.0.0.1'], gate.port, process, of, patience=20
    )
    for process, of in others
  ]
  return _in_threads(first, *visits)


def test_processes_find_each_other():
  lines, *visits = _meet(4, [(3, 4), (1, 4), (2, 4)])
  assert sorted(lines) == [1, 2, 3]
  for process, line in zip((3, 1, 2), visits, strict=True):
    line.send(number=process)
    assert lines[process].receive(5) == {'number': process}


@pytest.mark.parametrize(
  ('num', 'others', 'words'),
  [
    (3, [(1, 3), (1, 3)], '--process_id=1 was given to two processes'),
    (2, [(2, 3)], '--num_processes=3 of --process_id=2 is 2 at --process_id=0'),
    (3, [(1, 2)], '--num_processes=2 of --process_id=1 is 3 at --process_id=0'),
    (
      4,
      [(2, 4)],
      'of --num_processes=4 these did not come within 0.3 s: --process_id=1',
    ),
  ],
)
def test_processes_that_do_not_fit_are_all_told(num, others, words):
  for error in _meet(num, others, patience=0.3 if len(others) < 2 else 20):
    assert isinstance(error, UsageError) and words in str(error)


def test_one_that_comes_when_all_are_there_does_no_harm():
  gate = rendezvous.Gate(0, 2)
  visit = lambda: rendezvous.visit(['localhost'], gate.port, 1, 2, patience=5)
  (lines, _), line = _in_threads(lambda: (gate.lines(5), gate.tunnel(0)), visit)
  with pytest.raises(UsageError, match='was given to two processes'):
    visit()
  line.send(still='there')
  assert lines[1].receive(5) == {'still': 'there'}
  assert gate.lines(0) == lines


def test_one_that_has_left_may_come_again():
  gate = rendezvous.Gate(0, 3)
  with socket.create_connection(('127.0.0.1', gate.port)) as first:
    peers.Line(first).send(process=1, of=3)
    while not gate._lines:
      time.sleep(0.01)
  visits = [
    lambda p=p: rendezvous.visit(['127.0.0.1'], gate.port, p, 3, patience=5)
    for p in (1, 2)
  ]
  opened = _in_threads(lambda: (gate.lines(9), gate.tunnel(0))[0], *visits)
  assert sorted(opened[0]) == [1, 2]
  assert all(isinstance(line, peers.Line) for line in opened[1:])


def test_strangers_are_not_listened_to():
  gate = rendezvous.Gate(0, 2)
  for text in (b'GET / HTTP/1.1\r\n\r\n', b'\xff' * 9000, b'[]\n', b'{}\n', b''):
    # It may have been closed before all is sent.
    connection = socket.create_connection(('127.0.0.1', gate.port), 5)
    with connection as stranger, contextlib.suppress(OSError):
      stranger.sendall(text)
      stranger.shutdown(socket.SHUT_WR)
      assert stranger.recv(9) == b''
  assert not gate._lines and not gate._wrong


def test_what_listens_there_may_be_something_else():
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    peers.start(lambda: server.accept()[0].close())
    with pytest.raises(UsageError, match='has closed the connection before'):
      rendezvous.visit(['127.0.0.1'], port, 1, 2, patience=5)
    with pytest.raises(UsageError, match=f'port {port} cannot be used'):
      rendezvous.Gate(port, 2)


def test_a_tunnel_carries_bytes_and_not_the_end_of_the_service():
  with socket.create_server(('127.0.0.1', 0)) as service:
    gate = rendezvous.Gate(0, 2)
    gate._service = service.getsockname()[1]
    port = rendezvous.entrance('127.0.0.1', gate.port)
    client = socket.create_connection(('127.0.0.1', port))
    inner, _ = service.accept()
    sent = random.Random(0).randbytes(1 << 20)
    for source, sink in ((client, inner), (inner, client)):
      peers.start(source.sendall, sent)
      got = b''
      while len(got) < len(sent):
        got += sink.recv(1 << 20)
      assert got == sent
    inner.close()
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
      client.recv(1)
    client.close()


@pytest.fixture
def connect():
  """Makes the watchers of some processes, all within this one."""
  made = []

  def make(num):
    pairs = {i: socket.socketpair() for i in range(1, num)}
    lines = {i: peers.Line(one) for i, (one, _) in pairs.items()}
    made.append(peers._Peers(0, lines))
    made.extend(peers._Peers(i, {0: peers.Line(pairs[i][1])}) for i in range(1, num))
    return made

  yield make
  for watcher in made:  # They would end this process when their lines close.
    watcher._all_done = True


@pytest.mark.parametrize('seed', range(8))
def test_all_stop_after_the_same_step(seed, connect):
  """In lockstep, as collectives keep processes, one or several are told to stop."""
  rng = random.Random(seed)
  num, steps = rng.choice([2, 3, 4]), 60
  found = connect(num)
  told = {
    i: rng.randrange(steps + 5) for i in rng.sample(range(num), rng.choice([1, 2]))
  }
  meeting = threading.Barrier(num)
  pauses = [[rng.random() * 2e-3 for _ in range(steps)] for _ in range(num)]

  def run(process):
    for step in range(steps):
      meeting.wait(10)  # The step's collective.
      time.sleep(pauses[process][step])
      if found[process].agree(step >= told.get(process, steps)):
        return step
    meeting.wait(10)  # The evaluation's.
    return None

  stopped = _in_threads(*(lambda i=i: run(i) for i in range(num)))
  assert len(set(stopped)) == 1
  first = min(told.values())
  if first < steps - 4:
    assert first <= stopped[0] <= first + 3
  leaving = _in_threads(*(lambda p=p: p.leave(0, True) for p in found))
  assert leaving == [None] * num


@pytest.mark.parametrize('num', [2, 3])
def test_whoever_is_done_waits_for_all(num, connect):
  found = connect(num)
  left = [threading.Thread(target=p.leave, args=(0, True), daemon=True) for p in found]
  for thread, later in itertools.zip_longest(left, left[1:]):
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() == (later is not None)
  for thread in left:
    thread.join(5)
    assert not thread.is_alive()
