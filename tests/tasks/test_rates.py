"""Learning rates of base optimizers, and networks that are changed by name."""

import types

import pytest

import tasks
from tasks import networks
from training import UsageError, cli, optimizers, plugins

_OWN = """
import training
RECIPE = training.Config(
  optimizer='{0}', base_optimizer='{0}', learning_rate=0.2, momentum=0.9
)
build = None
"""


def _rate(task, base, **fields):
  return tasks.resolve(task, optimizer=base, **fields).learning_rate


@pytest.mark.parametrize('task', tasks.names())
def test_every_recipe_has_a_rate_for_each_base_optimizer(task):
  """Of the order that each optimizer is used with, whatever the recipe's own is."""
  fields = {'dataset': 'PROTEINS'} if task == 'tudataset_gcn' else {}
  recipe = tasks.load(task).RECIPE
  for base in optimizers.BASES:
    rate = _rate(task, base, **fields)
    low, high = (5e-4, 0.02) if base in ('adam', 'adamw') else (9e-4, 1)
    high *= 1.001 * max(1, recipe.batch_size / 256)  # Rates grow with large batches.
    assert low <= rate <= high, base
    over = tasks.resolve(task, optimizer='sam', base_optimizer=base, **fields)
    assert over.learning_rate == rate
    assert _rate(task, base, learning_rate=0.123, **fields) == 0.123
  assert _rate(task, recipe.base_optimizer, **fields) == recipe.learning_rate


def _own(folder, base):
  path = folder / f'own_{base}.py'
  path.write_text(_OWN.format(base))
  return str(path)


def test_a_recipe_of_ones_own_without_rates(tmp_path):
  """Rates of the same kind are converted: one long step is 1 / (1 - .9) short ones."""
  sgd, adam = _own(tmp_path, 'sgd'), _own(tmp_path, 'adam')
  assert _rate(sgd, 'momentum') == pytest.approx(0.02)
  assert _rate(sgd, 'nesterov', momentum=0.5) == pytest.approx(0.1)
  assert _rate(adam, 'adamw') == 0.2
  assert _rate(sgd, 'msam') == pytest.approx(0.02)
  for task, base in ((sgd, 'adam'), (adam, 'sgd')):
    with pytest.raises(UsageError, match=f'no learning rate for .*={base}:'):
      tasks.resolve(task, optimizer='sam', base_optimizer=base)
    assert _rate(task, base, learning_rate=0.3) == 0.3
  with pytest.raises(UsageError, match='--base_optimizer=foo: choose one of'):
    tasks.resolve(sgd, optimizer='sam', base_optimizer='foo')


@pytest.mark.parametrize('task', tasks.names())
def test_the_network_is_checked_before_the_data_are_read(task, monkeypatch):
  def build(config):
    raise AssertionError('the data were read')

  module = tasks.load(task)
  monkeypatch.setattr(module, 'build', build)
  known = networks.attributes(module.NETWORK)
  with pytest.raises(
    UsageError, match=f"has no 'deep'; choose from {', '.join(known)}"
  ):
    tasks.resolve(task, model='deep=16')
  # What the help says is what may be given.
  text = networks.described(module.NETWORK)
  assert networks.parse(module.NETWORK, text) == known
  flags = cli.Flags()
  flags.define_config(recipe=module.RECIPE, keys=text)
  assert f'{next(iter(known))}=' in '\n'.join(flags._lines)


def test_a_task_without_a_declared_network_is_checked_when_it_is_built(tmp_path):
  path = _own(tmp_path, 'sgd')
  assert tasks.resolve(path, model='width=3').model == 'width=3'
  assert isinstance(plugins.load('task', path), types.ModuleType)


def test_a_folder_of_ones_own_means_the_same_from_everywhere(tmp_path, monkeypatch):
  (tmp_path / 'images' / 'pets').mkdir(parents=True)
  monkeypatch.chdir(tmp_path / 'images')
  for path in ('./pets', '../images/pets/', str(tmp_path / 'images' / 'pets')):
    config = tasks.resolve('cifar10_wrn', dataset=path)
    assert config.dataset == str((tmp_path / 'images' / 'pets').resolve())
  # Names are left as they are, and so is what is no folder.
  for name in ('pets', 'owner/pets'):
    assert tasks.resolve('cifar10_wrn', dataset=name).dataset == name


def test_values_of_attributes():
  import models

  convolution = models.convolution.Conv(8)
  assert networks.parse(convolution, 'use_bias=True') == {'use_bias': True}
  for text, words in (
    ('use_bias=1', 'use_bias is like False, which 1 is not'),
    ('features=True', 'features is like 8, which True is not'),
    ('size=3,size=5', 'has size twice: give one value'),
  ):
    with pytest.raises(UsageError, match=words):
      networks.parse(convolution, text)
  assert 'kernel_init' not in networks.described(convolution)
