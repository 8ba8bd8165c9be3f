"""Several real processes of train.py: how they find each other, stop, fail, go on."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import train
from training import checkpoints, metrics, peers

_ROOT = pathlib.Path(train.__file__).parent
_GONE = (
  'train.py: process {} of this run has ended {}, so this one ends with exit code 75: '
  'the same commands go on from the last checkpoint.\n'
)
_KILLED = 'without a word (killed or stopped, or its machine is lost)'
_MENDABLE = (
  'train.py: process {} of this run has ended with exit code 2, and has said why: so '
  'does this one.\n'
)


def _free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


class _Job:
  """Processes of one run, each with its stderr in a file."""

  def __init__(
    self, tmp_path, *flags, num=2, own=None, script=('train.py',), env=None, envs=None
  ):
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
          *flags,
          *own.get(i, [f'--num_processes={num}', f'--process_id={i}']),
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
          **(envs[i] if envs else {}),
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
  ('victim', 'num'),
  [(0, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in [(1, 2), (2, 3)])],
)
def test_a_process_that_is_killed_ends_the_others_with_a_sentence(
  tmp_path, victim, num
):
  workdir = tmp_path / 'run'
  with _Job(tmp_path, *_LONG, f'--workdir={workdir}', num=num) as job:
    job.wait_for(lambda: _saved(workdir, 3))
    job.processes[victim].kill()
    codes, errors = job.codes(patience=20), job.errors()
  for other in set(range(num)) - {victim}:
    assert codes[other] == peers.EXIT_CODE == 75
    assert errors[other] == _GONE.format(victim, _KILLED)


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


@pytest.mark.slow
def test_a_stop_may_come_to_the_others_late_and_often(tmp_path):
  """As to the hosts of a job whose time is up: process 1 waits while 0 saves."""
  workdir = tmp_path / 'run'
  with _Job(tmp_path, *_LONG[:2], f'--workdir={workdir}') as job:
    job.wait_for((workdir / 'metrics.jsonl').exists)
    time.sleep(2)
    job.processes[0].send_signal(signal.SIGTERM)
    while any(process.poll() is None for process in job.processes):
      time.sleep(0.1)
      job.processes[1].send_signal(signal.SIGTERM)
    assert (job.codes(), job.errors()) == ([143, 143], ['', ''])
  assert checkpoints.load(workdir).position['step'] > 0


# train.py, with a fault after step 3 of process FAULT_AT: an error, or a long sleep.
_FAULTY = """
import os, sys, time
import jax, train
from training import cli, errors, loop, peers

name, at = os.environ['FAULT'], os.environ['FAULT_AT']

def fault(self, pending):
  here = at == 'all' or int(at) == jax.process_index()
  if self._step == 3 and here and name != 'last':
    if name == 'sleep':
      time.sleep(600)
    raise getattr(errors, name)('it is so') if hasattr(errors, name) else KeyError('so')
  record(self, pending)

def finish(self):
  done = end(self)
  if name == 'last' and int(at) == jax.process_index():
    (self._workdir / 'last').touch()
    time.sleep(600)
  return done

record, loop._Run._record = loop._Run._record, fault
end, loop._Run.finish = loop._Run.finish, finish
argv = ['train.py', *sys.argv[1:]]
sys.exit(peers.together(cli.run, train.main, argv))
"""


def _faulty(tmp_path, name, at, *flags, num=2):
  return _Job(
    tmp_path,
    f'--workdir={tmp_path / "run"}',
    *flags,
    num=num,
    script=('-c', _FAULTY),
    env={'FAULT': name, 'FAULT_AT': str(at)},
  )


@pytest.mark.slow
@pytest.mark.parametrize('at', [0, 1])
@pytest.mark.parametrize('name', ['UsageError', 'bug'])
def test_an_error_of_one_ends_the_others_who_say_so(tmp_path, name, at):
  with _faulty(tmp_path, name, at, *_LONG[:2], num=3) as job:
    code = {'UsageError': 2, 'bug': 1}[name]
    # What the user can mend is no reason to try again.
    others = code if code == 2 else peers.EXIT_CODE
    expected = [code if i == at else others for i in range(3)]
    assert job.codes() == expected, job.errors()
    for i, error in enumerate(job.errors()):
      if i != at:
        how = f'with exit code {code}, and has said why'
        wanted = _MENDABLE.format(at) if code == 2 else _GONE.format(at, how)
        assert error == wanted
      elif name == 'UsageError':
        assert error == 'train.py: it is so\n'
      else:
        assert error.startswith('Traceback') and error.endswith("KeyError: 'so'\n")


@pytest.mark.slow
def test_an_error_of_all_is_told_by_each(tmp_path):
  with _faulty(tmp_path, 'TrainingDiverged', 'all', *_LONG[:2]) as job:
    assert (job.codes(), job.errors()) == ([2, 2], ['train.py: it is so\n'] * 2)


@pytest.mark.slow
@pytest.mark.parametrize(('asleep', 'victim'), [(0, 1), (1, 0), (0, 0), (1, 1)])
def test_a_kill_between_steps_ends_the_other(tmp_path, asleep, victim):
  """One sleeps, so the other waits in a collective; one of the two is killed."""
  workdir = tmp_path / 'run'
  with _faulty(tmp_path, 'sleep', asleep, *_LONG[:2]) as job:
    job.wait_for((workdir / 'config.json').exists)
    time.sleep(12)
    job.processes[victim].kill()
    assert job.codes(patience=20)[1 - victim] == peers.EXIT_CODE
    assert job.errors()[1 - victim] == _GONE.format(victim, _KILLED)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_kill_at_the_very_end_ends_the_other(tmp_path, victim):
  """Process 0 still writes, and process 1 is done and waits for it."""
  with _faulty(tmp_path, 'last', 0, '--epochs=1') as job:
    job.wait_for((tmp_path / 'run' / 'last').exists)
    job.processes[victim].kill()
    assert job.codes(patience=20)[1 - victim] == peers.EXIT_CODE
    assert job.errors()[1 - victim] == _GONE.format(victim, _KILLED)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_one_that_falls_silent_counts_as_gone(tmp_path, victim):
  """As when its machine or the network is lost: no connection is closed."""
  workdir = tmp_path / 'run'
  with _Job(tmp_path, *_LONG, f'--workdir={workdir}') as job:
    job.wait_for(lambda: _saved(workdir, 3))
    job.processes[victim].send_signal(signal.SIGSTOP)
    assert job.processes[1 - victim].wait(60) == peers.EXIT_CODE
    assert job.errors()[1 - victim] == _GONE.format(victim, _KILLED)


_IMPATIENT = """
import os, sys
import train
from training import cli, parallel, peers

parallel._PATIENCE = int(os.environ['PATIENCE'])
sys.exit(peers.together(cli.run, train.main, ['train.py', *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ('own', 'words'),
  [
    ([(2, 0), (2, 1), (3, 2)], '--num_processes=3 of --process_id=2 is 2 at'),
    ([(3, 0), (3, 1), (3, 1)], '--process_id=1 was given to two processes'),
    ([(2, 0), (3, 1)], '--num_processes=3 of --process_id=1 is 2 at'),
  ],
)
def test_processes_that_do_not_fit_together(tmp_path, own, words):
  flags = {
    i: [f'--num_processes={num}', f'--process_id={process}']
    for i, (num, process) in enumerate(own)
  }
  workdir = tmp_path / 'run'
  job = _Job(
    tmp_path,
    '--epochs=1',
    f'--workdir={workdir}',
    num=len(own),
    own=flags,
    script=('-c', _IMPATIENT),
    env={'PATIENCE': '20'},
  )
  with job:
    codes = job.codes(patience=90)
  # The third of two may come late: then the two train, and it alone is refused.
  assert codes in ([2] * len(own), [0, 0, 2])
  errors = [error for error in job.errors() if error]
  assert any(words in error for error in errors)
  for error in errors:  # One that comes when process 0 has left is told less.
    assert error.startswith('train.py: ') and error.count('\n') == 1
    assert re.search(words + '|has closed the connection|does not answer', error)


@pytest.mark.slow
def test_a_taken_port_and_processes_that_never_come(tmp_path):
  flags = ['--epochs=1', f'--workdir={tmp_path / "run"}']
  start = lambda own: _Job(
    tmp_path,
    *flags,
    num=len(own),
    own=own,
    script=('-c', _IMPATIENT),
    env={'PATIENCE': '1'},
  )
  with start({0: ['--num_processes=2']}) as job:
    assert job.codes(patience=60) == [2]
    assert 'these did not come within 1 s: --process_id=1.\n' in job.errors()[0]
  twice = {i: ['--num_processes=2', '--process_id=0'] for i in range(2)}
  with start(twice) as job:
    assert job.codes(patience=60) == [2, 2]
    assert any(re.match('train.py: --coordinator: port', e) for e in job.errors())


@pytest.mark.slow
def test_processes_with_other_flags(tmp_path):
  own = {
    i: ['--num_processes=2', f'--process_id={i}', f'--rho=.{i + 1}'] for i in range(2)
  }
  flags = ['--optimizer=sam', f'--workdir={tmp_path / "run"}']
  with _Job(tmp_path, *flags, own=own) as job:
    assert job.codes() == [2, 2]
    assert job.errors() == [
      _MENDABLE.format(1),
      'train.py: --process_id=1 was started with other flags: rho is 0.2 here and 0.1 '
      'in process 0. Give all processes the same.\n',
    ]
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_processes_with_unequally_many_devices(tmp_path):
  """Told before anything is sent, which would need equally many."""
  envs = [
    {'XLA_FLAGS': f'--xla_force_host_platform_device_count={2 - i}'} for i in range(2)
  ]
  with _Job(tmp_path, f'--workdir={tmp_path / "run"}', envs=envs) as job:
    assert job.codes() == [2, 2]
    sentence = (
      'train.py: the processes have different numbers of devices (2 in process 0, 1 in '
      'process 1): start all with equally many.\n'
    )
    errors = job.errors()
    assert sentence in errors  # The other may hear of this end before it looks itself.
    assert {*errors} <= {sentence, _MENDABLE.format(0), _MENDABLE.format(1)}


@pytest.mark.slow
def test_processes_with_other_devices(tmp_path):
  own = {
    i: ['--num_processes=2', f'--process_id={i}', f'--devices={i + 1}']
    for i in range(2)
  }
  two = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  with _Job(tmp_path, f'--workdir={tmp_path / "run"}', own=own, env=two) as job:
    codes, (first, _) = job.codes(), job.errors()
    assert codes == [2, 2]
    assert first == (
      'train.py: --devices=1: of several processes each takes all its devices, and '
      'equally many; this one takes 1 of 2, and all 2 have 4.\n'
    )


@pytest.mark.slow
def test_a_cluster_of_two_on_this_machine(tmp_path):
  """With what Slurm would set; process 0 is not behind a tunnel there."""
  workdir = tmp_path / 'run'
  ids = {i: ['--coordinator=cluster'] for i in range(2)}
  slurm = {
    'SLURM_JOB_ID': str(os.getpid()),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
  }
  envs = [{'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)} for i in range(2)]
  with _Job(
    tmp_path, *_LONG, f'--workdir={workdir}', own=ids, env=slurm, envs=envs
  ) as job:
    job.wait_for(lambda: _saved(workdir, 3))
    job.processes[1].kill()
    assert job.codes(patience=20)[0] == peers.EXIT_CODE
    assert job.errors()[0] == _GONE.format(1, _KILLED)


@pytest.mark.slow
def test_only_the_first_process_reads_and_writes(tmp_path):
  """The others need not see the workdir, at the start, on going on, or at the end."""
  folders = [tmp_path / 'first', tmp_path / 'second']
  own = {
    i: ['--num_processes=2', f'--process_id={i}', f'--workdir={folder}']
    for i, folder in enumerate(folders)
  }
  flags = ['--schedule=constant', '--optimizer=sam']
  for epochs in (1, 2, 2):
    with _Job(tmp_path, *flags, f'--epochs={epochs}', own=own) as job:
      assert (job.codes(), job.errors()) == ([0, 0], ['', ''])
    assert not folders[1].exists()
  assert checkpoints.load(folders[0]).position['epoch'] == 2


@pytest.mark.slow
def test_a_process_with_empty_shards(tmp_path):
  """One example a step and in each batch of an evaluation: process 1 has never one."""
  flags = ['--batch_size=1', '--epochs=1', '--evaluate_every=1']
  both, alone = tmp_path / 'both', tmp_path / 'alone'
  with _Job(tmp_path, *flags, f'--workdir={both}') as job:
    assert (job.codes(), job.errors()) == ([0, 0], ['', ''])
  single = {0: ['--coordinator=']}
  with _Job(tmp_path, *flags, f'--workdir={alone}', num=1, own=single) as job:
    assert (job.codes(), job.errors()) == ([0], [''])
  ours, theirs = (checkpoints.load(path).arrays for path in (both, alone))
  for name in ours:
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
  ours, theirs = (metrics.read(path)[-1] for path in (both, alone))
  assert ours['split'] == theirs['split'] == 'test'
  np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=1e-4)
