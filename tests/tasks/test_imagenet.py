"""The two tasks of ImageNet on a small tree of files: recipes, runs, resumed runs."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

import tasks
import train
from input_pipelines import DataError
from training import checkpoints, cli, loop, optimizers, parallel

_ROOT = pathlib.Path(train.__file__).parent
_TINY = 'depth=1,width=8,num_heads=2'
_NETWORKS = {'imagenet_vit': _TINY, 'imagenet_resnet': 'width=2'}


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  """40 images for training and 15 for testing, of 5 classes and 64 to 100 pixels."""
  root = tmp_path_factory.mktemp('imagenet')
  generator = np.random.default_rng(0)
  for part, number in (('train', 40), ('val', 15)):
    for index in range(number):
      name = f'n{index % 5:02}'
      height, width = generator.integers(64, 101, 2)
      pixels = generator.integers(0, 256, (6, 6, 3)).astype(np.uint8)
      pixels[: index % 5 + 1] //= 3
      path = root / part / name / f'{name}_{index}.JPEG'
      path.parent.mkdir(parents=True, exist_ok=True)
      mode = {0: 'L', 1: 'CMYK'}.get(index, 'RGB')
      image = PIL.Image.fromarray(pixels).resize((width, height))
      image.convert(mode).save(path, 'JPEG')
  return root


def _flags(name, tree, *flags):
  return [
    f'--task={name}',
    f'--dataset={tree}',
    '--scale=small',
    f'--model={_NETWORKS[name]}',
    '--optimizer=sam',
    *flags,
  ]


def _resolve(name, tree, **fields):
  model = fields.pop('model', _NETWORKS[name])
  return tasks.resolve(
    name, dataset=str(tree), scale='small', optimizer='sam', model=model, **fields
  )


def test_the_recipes():
  config = tasks.resolve('imagenet_vit')
  schedule = optimizers.learning_rate(config, 313)
  rates = [float(schedule(step)) for step in (10_016, 93_899)]
  np.testing.assert_allclose(rates, [0.003, 0.00003], rtol=2e-3)
  config = tasks.resolve('imagenet_vit', optimizer='gsam', m_sharpness=64)
  assert (config.rho, config.hyperparameters) == (0.6, {'alpha': 1.0, 'rho_min': 0.0})
  config = tasks.resolve('imagenet_resnet', optimizer='gsam')
  assert (config.rho, config.hyperparameters['rho_min']) == (0.04, 0.02)
  assert config.learning_rate == 0.1 * config.batch_size / 256


@pytest.mark.parametrize(
  ('name', 'model', 'parameters'),
  [
    ('imagenet_vit', '', 22_050_664),
    ('imagenet_vit', 'width=768,num_heads=12', 86_567_656),
    ('imagenet_resnet', '', 25_557_032),
  ],
)
def test_published_sizes(tree, name, model, parameters):
  config = tasks.resolve(name, dataset=str(tree), model=model, batch_size=8)
  problem = tasks.build(config)
  assert problem.model.num_classes == 5 and len(problem.scores.class_names) == 5
  problem = problem._replace(model=problem.model.clone(num_classes=1000))
  leaves = jax.tree.leaves(problem.variables()['params'])
  assert sum(leaf.size for leaf in leaves) == parameters


class _Killed(Exception):
  """Stands for a kill: nothing of the run's own code runs after it."""


def _outcome(workdir):
  arrays = checkpoints.load(workdir).arrays
  lines = (workdir / 'metrics.jsonl').read_bytes()
  return {name: array.tobytes() for name, array in arrays.items()}, lines


def test_a_run_on_8_devices_that_is_killed_and_resumed(tree, tmp_path, monkeypatch):
  config = _resolve('imagenet_vit', tree, epochs=2, checkpoint_every=2, log_every=1)
  run = lambda name: loop.train(
    config, tasks.build(config), tmp_path / name, num_devices=8, timing=False
  )
  summary = run('whole')
  assert summary['num_replicas'] == 8 and summary['num_train_examples'] == 40
  assert 0 < summary['test_scores']['top_5_accuracy'] <= 1
  assert np.isfinite(summary['final']['test_loss'])

  def kill(step, requested):
    if step == 3:
      raise _Killed

  with monkeypatch.context() as context, pytest.raises(_Killed):
    context.setattr(parallel, 'agree_to_stop', kill)
    run('killed')
  assert checkpoints.load(tmp_path / 'killed').position['step'] == 2
  assert run('killed')['final'] == summary['final']
  assert _outcome(tmp_path / 'killed') == _outcome(tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('groups', [1, 2])
def test_8_devices_train_as_one_does(tree, tmp_path, groups):
  """A transformer; batch normalization is of each device's own examples."""
  finals = []
  for devices in (1, 8):
    config = _resolve(
      'imagenet_vit',
      tree,
      epochs=2,
      m_sharpness=16 if groups == 1 else 2,
      # Adam would magnify the rounding of gradients that are nearly zero.
      base_optimizer='momentum',
      learning_rate=0.1,
    )
    workdir = tmp_path / str(devices)
    loop.train(config, tasks.build(config), workdir, num_devices=devices)
    finals.append(checkpoints.load(workdir).arrays)
  one, eight = finals
  assert one.keys() == eight.keys()
  for name in one:
    np.testing.assert_allclose(eight[name], one[name], rtol=2e-3, atol=2e-5)


@pytest.mark.slow
def test_a_run_of_the_residual_network(tree, tmp_path):
  config = _resolve('imagenet_resnet', tree, epochs=2)
  summary = loop.train(config, tasks.build(config), tmp_path, num_devices=8)
  assert np.isfinite(summary['final']['test_loss'])


def _start(workdir, *flags, devices=1):
  flag = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    [sys.executable, 'train.py', f'--workdir={workdir}', '--notiming', *flags],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'},
  )


def _finish(process):
  _, error = process.communicate(timeout=600)
  return process.returncode, error


@pytest.mark.slow
def test_two_processes_train_as_two_devices_do(tree, tmp_path):
  flags = _flags('imagenet_vit', tree, '--epochs=2', '--nocache')
  alone = _start(tmp_path / 'alone', *flags, devices=2)
  assert _finish(alone) == (0, '')
  port = 20_000 + (os.getpid() + 7) % 20_000
  together = [
    _start(
      tmp_path / 'together',
      *flags,
      f'--coordinator=localhost:{port}',
      '--num_processes=2',
      f'--process_id={number}',
      f'--data_workers={number}',
    )
    for number in range(2)
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


# Trains to the end in one folder, and in another until it is killed after step 4.
_KILLED = """
import os, signal, sys
import train
from training import cli, parallel

whole, killed, *flags = sys.argv[1:]
run = lambda folder: cli.run(train.main, ['train.py', f'--workdir={folder}', *flags])
if run(whole) == 0:
  kill = lambda step, asked: step == 4 and os.kill(os.getpid(), signal.SIGKILL)
  parallel.agree_to_stop = kill
  run(killed)
"""


@pytest.mark.slow
@pytest.mark.parametrize('name', _NETWORKS)
def test_a_kill_changes_no_bit(tree, tmp_path, name):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  flags = _flags(name, tree, '--epochs=2', '--checkpoint_every=2')
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
  }
  command = [sys.executable, '-c', _KILLED, whole, killed, *flags, '--notiming']
  environment = {**os.environ, **cache}
  done = subprocess.run(
    command, cwd=_ROOT, capture_output=True, text=True, env=environment
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not (killed / 'summary.json').exists()
  # Another number of workers reads the same images.
  command = [sys.executable, 'train.py', f'--workdir={killed}', *flags, '--notiming']
  resumed = subprocess.run(
    [*command, '--data_workers=1'],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    env=environment,
  )
  assert (resumed.returncode, resumed.stderr) == (0, '')
  assert 'going on after step' in resumed.stdout
  assert _outcome(killed) == _outcome(whole)


def _run(*flags):
  command = ['train.py', '--nocache', '--devices=1', *flags]
  return cli.run(train.main, command, errors=(DataError,))


def test_bad_input_is_one_sentence(tree, tmp_path, capsys):
  workdir = f'--workdir={tmp_path / "run"}'
  damaged = tmp_path / 'damaged'
  os.makedirs(damaged / 'val')
  os.symlink(tree / 'train', damaged / 'train')
  empty = {f'--{kind}_dir={tmp_path}' for kind in ('data', 'manual')}
  for flags, words in (
    (empty, f'{tmp_path}/imagenet2012 is no folder'),
    (['--dataset=/nowhere/at/all'], '--dataset=/nowhere/at/all: there is no such fol'),
    ([f'--dataset={damaged}'], 'val has 0 class folders'),
    ([f'--dataset={tree}', '--data_workers=-1'], '--data_workers=-1: must not be neg'),
    ([f'--dataset={tree}'], '--batch_size=4096: the training split has 40 examples'),
    ([f'--dataset={tree}', '--model=patch=9'], '--model=patch=9: there is no such ne'),
  ):
    size = [] if 'batch_size' in words else ['--batch_size=8']
    assert _run('--task=imagenet_vit', workdir, *size, *flags) == 2
    out, error = capsys.readouterr()
    assert words in error.replace('train.py: dataset', '--dataset')
    assert error.startswith('train.py: ') and error.count('\n') == 1 and not out
  assert not (tmp_path / 'run').exists()


def test_a_damaged_image_ends_a_run_with_its_name(tree, tmp_path, capsys):
  root = tmp_path / 'tree'
  for path in tree.rglob('*.JPEG'):
    new = root / path.relative_to(tree)
    new.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, new)
  broken = root / 'train' / 'n02' / 'n02_7.JPEG'
  content = broken.read_bytes()
  broken.unlink()
  broken.write_bytes(content[: len(content) // 2])
  flags = _flags('imagenet_vit', root, f'--workdir={tmp_path / "run"}')
  assert _run(*flags) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'train.py: {broken} cannot be read as an image (')
  assert error.count('\n') == 1
