"""Runs on a mesh: resumed on other devices, measured, and refused."""

import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

import tasks
import train
from input_pipelines import DataError
from training import UsageError, checkpoints, cli, loop, meshes, metrics, parallel
from training.hooks import Hook

_MESH = 'data:4,fsdp:2'


@pytest.fixture(autouse=True)
def split_small_arrays(monkeypatch):
  """The networks of these tests have no large ones."""
  monkeypatch.setattr(meshes, 'SMALL', 1)


class Plain(nn.Module):
  """In float64; without batch normalization and dropout, which replicas have apart."""

  @nn.compact
  def __call__(self, x, *, train=False):
    dense = functools.partial(nn.Dense, param_dtype='float64')
    return dense(3)(nn.tanh(dense(8)(x)))


def config_of(**fields):
  return tasks.resolve(
    'digits_mlp',
    **{
      'optimizer': 'sam',
      'base_optimizer': 'momentum',
      'rho': 0.2,
      'batch_size': 16,
      'learning_rate': 0.1,
      'epochs': 3,
      'log_every': 1,
      **fields,
    },
  )


@pytest.fixture(scope='module')
def problem(small):
  train_split = small.split(38, dtype=np.float64)
  return small.problem(train_split)._replace(model=Plain())


def run(problem, workdir, **devices):
  loop.train(config_of(), problem, workdir, timing=False, **devices)
  return result(workdir)


def result(workdir):
  """The arrays of a run's last checkpoint, and its lines."""
  return checkpoints.load(workdir).arrays, metrics.read(workdir)


def stop_at(number, monkeypatch, problem, workdir, **devices):
  """Ends a run after a step, inside of its second epoch."""
  with monkeypatch.context() as patch:
    patch.setattr(parallel, 'agree_to_stop', lambda step, asked: step == number)
    with pytest.raises(SystemExit):
      run(problem, workdir, **devices)


def assert_same_run(got, expected, tolerance=1e-10):
  """The same parameters, state, and lines of every step."""
  (arrays, lines), (other_arrays, other_lines) = got, expected
  assert arrays.keys() == other_arrays.keys() and len(lines) == len(other_lines) > 9
  for name, array in arrays.items():
    np.testing.assert_allclose(array, other_arrays[name], tolerance, tolerance)
  for one, other in zip(lines, other_lines, strict=True):
    for name, value in one.items():
      if isinstance(value, float):
        assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance)
      else:
        assert value == other[name]


@pytest.fixture(scope='module')
def on_one_device(problem, tmp_path_factory):
  """A run that nothing interrupted, and the folder of one stopped at step 5 of 9."""
  folder = tmp_path_factory.mktemp('one')
  with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
    whole = run(problem, folder / 'whole', num_devices=1)
    stop_at(5, patch, problem, folder / 'cut', num_devices=1)
  return whole, folder / 'cut'


@pytest.mark.parametrize(
  'devices',
  [
    {'mesh': _MESH},
    pytest.param({'mesh': 'data:2,fsdp:4'}, marks=pytest.mark.slow),
    pytest.param({'mesh': 'fsdp:8'}, marks=pytest.mark.slow),
    {'num_devices': 8},
  ],
  ids=str,
)
def test_a_run_of_one_device_goes_on_elsewhere(
  devices, problem, on_one_device, tmp_path, x64
):
  """The same order of the data, and the same numbers to the end."""
  expected, cut = on_one_device
  shutil.copytree(cut, tmp_path / 'run')
  assert_same_run(run(problem, tmp_path / 'run', **devices), expected)
  found = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert found.get('mesh') == devices.get('mesh')
  assert found['num_replicas'] == devices.get('num_devices', 1)


def test_a_run_of_a_mesh_goes_on_elsewhere(
  problem, on_one_device, tmp_path, monkeypatch, x64
):
  """Its checkpoint holds whole arrays: on one device, or on another mesh."""
  expected, _ = on_one_device
  stop_at(4, monkeypatch, problem, tmp_path, mesh=_MESH)
  stop_at(7, monkeypatch, problem, tmp_path, mesh='fsdp:8')
  assert_same_run(run(problem, tmp_path, num_devices=1), expected)


class _Norm(Hook):
  """The sum of squares of the parameters, and where they lie."""

  name = 'norm'

  def due(self, step, steps_per_epoch):
    return step % 2 == 0

  def __call__(self, state, step):
    leaves = jax.tree.leaves(state.params)
    assert all(x.sharding.device_set == {jax.devices()[0]} for x in leaves)
    return {'value': float(sum((np.asarray(x, float) ** 2).sum() for x in leaves))}


@pytest.mark.slow
def test_hooks_measure_whole_networks(small, tmp_path):
  """Float32, batch normalization and dropout: also of the loop as it runs for users."""
  found = []
  for name, devices in (('mesh', {'mesh': _MESH}), ('one', {'num_devices': 1})):
    options = {'timing': False, 'hooks': [_Norm()], **devices}
    loop.train(config_of(epochs=2), small.problem(), tmp_path / name, **options)
    lines = metrics.read(tmp_path / name)
    found.append([x['value'] for x in lines if x['split'] == 'norm'])
  assert len(found[0]) == 3
  np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ('--mesh=', "--mesh=: '' is no axis with its size; give them as --mesh=data:4"),
    ('--mesh=8', "--mesh=8: '8' is no axis with its size"),
    ('--mesh=data', "--mesh=data: 'data' is no axis with its size"),
    ('--mesh=data:', "'data:' is no axis with its size"),
    ('--mesh=data:4,', "'' is no axis with its size"),
    ('--mesh=data:four', "'data:four' is no axis with its size"),
    ('--mesh=data:-8', "'data:-8' is no axis with its size"),
    ('--mesh=data:0', "'data:0' is no axis with its size"),
    ('--mesh=data:4x2', "'data:4x2' is no axis with its size"),
    ('--mesh=data=4', "'data=4' is no axis with its size"),
    ('--mesh=data:4:2', "'data:4:2' is no axis with its size"),
    ('--mesh=data:²', "'data:²' is no axis with its size"),
    ('--mesh=data:99999999999', 'is no axis with its size'),
    ('--mesh=model:8', "--mesh=model:8: 'model' is no axis of a mesh; choose data"),
    ('--mesh=:8', "'' is no axis of a mesh"),
    ('--mesh=data:2,data:4', '--mesh=data:2,data:4 has data twice'),
    ('--mesh=data:4', '--mesh=data:4 is of 4 devices, and there are 8 (cpu)'),
    ('--mesh=data:4,fsdp:4', 'is of 16 devices, and there are 8 (cpu): give sizes'),
    ('--mesh=data:8 --devices=4', 'takes all devices: leave out --devices=4'),
    (
      '--mesh=data:8 --batch_size=12',
      '--mesh=data:8 does not divide the 12 examples of a step with --batch_size=12: '
      'give a multiple of its 8 devices.',
    ),
    (
      '--mesh=data:8 --optimizer=sam --m_sharpness=4',
      'does not divide the 4 examples of a group of --m_sharpness=4',
    ),
    (
      '--mesh=data:8 --batch_size=32 --grad_accum_steps=8',
      'the 4 examples of one of --grad_accum_steps=8 parts of a step with --batch_size',
    ),
    (
      '--mesh=fsdp:8 --optimizer=sam,asam --m_sharpness=4',
      'does not divide the 4 examples of a group',
    ),
  ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(
  flags, words, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  script = ['train.py', '--nocache', f'--workdir={tmp_path}/run', *flags.split()]
  assert cli.run(train.main, script, errors=(DataError,)) == 2
  out, error = capsys.readouterr()
  assert words in error
  assert error.startswith('train.py: ') and error.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_hooks_and_several_processes_are_refused(problem, monkeypatch):
  """They need the whole network in one process."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UsageError, match='over 2 processes does not go with --measure'):
    meshes.fit(config_of(), problem, 0, _MESH, [_Norm()])
  meshes.fit(config_of(), problem, 0, _MESH)


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_of_one_device(tmp_path, monkeypatch, capsys):
  """On one mesh of both: the checkpoint comes from the first, who alone writes."""
  flags = ['--nocache', '--notiming', '--batch_size=256', '--epochs=3', '--rho=.1']
  flags += ['--optimizer=sam', '--log_every=1', '--checkpoint_every=1']
  one = ['train.py', '--devices=1', *flags]
  assert cli.run(train.main, [*one, f'--workdir={tmp_path}/one']) == 0
  with monkeypatch.context() as patch:
    patch.setattr(parallel, 'agree_to_stop', lambda step, asked: step == 7)
    with pytest.raises(SystemExit):
      train.main([*one, f'--workdir={tmp_path}/two'])
  capsys.readouterr()
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  script = pathlib.Path(train.__file__)
  command = [sys.executable, script, *flags, '--mesh=data:2,fsdp:2']
  command += [f'--coordinator={address}', '--num_processes=2']
  device_flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=2')
  processes = [
    subprocess.Popen(
      [*command, f'--process_id={i}', f'--workdir={tmp_path}/{folder}'],
      env={**os.environ, 'XLA_FLAGS': device_flags},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, folder in enumerate(['two', 'unused'])
  ]
  try:
    for process in processes:
      _, error = process.communicate(timeout=240)
      assert process.returncode == 0, error
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  assert not (tmp_path / 'unused').exists()
  assert_same_run(*(result(tmp_path / name) for name in ('two', 'one')), 1e-4)
  assert json.loads((tmp_path / 'two' / 'summary.json').read_text())['steps'] == 15


def test_help_tells_of_the_mesh(capsys):
  with pytest.raises(SystemExit):
    train.main(['train.py', '--help'])
  assert 'data:4,fsdp:2' in capsys.readouterr().out


def test_a_sweep_is_checked_before_its_first_run(tmp_path, capsys):
  flags = ['--mesh=data:8', '--batch_size=16,12', f'--workdir={tmp_path}/sweep']
  assert cli.run(train.main, ['train.py', '--nocache', *flags]) == 2
  assert 'does not divide the 12 examples' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
