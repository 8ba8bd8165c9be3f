"""What a task's recipe becomes under overrides."""

import pytest

import tasks
from training import UsageError


def test_momentum_sam_brings_the_momentum_it_follows():
  config = tasks.resolve('digits_mlp', optimizer='msam')
  plain = tasks.resolve('digits_mlp')
  assert config.base_optimizer == 'momentum'
  assert config.learning_rate == pytest.approx(0.1 * plain.learning_rate)
  with pytest.raises(UsageError, match='follows a momentum buffer'):
    tasks.resolve('digits_mlp', optimizer='msam', base_optimizer='sgd')


def test_a_period_that_never_comes_is_refused():
  with pytest.raises(
    UsageError, match='perturb_from=5.0: must be less than --epochs=3'
  ):
    tasks.resolve('digits_mlp', optimizer='sam', epochs=3, perturb_from=5.0)
  with pytest.raises(UsageError, match='period of its own'):
    tasks.resolve('digits_mlp', optimizer='looksam', perturb_every=2)


def test_a_scale_changes_the_recipe_and_flags_change_the_scale():
  published = tasks.resolve('eos_mnist_mlp')
  assert (published.learning_rate, published.batch_size) == (0.01, 60_000)
  small = tasks.resolve('eos_mnist_mlp', scale='small', epochs=7)
  assert (small.learning_rate, small.batch_size, small.epochs) == (0.4, 1000, 7)
  assert small.scale == 'small'
  assert small.m_sharpness == 1000
  with pytest.raises(UsageError, match='scale=tiny: choose one of small'):
    tasks.resolve('eos_mnist_mlp', scale='tiny')
  with pytest.raises(UsageError, match='scale=small: --task=digits_mlp has one size'):
    tasks.resolve('digits_mlp', scale='small')
