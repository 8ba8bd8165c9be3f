"""The command line of train.py, and runs of it that are killed."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tasks
import train
from input_pipelines import DataError, sources
from training import checkpoints, cli, methods, metrics
from training import config as config_lib

_ROOT = pathlib.Path(train.__file__).parent


def _run(*arguments):
  return cli.run(
    train.main,
    ['train.py', '--nocache', '--devices=1', *arguments],
    errors=(DataError,),
  )


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ('--rho=-1', '--rho=-1.0: the radius must not be negative'),
    ('--optimizer=sam --rho=nan', '--rho=nan: must be a finite number'),
    ('--rho=abc', '--rho=abc: give one or more numbers'),
    ('--rho=', '--rho= has an empty entry'),
    ('--optimizer=', '--optimizer= has an empty entry'),
    ('--optimizer=sam,,sgd', '--optimizer=sam,,sgd has an empty entry'),
    ('--seed=99999999999999', '--seed=99999999999999: must be at most'),
    ('--coordinator=foo', '--coordinator=foo: give host:port'),
    ('--num_processes=2', 'need --coordinator'),
    ('--optimizer=sgd --rho=0.1', 'has no effect with --optimizer=sgd'),
    ('--optimizer=sam --gsam_alpha=.2', '--gsam_alpha has no effect with'),
    ('--optimizer=foo', '--optimizer=foo: choose one of sam'),
    ('--optimizer=sam,foo', '--optimizer=foo: choose one of sam'),
    ('--base_optimizer=foo --optimizer=sam', '--base_optimizer=foo: choose one'),
    ('--task=foo', '--task=foo: choose one of digits_mlp'),
    ('--task=tudataset_gcn', 'give --dataset=PROTEINS'),
    ('--schedule=foo', '--schedule=foo: choose one of step'),
    ('--epoch=3', "'epoch'. Did you mean: epochs"),
    ('--epochs=0', '--epochs=0: must be at least 1'),
    ('--epochs=many', '--epochs=many'),
    ('--learning_rate=nan', '--learning_rate=nan: must be a finite number'),
    ('--seeds=0', '--seeds=0: must be at least 1'),
    ('--seed=0,1', '--seed has several values, and a sweep counts seeds'),
    ('--log_every=1,2', '--log_every has several values, and the results do not'),
    ('--task=digits_mlp,diabetes_mlp', '--task=digits_mlp,diabetes_mlp: choose one'),
    ('--learning_rate=.1,', '--learning_rate=.1, has an empty entry'),
    ('--learning_rate=.1,x', '--learning_rate=.1,x: give one or more numbers, as 0.05'),
    ('--batch_size=8,.5', "'.5' is not a number of this kind"),
    ('--batch_size=8,8', '--batch_size=8,8 has 8 twice'),
    ('--batch_size=8,9999', '--batch_size=9999: the training split has 1257'),
    ('--weight_decay=0,-1', '--weight_decay=-1.0: must not be negative'),
    ('--schedule=step,foo', '--schedule=foo: choose one of'),
    ('--momentum=.8,.9', '--momentum has no effect with --base_optimizer=sgd'),
    ('--optimizer=sam --looksam_every=2,5', '--looksam_every has no effect with'),
    ('--optimizer=sgd --perturb_every=2,5', '--perturb_every=2 has no effect with'),
    ('--devices=99', '--devices=99: this process has'),
    ('--m_sharpness=5 --optimizer=sam', 'must divide --batch_size'),
    ('--init_from=/nowhere', '--init_from=/nowhere: /nowhere has no checkpoint'),
    ('--model=features=20', 'features is a tuple, written in brackets and quotes, as'),
    ('--model=features=20', "--model='features=(20,)' or --model='features=(20,30)'"),
    ('--model=features=8+8', "in brackets and quotes, as --model='features=(20,30)'"),
    ('--model=features=8,8', "in brackets and quotes, as --model='features=(20,30)'"),
    ('--model=features=[8]', 'features is a tuple, written in brackets and quotes, as'),
    ('sam', "unexpected argument 'sam'"),
  ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, capsys):
  workdir = tmp_path / 'run'
  assert _run(f'--workdir={workdir}', *arguments.split()) == 2
  out, error = capsys.readouterr()
  assert words in error
  assert error.startswith('train.py: ') and error.count('\n') == 1
  assert not workdir.exists() and not out


def test_data_that_is_not_there(tmp_path, capsys):
  start = time.monotonic()
  folders = [f'--{name}_dir={tmp_path}' for name in ('manual', 'data')]
  workdir = tmp_path / 'run'
  assert _run('--task=mutagenicity_gcn', *folders, f'--workdir={workdir}') == 2
  assert 'Mutagenicity.zip' in capsys.readouterr().err
  assert time.monotonic() - start < 10 and not workdir.exists()


@pytest.mark.parametrize(
  ('flags', 'names'),
  [
    (
      ['--task=eos_mnist_mlp'],
      'train-images-idx3-ubyte.gz + train-labels-idx1-ubyte.gz + '
      't10k-images-idx3-ubyte.gz + t10k-labels-idx1-ubyte.gz or train-images-idx3',
    ),
    (
      ['--task=eos_stochastic', '--scale=small'],
      't10k-images-idx3-ubyte.gz + t10k-labels-idx1-ubyte.gz or t10k-images',
    ),
    (['--task=eos_cohen_tanh'], 'cifar-10-binary.tar.gz or cifar10.npz or cifar-10-p'),
    (['--task=eos_shakespeare_transformer'], 'tinyshakespeare.txt or input.txt'),
  ],
)
def test_files_that_are_looked_for_are_named(
  flags, names, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(sources, '_answers', lambda url: False)
  workdir, folder = tmp_path / 'run', tmp_path / 'data'
  flags = [*flags, f'--manual_dir={folder}', f'--data_dir={tmp_path}']
  for where in (f'{folder}, which is no folder', str(folder)):
    assert _run(*flags, f'--workdir={workdir}') == 2
    error = capsys.readouterr().err
    assert names in error and error.count('\n') == 1
    assert f' is not in {where}, there is no prepared set' in error
    folder.mkdir(exist_ok=True)
  assert not workdir.exists()


def test_help_of_a_task_tells_its_recipe(capsys):
  with pytest.raises(SystemExit):
    _run('--task=cifar10_wrn', '--help')
  shown = capsys.readouterr().out
  assert shown.startswith('CIFAR-10') and 'Methods: sam' in shown
  assert '--learning_rate=X        peak learning rate (here: 0.1)\n' in shown
  assert max(map(len, shown.splitlines())) <= 88


def test_help_names_every_flag_and_choice(capsys):
  with pytest.raises(SystemExit) as caught:
    _run('--help')
  assert caught.value.code == 0
  text = capsys.readouterr().out
  for word in ('--rho=', '--[no]timing', 'digits_mlp', *methods.found()):
    assert word in text
  assert 'alsologtostderr' not in text
  assert max(map(len, text.splitlines())) <= 88


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The workdir of a short run of the default task."""
  workdir = tmp_path_factory.mktemp('train') / 'run'
  assert _run(f'--workdir={workdir}', '--epochs=2', '--optimizer=sam') == 0
  return workdir


def test_a_run_writes_its_files_and_a_second_start_only_reports(finished, capsys):
  config = json.loads((finished / 'config.json').read_text())['config']
  assert config['rho'] == 0.05 and config['base_optimizer'] == 'sgd'
  files = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
  assert _run(f'--workdir={finished}', '--epochs=2', '--optimizer=sam') == 0
  assert 'generalization gap' in capsys.readouterr().out
  assert files == {p: p.stat().st_mtime_ns for p in finished.rglob('*')}


@pytest.mark.filterwarnings('default')
def test_what_a_finished_run_did_not_measure_is_told(finished, capsys, monkeypatch):
  run = lambda *flags: _run(
    f'--workdir={finished}', '--epochs=2', '--optimizer=sam', *flags
  )
  for flags, words in (
    (['--track=foo'], '--track=foo: choose of edges'),
    (['--track=edges', '--track_on=all'], '--track_on=all: give batch'),
    (['--track=edges', '--track_share=2'], '--track_share=2: must be'),
    (['--track_on=train'], '--track_on=train has no effect without --track'),
    (['--measure=foo'], '--measure=foo: choose of'),
    (['--measure=trace', '--measure_every=-1'], '--measure_every=-1: must not'),
  ):
    assert run(*flags) == 2
    out, error = capsys.readouterr()
    assert words in error and error.count('\n') == 1 and not out
  for flag, done in (('--track=edges', 'tracked'), ('--measure=trace', 'measured')):
    assert run(flag) == 0
    out, error = capsys.readouterr()
    assert f'{flag}: the run in {finished} is finished and nothing was {done}' in error
    assert error.count('\n') == 1 and 'generalization gap' in out
  # Of one that was tracked the examples are compared too.
  lines = [{'step': 0, 'split': 'edges', 'on': 'batch'}]
  monkeypatch.setattr(train.metrics, 'read', lambda workdir: lines)
  assert run('--track=edges', '--track_every=3') == 0
  assert not capsys.readouterr().err
  assert run('--track=edges', '--track_on=train') == 2
  assert 'track_on=train: this run was tracked' in capsys.readouterr().err


def test_other_flags_on_its_workdir_are_refused(finished, capsys):
  assert _run(f'--workdir={finished}', '--epochs=3', '--optimizer=sam') == 2
  assert 'has epochs=2, and --schedule=cosine stretches' in capsys.readouterr().err
  assert _run(f'--workdir={finished}', '--epochs=2', '--optimizer=sgd') == 2
  assert "optimizer is 'sam' there and 'sgd' here" in capsys.readouterr().err
  assert _run(f'--workdir={finished}', '--epochs=2', '--seeds=2') == 2
  assert 'holds a single run' in capsys.readouterr().err


def test_seeds_are_counted_from_the_one_that_is_given(tmp_path, monkeypatch):
  started = []
  monkeypatch.setattr(
    train.sweep, 'run', lambda configs, *_, **__: started.extend(configs)
  )
  assert _run(f'--workdir={tmp_path}', '--seed=3', '--seeds=2', '--epochs=1,2') == 0
  assert started == [f'epochs_{n}/seed_{seed}' for n in (1, 2) for seed in (3, 4)]


def test_a_sweep_over_another_field(tmp_path):
  flags = ['--optimizer=momentum', '--epochs=1', '--nosharpness', '--batch_size=400']
  assert _run(f'--workdir={tmp_path}', *flags, '--learning_rate=.02,.1') == 0
  results = json.loads((tmp_path / 'sweep.json').read_text())
  assert [row['swept'] for row in results['rows']] == [
    {'learning_rate': 0.02},
    {'learning_rate': 0.1},
  ]
  for row in results['rows']:
    workdir = tmp_path / f'learning_rate_{row["swept"]["learning_rate"]}' / 'seed_0'
    config = json.loads((workdir / 'config.json').read_text())['config']
    assert config['learning_rate'] == row['swept']['learning_rate']
    final = json.loads((workdir / 'summary.json').read_text())['final']
    assert row['test_loss'] == final['test_loss']
  assert '| rho | learning_rate |' in (tmp_path / 'sweep.md').read_text()
  assert (tmp_path / 'sweep.png').stat().st_size > 10_000


def test_a_sweep_compares_and_repeats_nothing(tmp_path, capsys):
  flags = [f'--workdir={tmp_path}', '--epochs=1', '--optimizer=sgd,sam', '--rho=0.1']
  assert _run(*flags, '--seeds=2') == 0
  first = capsys.readouterr().out
  runs = [p.parent.relative_to(tmp_path) for p in tmp_path.rglob('config.json')]
  assert sorted(map(str, runs)) == [
    'sam/rho_0.1/seed_0',
    'sam/rho_0.1/seed_1',
    'sgd/seed_0',
    'sgd/seed_1',
  ]
  results = json.loads((tmp_path / 'sweep.json').read_text())
  assert [(r['optimizer'], r['rho'], r['seeds']) for r in results['rows']] == [
    ('sgd', None, 2),
    ('sam', 0.1, 2),
  ]
  sgd = [results['runs'][f'sgd/seed_{seed}']['lambda_max'] for seed in (0, 1)]
  row = results['rows'][0]
  np.testing.assert_allclose(row['lambda_max'], np.mean(sgd))
  np.testing.assert_allclose(
    row['lambda_max_error'], abs(sgd[0] - sgd[1]) / 2, rtol=1e-6
  )
  table = (tmp_path / 'sweep.md').read_text()
  assert table in first and table.count('+-') == 11
  assert (tmp_path / 'sweep.png').stat().st_size > 10_000
  assert _run(*flags, '--seeds=2') == 0
  second = capsys.readouterr().out
  assert table in second and 'epoch ' in first and 'epoch ' not in second


def _start(workdir, *flags, environment=None):
  variables = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen(
    [sys.executable, 'train.py', f'--workdir={workdir}', '--notiming', *flags],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**variables, **(environment or {})},
  )


def _finish(process):
  """Waits for the end; returns the exit code and what was printed on stderr."""
  _, error = process.communicate(timeout=300)
  return process.returncode, error


def _outcome(workdir):
  arrays = checkpoints.load(workdir).arrays
  lines = (workdir / 'metrics.jsonl').read_bytes()
  return {name: array.tobytes() for name, array in arrays.items()}, lines


# Trains to the end in one folder, and in another until it is killed after step 30.
_KILLED_AFTER_STEP_30 = """
import os, signal, sys
import train
from training import cli, parallel

whole, killed, *flags = sys.argv[1:]
run = lambda folder: cli.run(train.main, ['train.py', f'--workdir={folder}', *flags])
if run(whole) == 0:
  kill = lambda step, asked: step == 30 and os.kill(os.getpid(), signal.SIGKILL)
  parallel.agree_to_stop = kill
  run(killed)
"""


@pytest.mark.slow
def test_a_kill_changes_no_bit_of_optimized_programs(tmp_path):
  """The tests of the loop compile without optimizations; this one as a user does."""
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  flags = ['--optimizer=sam', '--epochs=1', '--checkpoint_every=7', '--log_every=11']
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  done = subprocess.run(
    [sys.executable, '-c', _KILLED_AFTER_STEP_30, whole, killed, *flags, '--notiming'],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', **cache},
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not (killed / 'summary.json').exists()
  resumed = _start(killed, *flags, environment=cache)
  printed, error = resumed.communicate(timeout=300)
  assert (resumed.returncode, error) == (0, '')
  assert re.search('going on after step (21|28) of ', printed)
  assert _outcome(killed) == _outcome(whole)


def test_folders_that_cannot_be_used(tmp_path, capsys):
  assert _run('--workdir=') == 2
  assert '--workdir= is empty' in capsys.readouterr().err
  (tmp_path / 'file').write_text('')
  assert _run(f'--workdir={tmp_path}/file/run', '--epochs=1') == 2
  assert 'cannot be written (Not a directory)' in capsys.readouterr().err
  workdir = tmp_path / 'taken'
  config = tasks.resolve('digits_mlp', epochs=1)
  with config_lib.claim(config, workdir):
    assert _run(f'--workdir={workdir}', '--epochs=1') == 2
    assert 'another process is training' in capsys.readouterr().err
  assert _run(f'--workdir={workdir}', '--epochs=1') == 0


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_a_damaged_summary_is_made_anew(tmp_path, capsys):
  assert _run(f'--workdir={tmp_path}', '--epochs=1') == 0
  path = tmp_path / 'summary.json'
  first = json.loads(path.read_text())
  path.write_text('{')
  assert _run(f'--workdir={tmp_path}', '--epochs=1') == 0
  assert 'is damaged and is made anew' in capsys.readouterr().err
  assert json.loads(path.read_text())['final'] == first['final']


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path):
  flags = ['--optimizer=sam', '--epochs=20', '--checkpoint_every=7', '--log_every=11']
  environment = {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  whole = _start(tmp_path / 'whole', *flags, environment=environment)
  assert _finish(whole) == (0, '')
  rng = random.Random(0)

  def newest():
    found = (tmp_path / 'killed').glob('checkpoints/[0-9]*')
    return max((int(p.name) for p in found if p.name.isdigit()), default=0)

  steps = [0]
  for number in range(20):
    run = _start(tmp_path / 'killed', *flags, environment=environment)
    if number % 5:  # The others die while they start.
      lines = iter(run.stdout.readline, '')
      next((line for line in lines if line.startswith('epoch')), None)
    if number % 5 > 2:  # After the next checkpoint, however slow the machine is.
      while run.poll() is None and newest() == steps[-1]:
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 0.4))
    run.send_signal(signal.SIGKILL)
    _finish(run)
    steps.append(newest())
  last = _start(tmp_path / 'killed', *flags, environment=environment)
  code, error = _finish(last)
  assert code == 0, error
  assert len(set(steps)) > 3, f'the kills did not fall inside the run: {steps}'
  assert _outcome(tmp_path / 'killed') == _outcome(tmp_path / 'whole')


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_143(tmp_path):
  flags = ['--epochs=4000', '--schedule=constant']
  run = _start(tmp_path / 'run', *flags)
  while not (tmp_path / 'run' / 'metrics.jsonl').exists():
    assert run.poll() is None
    time.sleep(0.1)
  time.sleep(3)
  run.send_signal(signal.SIGTERM)
  assert _finish(run) == (143, '')
  step = checkpoints.load(tmp_path / 'run').position['step']
  assert metrics.read(tmp_path / 'run')[-1]['step'] <= step


@pytest.mark.slow
def test_two_processes_equal_two_devices(tmp_path):
  flags = ['--optimizer=sam', '--epochs=2', '--nocache']
  two = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  alone = _start(tmp_path / 'alone', *flags, environment=two)
  assert _finish(alone) == (0, '')
  port = 20_000 + os.getpid() % 20_000
  together = [
    _start(
      tmp_path / 'together',
      *flags,
      f'--coordinator=localhost:{port}',
      '--num_processes=2',
      f'--process_id={i}',
    )
    for i in range(2)
  ]
  for process in together:
    code, error = _finish(process)
    assert code == 0, error
  ours, theirs = (
    checkpoints.load(tmp_path / name).arrays for name in ('together', 'alone')
  )
  assert ours.keys() == theirs.keys()
  for name in theirs:
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('damaged', ['{"lambda', '{}', None])
def test_a_damaged_measurement_of_a_sweep_is_made_anew(tmp_path, monkeypatch, damaged):
  if damaged is not None:
    (tmp_path / 'sharpness.json').write_text(damaged)
  monkeypatch.setattr(checkpoints, 'load_variables', lambda *_: (None, None, None))
  monkeypatch.setattr(train.measurements, 'lambda_max', lambda *_: {'lambda_max': 2.0})
  for _ in range(2):
    assert train._lambda_max(None, None, tmp_path) == {'lambda_max': 2.0}
  assert json.loads((tmp_path / 'sharpness.json').read_text()) == {'lambda_max': 2.0}
