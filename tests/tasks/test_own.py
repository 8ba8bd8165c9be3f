"""Tasks and methods of a user's own: files outside this project."""

import json
import shutil

import pytest

import tasks
from training import Config, UsageError, loop, methods
from training import config as config_lib

TASK = '''
"""A line through points."""

import flax.linen as nn
import numpy as np

import training
from input_pipelines import ArraySplit
from training import scores

RECIPE = training.Config(
  optimizer='sgd', base_optimizer='sgd', epochs=8, batch_size=8, label_smoothing=0.0,
  schedule='constant', learning_rate=0.05,
)
METHODS = {'sam': {'rho': 0.02}}


class Line(nn.Module):
  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(1)(x)[:, 0]


def build(config):
  x = np.linspace(-1, 1, 24, dtype=np.float32)[:, None]
  split = ArraySplit(x, 2 * x[:, 0] + 1)
  return training.Problem(
    model=Line(), train=split, test=split, example_losses=scores.squared_error,
    scores=scores.SquaredError(), example_inputs=x[:1],
  )
'''
METHOD = '''
"""SAM at twice the radius."""

from typing import Annotated

import sam_jax
from sam_jax.methods import Bounds, method


@method()
def wide_sam(
  rho: float = 0.05,
  factor: Annotated[float, Bounds(above=0)] = 2.0,
  *,
  axis_name: str | None = None,
):
  """SAM.

  Args:
    rho: radius.
    factor: the radius is multiplied by this.
    axis_name: the mapped axis.
  """
  return sam_jax.sam(factor * rho, axis_name=axis_name)
'''


@pytest.fixture
def own(tmp_path):
  (tmp_path / 'my_line.py').write_text(TASK)
  (tmp_path / 'wide.py').write_text(METHOD)
  return tmp_path


def test_a_file_is_a_task_wherever_it_lies(own, monkeypatch):
  monkeypatch.chdir(own)
  config = tasks.resolve('my_line.py', optimizer='sam')
  assert config.rho == 0.02
  assert config.task == str(own / 'my_line.py')
  summary = loop.train(config, tasks.build(config), own / 'run', num_devices=1)
  final = summary['final']
  assert final['test_absolute_error'] < 0.5
  assert 'test_accuracy' not in final
  assert summary['test_scores']['r_squared'] > 0.8
  lines = (own / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert 'absolute_error' in json.loads(lines[-1])
  # The run is found again from another folder.
  monkeypatch.chdir('/')
  assert tasks.build(config_lib.load(own / 'run')).scores.main.name == 'absolute_error'


def test_a_file_is_a_method(own):
  path = str(own / 'wide.py')
  config = tasks.resolve('digits_mlp', optimizer=path, wide_sam_factor=3.0, rho=0.1)
  assert config.hyperparameters == {'factor': 3.0}
  assert methods.owners('wide_sam_factor', [path]) == [path]
  assert config_lib.label(config) == 'wide over sgd, rho 0.1'
  with pytest.raises(UsageError, match='wide_sam_factor=0.0: must be above 0'):
    tasks.resolve('digits_mlp', optimizer=path, wide_sam_factor=0.0)


def test_a_tasks_values_for_a_method_of_a_file_go_by_its_function(own):
  path = own / 'my_line.py'
  path.write_text(
    path.read_text().replace("{'sam'", "{'wide_sam': {'rho': 0.7}, 'sam'")
  )
  config = tasks.resolve(str(path), optimizer=str(own / 'wide.py'))
  assert config.rho == 0.7


def test_a_method_without_a_radius_is_refused(own):
  path = own / 'no_rho.py'
  path.write_text(
    METHOD.replace('  rho: float = 0.05,\n', '').replace('rho, axis', '1, axis')
  )
  with pytest.raises(UsageError, match='has no argument rho'):
    tasks.resolve('digits_mlp', optimizer=str(path))


def test_a_task_in_this_folder_is_one_file(own):
  """The names come from the folder itself."""
  folder = tasks.__path__[0]
  here = f'{folder}/test_own_line.py'
  shutil.copy(own / 'my_line.py', here)
  try:
    assert 'test_own_line' in tasks.names()
    assert tasks.resolve('test_own_line').epochs == 8
  finally:
    import pathlib

    pathlib.Path(here).unlink()


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('nowhere.py', 'there is no such file'),
    ('no_such.module', 'there is no such module'),
    ('no_such_task', 'choose one of digits_mlp, '),
    ('json.decoder', 'has no RECIPE'),
  ],
)
def test_what_is_no_task(name, words):
  with pytest.raises(UsageError, match=words):
    tasks.resolve(name)


def test_what_is_no_method(own):
  (own / 'none.py').write_text('import sam_jax\n')
  with pytest.raises(UsageError, match='declares 0 methods'):
    tasks.resolve('digits_mlp', optimizer=str(own / 'none.py'))
  with pytest.raises(TypeError, match='no_such_flag'):
    tasks.resolve('digits_mlp', optimizer='sam', no_such_flag=1)


def test_code_that_fails_is_shown_as_it_is(own):
  (own / 'broken.py').write_text('1 / 0\n')
  with pytest.raises(ZeroDivisionError):
    tasks.resolve(str(own / 'broken.py'))


def test_every_recipe_is_valid():
  for name in tasks.names():
    fields = {'dataset': 'PROTEINS'} if name == 'tudataset_gcn' else {}
    config = tasks.resolve(name, **fields)
    assert isinstance(config, Config) and config.task == name
