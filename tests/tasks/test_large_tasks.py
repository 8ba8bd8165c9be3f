"""The two large tasks: their recipes, their networks, and what they refuse."""

import io
import json
import shutil
import zipfile

import jax
import numpy as np
import PIL.Image
import pytest

import eval_hessian
import tasks
import train
import training
from input_pipelines import DataError, cifar10
from tasks import networks
from training import cli, loop, optimizers

_SMALL = 'features=8,head_features=(16,),hidden_features=8'


def _count(problem):
  variables = jax.eval_shape(
    problem.model.init, jax.random.key(0), problem.example_inputs
  )
  return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Folders with a tiny CIFAR-10, a tiny folder of pets, and tables of heartbeats."""
  root = tmp_path_factory.mktemp('data')
  generator = np.random.default_rng(0)

  def write(name, classes, parts):
    with zipfile.ZipFile(root / name, 'w') as archive:
      for part in parts:
        for label, folder in enumerate(classes):
          for index in range(4):
            pixels = generator.integers(0, 200, (32, 32, 3)) + 5 * label
            file = io.BytesIO()
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, 'PNG')
            archive.writestr(f'{part}{folder}/{index}.png', file.getvalue())

  write('cifar10.zip', cifar10.CLASSES, ('train/', 'test/'))
  write('pets.zip', ('cat', 'dog', 'eel'), ('',))
  for name, number in (('train', 40), ('test', 20)):
    labels = np.arange(number)[:, None] % 5
    rows = np.concatenate([generator.uniform(size=(number, 187)), labels], axis=1)
    np.savetxt(root / f'mitbih_{name}.csv', rows, '%.4f', delimiter=',')
  return {'manual_dir': str(root), 'data_dir': str(root / 'prepared')}


def test_the_papers_recipes(folders):
  config = tasks.resolve('cifar10_wrn', optimizer='asam', batch_size=8, **folders)
  assert (config.rho, config.hyperparameters) == (2.0, {'eta': 0.0, 'weights': 'all'})
  problem = tasks.build(config)
  assert _count(problem) == 17_158_106
  assert problem.scores.class_names == cifar10.CLASSES
  config = tasks.resolve('mitbih_attention', optimizer='asam', batch_size=8, **folders)
  assert config.rho == 1.0
  problem = tasks.build(config)
  assert _count(problem) == 19_528_109
  for name, rate in (('cifar10_wrn', 0.1), ('mitbih_attention', 0.01)):
    recipe = tasks.resolve(name)
    assert (recipe.optimizer, recipe.base_optimizer) == ('momentum', 'momentum')
    schedule = optimizers.learning_rate(recipe, 10)
    rates = [float(schedule(10 * epoch)) for epoch in (0, 14, 15, 30, 40, 49)]
    expected = [rate, rate, rate * 0.2, rate * 0.04, rate * 0.008, rate * 0.008]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_own_images_and_a_smaller_network(folders):
  config = tasks.resolve(
    'cifar10_wrn', dataset='pets', model='depth=10,width=1', batch_size=2, **folders
  )
  problem = tasks.build(config)
  assert problem.scores.class_names == ('cat', 'dog', 'eel')
  assert (problem.train.num_examples, problem.test.num_examples) == (8, 4)
  assert (problem.model.depth, problem.model.num_classes) == (10, 3)
  batch = next(problem.train.batches(8).epoch(0))
  np.testing.assert_allclose(
    problem.model.pixel_mean, batch['inputs'].mean((0, 1, 2)), rtol=1e-6
  )
  augmented = problem.augment(jax.random.key(0), batch['inputs'])
  assert augmented.shape == (8, 32, 32, 3)


@pytest.mark.parametrize(
  ('name', 'model', 'dtype'),
  [
    ('cifar10_wrn', 'depth=10,width=1', 'float32'),
    pytest.param('cifar10_wrn', 'depth=10,width=1', 'bfloat16', marks=pytest.mark.slow),
    pytest.param('mitbih_attention', _SMALL, 'float32', marks=pytest.mark.slow),
    pytest.param('mitbih_attention', _SMALL, 'bfloat16', marks=pytest.mark.slow),
  ],
)
def test_a_run_of_each(folders, tmp_path, name, model, dtype):
  config = tasks.resolve(
    name,
    optimizer='asam',
    model=model,
    epochs=1,
    batch_size=20,
    dtype=dtype,
    **folders,
  )
  found = loop.train(config, tasks.build(config), tmp_path / 'run', num_devices=1)
  assert np.isfinite(found['final']['test_loss'])
  assert len(found['test_scores']['classes']) in (5, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'model'),
  [
    ('cifar10_wrn', 'depth=10,width=1'),
    ('mitbih_attention', 'features=8,head_features=(16,),hidden_features=8'),
  ],
)
def test_the_hessian_of_each_is_measured(folders, tmp_path, name, model):
  config = tasks.resolve(name, model=model, epochs=1, batch_size=20, **folders)
  loop.train(config, tasks.build(config), tmp_path, num_devices=1)
  flags = ['--top_k=1', '--tol=1e-1', '--num_matvecs=3', '--num_probes=1']
  flags += ['--trace_matvecs=2', '--landscape_points=3', '--one_batch_repeats=1']
  command = ['eval_hessian.py', '--nocache', f'--workdir={tmp_path}', *flags]
  assert cli.run(eval_hessian.main, command) == 0
  found = json.loads((tmp_path / 'hessian' / 'summary.json').read_text())
  assert found['lambda_max'] > 0
  assert (tmp_path / 'hessian' / 'landscape.png').is_file()


def test_a_damaged_image_is_one_sentence_and_loses_nothing(folders, tmp_path, capsys):
  path = shutil.copy(f'{folders["manual_dir"]}/pets.zip', tmp_path)
  command = ['train.py', '--nocache', '--task=cifar10_wrn', '--dataset=pets']
  command += [f'--manual_dir={tmp_path}', f'--data_dir={tmp_path / "prepared"}']
  command += ['--batch_size=99', f'--workdir={tmp_path / "run"}']
  run = lambda: cli.run(train.main, command, errors=(DataError,))
  assert run() == 2
  assert '--batch_size=99: the training split has 8' in capsys.readouterr().err
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('cat/broken.png', b'\x89PNG\r\n\x1a\n and no more')
  before = sorted((tmp_path / 'prepared').rglob('*'))
  assert run() == 2
  error = capsys.readouterr().err
  assert error.startswith('train.py: cat/broken.png in ') and error.count('\n') == 1
  assert sorted((tmp_path / 'prepared').rglob('*')) == before
  assert not (tmp_path / 'run').exists()


def test_a_batch_larger_than_the_set_is_refused(folders):
  config = tasks.resolve('mitbih_attention', batch_size=41, **folders)
  with pytest.raises(training.UsageError, match='--batch_size=41: .* 40 examples'):
    tasks.build(config)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('depth=17', 'there is no such network .*depth=17: must be 6 n'),
    ('norm=layer', "no such network .*norm='layer'"),
    ('deep=16', "has no 'deep'; choose from depth, width, norm"),
    ('num_classes=3', "has no 'num_classes'"),
    ('depth=ten', "depth is like 22, which 'ten' is not"),
    ('width=2.5', 'width is like 8, which 2.5 is not'),
    ('16', 'give name=value pairs'),
    ('depth=', 'give name=value pairs'),
    ('depth=__import__("os")', 'give name=value pairs'),
  ],
)
def test_impossible_changes_of_the_network_are_refused(folders, text, message):
  with pytest.raises(training.UsageError, match=message) as caught:
    tasks.build(tasks.resolve('cifar10_wrn', batch_size=8, model=text, **folders))
  assert f'--model={text}' in str(caught.value)


def test_changes_of_other_networks():
  import models

  model = models.MLP()
  inputs = np.zeros((1, 4), np.float32)
  assert networks.change(model, '', inputs) is model
  assert networks.change(model, 'features=(3,)', inputs).features == (3,)
  small = networks.change(models.Attention(), 'features=8,dropout_rate=0', inputs)
  assert small.dropout_rate == 0
