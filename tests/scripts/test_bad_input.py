"""Damaged runs and odd input on the command line: one sentence, nothing lost."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket

import jax
import pytest

import eval_hessian
import tasks
import train
from input_pipelines import DataError, image_folder
from training import checkpoints, cli, metrics, parallel

# The scripts print warnings; they are asserted there.
pytestmark = pytest.mark.filterwarnings('default')
# One run that all tests of train.py's files start from or compare with.
_FLAGS = ('--epochs=3', '--optimizer=sgd', '--notiming')


def _train(*arguments):
  return cli.run(
    train.main,
    ['train.py', '--nocache', '--devices=1', *arguments],
    errors=(DataError,),
  )


def _eval(*arguments):
  return cli.run(
    eval_hessian.main,
    ['eval_hessian.py', '--nocache', *arguments],
    errors=(DataError,),
  )


def _sentence(capsys, script='train.py'):
  """The one line that a script printed on stderr."""
  error = capsys.readouterr().err
  assert error.startswith(f'{script}: ') and error.count('\n') == 1, error
  return error


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The workdir of a run of three epochs with a checkpoint of each."""
  workdir = tmp_path_factory.mktemp('bad_input') / 'run'
  flags = (*_FLAGS, '--keep_checkpoints=0', '--checkpoint_every=40')
  assert _train(f'--workdir={workdir}', *flags) == 0
  return workdir


@pytest.fixture
def stopped(finished, tmp_path):
  """A copy that stands after its second epoch."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  (workdir / 'summary.json').unlink()
  newest = max(checkpoints.steps(workdir))
  shutil.rmtree(workdir / 'checkpoints' / str(newest))
  return workdir


def _bytes(workdir):
  arrays = checkpoints.load(workdir).arrays
  return {name: array.tobytes() for name, array in arrays.items()}


def test_a_damaged_line_of_the_metrics_costs_no_other(finished, stopped, capsys):
  path = stopped / 'metrics.jsonl'
  lines = (finished / 'metrics.jsonl').read_text().splitlines(keepends=True)
  assert [json.loads(line)['split'] for line in lines[:3]] == ['train', 'test', 'train']
  damaged = ''.join([lines[0], lines[1][:20] + '\n', *lines[2:]])
  path.write_text(damaged)
  assert _train(f'--workdir={stopped}', *_FLAGS) == 0
  error = capsys.readouterr().err
  assert 'has 1 line(s) that cannot be read (the first is line 2)' in error
  assert 'lacks epochs that the checkpoint has trained (1 of 2)' in error
  assert (stopped / 'damaged_metrics.jsonl').read_text() == damaged
  assert path.read_text() == ''.join([lines[0], *lines[2:]])
  assert _bytes(stopped) == _bytes(finished)


def test_metrics_that_are_gone_end_with_what_the_checkpoint_knows(
  finished, tmp_path, capsys
):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  (workdir / 'metrics.jsonl').unlink()
  (workdir / 'summary.json').unlink()
  assert _train(f'--workdir={workdir}', *_FLAGS) == 0
  assert 'lacks epochs' in capsys.readouterr().err
  (line,) = metrics.read(workdir)
  before = metrics.read(finished)[-1]
  assert {n: line[n] for n in ('step', 'epoch', 'split', 'loss', 'accuracy')} == {
    n: before[n] for n in ('step', 'epoch', 'split', 'loss', 'accuracy')
  }


def test_a_run_without_its_checkpoints_keeps_its_history(finished, stopped, capsys):
  shutil.rmtree(stopped / 'checkpoints')
  assert _train(f'--workdir={stopped}', *_FLAGS) == 0
  error = capsys.readouterr().err
  step = max(checkpoints.steps(finished))
  assert f'has metrics up to step {step} and no checkpoint' in error
  history = (finished / 'metrics.jsonl').read_text()
  assert (stopped / 'earlier_metrics.jsonl').read_text() == history
  assert (stopped / 'metrics.jsonl').read_text() == history
  assert _bytes(stopped) == _bytes(finished)


_QUICK = ('--measure=trace', '--num_probes=1', '--num_examples=64')


def test_a_comparison_overwrites_no_files_but_its_own(finished, tmp_path, capsys):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'report.html').write_text('mine')
  (out / '.hidden').touch()
  command = (f'--workdir={finished}', f'--out={out}', *_QUICK)
  assert _eval(*command) == 2
  assert f'--out={out} holds files that are not' in _sentence(capsys, 'eval_hessian.py')
  (out / 'comparison.json').write_text('{"mine": 1}')
  assert _eval(*command) == 2
  assert (out / 'report.html').read_text() == 'mine'
  for path in out.glob('[!.]*'):
    path.unlink()
  assert _eval(*command) == 0
  (out / 'report.html').write_text('of an earlier one')
  assert _eval(*command) == 0
  assert 'Comparison' in (out / 'report.html').read_text()


@contextlib.contextmanager
def _largest_file(size):
  """The system refuses to write more into one file, as a full disk does."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  # The programs that these tests keep lie on another disk.
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', least)


@pytest.mark.parametrize('size', [0, 900, 10_000, 36_000])
def test_a_full_disk_while_training_loses_nothing(finished, tmp_path, capsys, size):
  workdir = tmp_path / 'run'
  with _largest_file(size):
    assert _train(f'--workdir={workdir}', *_FLAGS) == 2
  assert 'File too large: free some space; the same' in _sentence(capsys)
  assert _train(f'--workdir={workdir}', *_FLAGS) == 0
  assert _bytes(workdir) == _bytes(finished)
  history = (finished / 'metrics.jsonl').read_text()
  assert (workdir / 'metrics.jsonl').read_text() == history


@pytest.mark.parametrize('size', [0, 1000, 10_000])
def test_a_full_disk_while_measuring_is_one_sentence(finished, tmp_path, capsys, size):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns('hessian'))
  command = (f'--workdir={workdir}', '--measure=eigenvalues', '--num_examples=64')
  command += ('--top_k=2', '--tol=1e-2', '--num_probes=1')
  with _largest_file(size):
    assert _eval(*command) == 2
  assert 'free some space; the same' in _sentence(capsys, 'eval_hessian.py')
  assert _eval(*command) == 0
  summary = json.loads((workdir / 'hessian' / 'summary.json').read_text())
  assert summary['lambda_max'] > 0


@pytest.mark.parametrize('run', [_train, _eval])
def test_nobody_reads_the_help(monkeypatch, run):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, 'w') as stdout:
    monkeypatch.setattr('sys.stdout', stdout)
    assert run('--help') == 141


def test_folders_and_files_that_are_no_such_thing(stopped, tmp_path, capsys):
  long = tmp_path / ('x' * 300)
  for script, run in (('train.py', _train), ('eval_hessian.py', _eval)):
    assert run(f'--workdir={long}') == 2
    assert 'File name too long: choose a shorter one' in _sentence(capsys, script)
  shutil.rmtree(stopped / 'checkpoints')
  (stopped / 'checkpoints').write_text('')
  for script, run, flags in (
    ('train.py', _train, _FLAGS),
    ('eval_hessian.py', _eval, ()),
  ):
    assert run(f'--workdir={stopped}', *flags) == 2
    assert 'checkpoints is not a folder: ' in _sentence(capsys, script)
  (stopped / 'checkpoints').unlink()
  (stopped / 'metrics.jsonl').unlink()
  (stopped / 'metrics.jsonl').mkdir()
  assert _train(f'--workdir={stopped}', *_FLAGS) == 2
  assert 'metrics.jsonl: Is a directory: move it away' in _sentence(capsys)


@pytest.mark.parametrize(
  'error',
  [
    PermissionError(errno.EACCES, 'Permission denied', '/elsewhere/file'),
    FileNotFoundError(errno.ENOENT, 'No such file or directory', '/runs/file'),
    OSError('of a library'),
  ],
)
def test_a_fault_of_the_program_stays_a_traceback(error):
  def main(argv):
    raise error

  with pytest.raises(type(error)):
    cli.run(main, ['train.py', '--workdir=/runs'])


@pytest.mark.parametrize('kind', ['pipe', 'device'])
def test_only_regular_files_are_read_as_images(tmp_path, kind):
  for name in ('cat', 'dog'):
    (tmp_path / 'pets' / name).mkdir(parents=True)
  odd = tmp_path / 'pets' / 'cat' / '0.png'
  if kind == 'pipe':
    os.mkfifo(odd)
  else:
    odd.symlink_to('/dev/zero')
  (tmp_path / 'pets' / 'dog' / '0.png').write_bytes(b'')
  limit = signal.alarm(20)  # Ends the test where it would hang.
  try:
    with pytest.raises(DataError, match='0.png is a pipe or a device'):
      image_folder.read(tmp_path / 'pets')
  finally:
    signal.alarm(limit)


@pytest.mark.parametrize(
  ('task', 'names'),
  [
    ('mitbih_attention', ('mitbih_train.csv', 'mitbih_test.csv')),
    ('cifar10_wrn', ('cifar-10-binary.tar.gz',)),
    ('mutagenicity_gcn', ('Mutagenicity.zip',)),
  ],
)
def test_a_pipe_in_place_of_an_archive(tmp_path, capsys, task, names):
  for name in names:
    os.mkfifo(tmp_path / name)
  flags = [f'--manual_dir={tmp_path}', f'--data_dir={tmp_path / "prepared"}']
  limit = signal.alarm(60)  # Ends the test where it would hang.
  try:
    assert _train(f'--task={task}', f'--workdir={tmp_path / "run"}', *flags) == 2
  finally:
    signal.alarm(limit)
  assert f'{names[0]} is a pipe or a device' in _sentence(capsys)


def test_a_coordinator_that_is_not_there(monkeypatch, capsys):
  monkeypatch.setattr(parallel, '_PATIENCE', 0.5)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'  # Nobody listens.
    flags = [f'--coordinator={address}', '--num_processes=2', '--process_id=1']
    assert _train(*flags) == 2
  error = capsys.readouterr().err
  assert f'waiting up to 0.5 s for --coordinator={address} to answer\n' in error
  assert f'train.py: --coordinator={address} does not answer (' in error
  flags[0] = '--coordinator=localhost:http'
  assert _train(*flags) == 2
  assert "'http' is no port" in _sentence(capsys)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ('--dataset=foo', '--dataset=foo has no effect with --task=digits_mlp'),
    ('--task=diabetes_mlp --dataset=foo', '--dataset=foo has no effect with'),
    ('--task=diabetes_mlp --label_smoothing=.2', '--label_smoothing=0.2 has no effect'),
    ('--epochs=1e20', '--epochs=1e20'),
    ('--epochs=100000000000000000000', 'must be at most 2147483647'),
    ('--epochs=2000000000', '--epochs=2000000000: 78,000,000,000 steps are'),
    ('--split_seed=2147483648', 'must be at most 2147483647'),
    ('--batch_size=99999999999', 'must be at most 2147483647'),
    ('--log_every=99999999999', 'must be at most 2147483647'),
    ('--seeds=1000000000000', '--seeds=1000000000000: must be at least 1 and at most'),
    ('--optimizer=sam --rho=0_1', '--rho=0_1: give one or more numbers'),
    ('--learning_rate=0_1', "'0_1' is not a number"),
    ('--epochs=1_0', "'1_0' is not a number"),
    ('--optimizer=sam --rho=1e-60', '--rho=1e-60: float32 has 0 and numbers from'),
    ('--learning_rate=1e39', '--learning_rate=1e+39: float32 has'),
    ('--weight_decay=1e-40', '--weight_decay=1e-40: float32 has'),
    ('--optimizer=sam,sam', '--optimizer=sam,sam has sam twice'),
    ('--optimizer=sam --rho=.1,0.1', '--rho=.1,0.1 has 0.1 twice'),
    ('--measure=trace,trace', '--measure=trace,trace has trace twice'),
  ],
)
def test_nonsense_is_refused(arguments, words, tmp_path, capsys):
  workdir = tmp_path / 'run'
  assert _train(f'--workdir={workdir}', *arguments.split()) == 2
  assert words in _sentence(capsys)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('argument', 'words'),
  [
    ('--steps=', '--steps= has an empty entry'),
    ('--steps=4_0', '--steps=4_0: give numbers of steps'),
    ('--steps=40,40', '--steps=40,40 has 40 twice'),
    ('--measure=trace,trace', '--measure=trace,trace has trace twice'),
    ('--seed=99999999999999999999', 'must be at most 2147483647'),
    ('--tol=0_1', "'0_1' is not a number"),
  ],
)
def test_nonsense_is_not_measured(finished, argument, words, capsys):
  assert _eval(f'--workdir={finished}', argument) == 2
  assert words in _sentence(capsys, 'eval_hessian.py')


@pytest.mark.parametrize(
  ('field', 'value'),
  [('epochs', '3'), ('rho', '.1'), ('task', 3), ('seed', True), ('momentum', None)],
)
def test_a_config_with_wrong_types_is_damaged(finished, tmp_path, capsys, field, value):
  stored = json.loads((finished / 'config.json').read_text())
  stored['config'][field] = value
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  words = f'config.json is damaged ({field} is {value!r}, and must be of the type'
  for script, run in (('train.py', _train), ('eval_hessian.py', _eval)):
    assert run(f'--workdir={tmp_path}') == 2
    assert words in _sentence(capsys, script)


def test_a_renamed_checkpoint_is_not_taken_for_another(stopped, capsys):
  folder = stopped / 'checkpoints'
  (folder / '80').rename(folder / '100')
  for script, run, flags in (
    ('train.py', _train, _FLAGS),
    ('eval_hessian.py', _eval, ('--measure=trace',)),
  ):
    assert run(f'--workdir={stopped}', *flags) == 2
    assert 'checkpoints/100 is the checkpoint of step 80' in _sentence(capsys, script)


def test_a_task_of_ones_own_declares_nothing(tmp_path):
  path = tmp_path / 'own_digits.py'
  path.write_text('from tasks.digits_mlp import RECIPE, build\n')
  assert tasks.resolve(str(path), dataset='mine').dataset == 'mine'
