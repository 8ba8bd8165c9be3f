"""Several real processes of train.py: how they find each other, stop, fail, go on."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import train
from training import checkpoints, peers

_ROOT = pathlib.Path(train.__file__).parent
_GONE = (
  'train.py: process {} of this run has ended {}, so this one ends with exit code 75: '
  'the same commands go on from the last checkpoint.\n'
)
_KILLED = 'without a word (killed, or its machine is lost)'


def _free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


class _Job:
  """Processes of one run, each with its stderr in a file."""

  def __init__(self, tmp_path, *flags, num=2, own=None, script=('train.py',), env=None):
    """Starts them; own[i] are flags of process i, in place of its usual ones."""
    address, own = f'127.0.0.1:{_free_port()}', own or {}
    self._errors = [tmp_path / f'stderr_{i}' for i in range(num)]
    cache = str(tmp_path.parent / 'cache')
    opened = [path.open('w') for path in self._errors]
    self.processes = [
      subprocess.Popen(
        [
          sys.executable,
          *script,
          '--notiming',
          f'--coordinator={address}',
          *own.get(i, [f'--num_processes={num}', f'--process_id={i}']),
          *flags,
        ],
        cwd=_ROOT,
        stdout=subprocess.DEVNULL,
        stderr=opened[i],
        env={
          **os.environ,
          'XLA_FLAGS': '',
          'JAX_PLATFORMS': 'cpu',
          'XDG_CACHE_HOME': cache,
          **(env or {}),
        },
      )
      for i in range(num)
    ]
    for file in opened:
      file.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def wait_for(self, there, patience=150):
    """Waits until something holds, while all processes run."""
    end = time.monotonic() + patience
    while not there():
      codes = [process.poll() for process in self.processes]
      assert codes == [None] * len(codes), self.errors()
      assert time.monotonic() < end
      time.sleep(0.02)

  def codes(self, patience=150):
    """Exit codes of all, which have to end in some seconds."""
    end = time.monotonic() + patience
    return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]

  def errors(self):
    """What each has printed on stderr, but for what it waits for."""
    texts = [path.read_text() for path in self._errors]
    return [re.sub('^waiting up to .*\n', '', text) for text in texts]


def _saved(workdir, step):
  """Whether a checkpoint of that step or a later one is there."""
  names = [p.name for p in workdir.glob('checkpoints/[0-9]*')]
  return any(name.isdigit() and int(name) >= step for name in names)


def _outcome(workdir):
  arrays = checkpoints.load(workdir).arrays
  lines = (workdir / 'metrics.jsonl').read_bytes()
  return {name: array.tobytes() for name, array in arrays.items()}, lines


_LONG = ['--epochs=4000', '--schedule=constant', '--checkpoint_every=3']


@pytest.mark.parametrize(
  'victim', [0, pytest.param(1, marks=pytest.mark.slow)], ids=['first', 'second']
)
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(tmp_path, victim):
  workdir = tmp_path / 'run'
  with _Job(tmp_path, *_LONG, f'--workdir={workdir}') as job:
    job.wait_for(lambda: _saved(workdir, 3))
    job.processes[victim].kill()
    codes = job.codes(patience=20)
    assert codes[1 - victim] == peers.EXIT_CODE == 75
    assert job.errors()[1 - victim] == _GONE.format(victim, _KILLED)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_killed_and_started_again_no_bit_differs(tmp_path, victim):
  flags = ['--optimizer=sam', '--epochs=2', '--checkpoint_every=7', '--log_every=5']
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  with _Job(tmp_path, *flags, f'--workdir={whole}') as job:
    assert (job.codes(), job.errors()) == ([0, 0], ['', ''])
  with _Job(tmp_path, *flags, f'--workdir={killed}') as job:
    job.wait_for(lambda: _saved(killed, 14))
    job.processes[victim].kill()
    assert job.codes(patience=20)[1 - victim] == peers.EXIT_CODE
  assert not (killed / 'summary.json').exists()
  with _Job(tmp_path, *flags, f'--workdir={killed}') as job:
    assert (job.codes(), job.errors()) == ([0, 0], ['', ''])
  assert _outcome(killed) == _outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('told', [0, 1])
def test_one_that_is_told_to_stop_stops_all_with_a_checkpoint(tmp_path, told, number):
  workdir = tmp_path / 'run'
  with _Job(tmp_path, *_LONG[:2], f'--workdir={workdir}') as job:
    job.wait_for((workdir / 'metrics.jsonl').exists)
    time.sleep(2)
    job.processes[told].send_signal(number)
    expected = [143, 143]
    expected[told] = 128 + number
    assert (job.codes(patience=60), job.errors()) == (expected, ['', ''])
  assert checkpoints.load(workdir).position['step'] > 0
