"""Chains and schedules against steps written by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from training import Config, UsageError, methods, optimizers, sharing
from training.parallel import AXIS

_STEPS = 10


def _rates(**fields):
  schedule = optimizers.learning_rate(Config(learning_rate=1.0, **fields), _STEPS)
  counts = jnp.arange(fields['epochs'] * _STEPS)
  return np.asarray(jax.vmap(schedule)(counts)) * np.ones(len(counts))


def test_step_schedule_drops_at_30_60_and_80_percent():
  rates = _rates(schedule='step', epochs=200)
  for epoch, factor in [
    (0, 1),
    (59, 1),
    (60, 0.2),
    (119, 0.2),
    (120, 0.04),
    (159, 0.04),
    (160, 0.008),
    (199, 0.008),
  ]:
    first, last = rates[epoch * _STEPS], rates[epoch * _STEPS + _STEPS - 1]
    np.testing.assert_allclose([first, last], factor, rtol=1e-6)


@pytest.mark.parametrize('epochs', [1, 2, 3, 5, 7])
def test_step_schedule_of_few_epochs_drops_by_a_fifth_each_time(epochs):
  rates = _rates(schedule='step', epochs=epochs)
  at = [-(-epochs * tenths // 10) for tenths in (3, 6, 8)]
  expected = [0.2 ** sum(epoch >= b for b in at) for epoch in range(epochs)]
  np.testing.assert_allclose(rates[::_STEPS], expected, rtol=1e-6)


def test_cosine_schedule():
  rates = _rates(schedule='cosine', epochs=8)
  expected = (1 + np.cos(np.pi * np.arange(80) / 80)) / 2
  np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.parametrize('schedule', ['step', 'cosine', 'constant'])
def test_warmup_is_linear_and_then_the_schedule_itself(schedule):
  plain = _rates(schedule=schedule, epochs=8)
  warm = _rates(schedule=schedule, epochs=8, warmup_epochs=1.5)
  np.testing.assert_allclose(warm[:15], plain[:15] * np.arange(1, 16) / 15, rtol=1e-5)
  np.testing.assert_array_equal(warm[15:], plain[15:])


@pytest.mark.parametrize('warmup', [0, 15])
def test_linear_schedule(warmup):
  rates = _rates(schedule='linear', epochs=8, warmup_epochs=warmup / _STEPS)
  steps = np.arange(80)
  expected = 1 - 0.99 * (steps - warmup) / (80 - warmup)
  expected[:warmup] = (steps[:warmup] + 1) / warmup if warmup else 1
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def _one_update(config, params, gradient):
  tx = optimizers.build(config, _STEPS)

  def run(params):
    state = tx.init(params)
    updates, state = tx.update(
      gradient, state, params, value_and_grad_fn=lambda w: (0.0, gradient)
    )
    return updates, state

  stacked = jax.tree.map(lambda x: x[None], params)
  updates, state = jax.vmap(run, axis_name=AXIS)(stacked)
  return jax.tree.map(lambda x: np.asarray(x[0]), (updates, state))


@pytest.mark.parametrize('optimizer', ['sgd', 'sam'])
def test_weight_decay_is_l2_on_every_parameter(optimizer):
  config = Config(
    optimizer=optimizer,
    hyperparameters=methods.resolve(optimizer),
    base_optimizer='sgd',
    rho=0.1,
    weight_decay=0.5,
    learning_rate=0.1,
    schedule='constant',
  )
  params = {'kernel': jnp.full((2, 2), 3.0), 'bias': jnp.full((2,), -1.0)}
  gradient = {'kernel': jnp.full((2, 2), 2.0), 'bias': jnp.zeros((2,))}
  updates, state = _one_update(config, params, gradient)
  np.testing.assert_allclose(updates['kernel'], -0.1 * (2 + 0.5 * 3), rtol=1e-6)
  np.testing.assert_allclose(updates['bias'], -0.1 * 0.5 * -1, rtol=1e-6)
  np.testing.assert_allclose(optax.tree.get(state, 'gradient_norm'), 4.0, rtol=1e-6)


def test_adam_takes_l2_into_its_moments_and_adamw_does_not():
  config = Config(
    optimizer='adam',
    base_optimizer='adam',
    weight_decay=0.5,
    learning_rate=0.1,
    schedule='constant',
  )
  params, gradient = {'w': jnp.full((3,), 4.0)}, {'w': jnp.full((3,), -1.0)}
  # The first Adam step is the sign of what it is given: -1 + .5 * 4 > 0.
  updates, _ = _one_update(config, params, gradient)
  np.testing.assert_allclose(updates['w'], -0.1, rtol=1e-5)
  decoupled = dataclasses.replace(config, optimizer='adamw', base_optimizer='adamw')
  updates, _ = _one_update(decoupled, params, gradient)
  np.testing.assert_allclose(updates['w'], -0.1 * (-1 + 0.5 * 4), rtol=1e-5)


def test_clipping_limits_the_gradient_and_not_the_decay():
  config = Config(
    optimizer='sgd',
    base_optimizer='sgd',
    clip_norm=1.0,
    weight_decay=0.5,
    learning_rate=1.0,
    schedule='constant',
  )
  params, gradient = {'w': jnp.array([2.0, 0.0])}, {'w': jnp.array([0.0, 10.0])}
  updates, _ = _one_update(config, params, gradient)
  np.testing.assert_allclose(updates['w'], [-1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize('base', list(optimizers.BASES))
@pytest.mark.parametrize('method', [None, 'sam', 'asam', 'usam'])
def test_every_chain_reports_its_rate_and_norm(method, base):
  config = Config(
    optimizer=method or base,
    base_optimizer=base,
    rho=0.1 if method else None,
    hyperparameters=methods.resolve(method) if method else {},
    learning_rate=0.25,
    warmup_epochs=0.2,
    momentum=0.5,
  )
  optimizers.validate(config)
  params, gradient = {'w': jnp.ones((2, 2))}, {'w': jnp.full((2, 2), 2.0)}
  updates, state = _one_update(config, params, gradient)
  # Two steps of warm-up: the first has half the rate.
  rate = optax.tree.get(
    state, 'learning_rate', filtering=lambda _, x: isinstance(x, np.ndarray)
  )
  np.testing.assert_allclose(rate, 0.125)
  np.testing.assert_allclose(optax.tree.get(state, 'gradient_norm'), 4.0, rtol=1e-6)
  assert np.isfinite(updates['w']).all() and (updates['w'] < 0).all()


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'optimizer': 'foo'}, 'optimizer=foo: choose one of sam'),
    ({'optimizer': 'sam', 'base_optimizer': 'foo'}, 'base_optimizer=foo'),
    ({'optimizer': 'sgd', 'base_optimizer': 'adam'}, 'base_optimizer=adam contra'),
    ({'rho': 0.1}, 'rho=0.1 has no effect with --optimizer=sgd'),
    ({'m_sharpness': 8}, 'm_sharpness=8 has no effect'),
    ({'optimizer': 'sam', 'm_sharpness': 24}, 'must divide --batch_size=64'),
    ({'optimizer': 'sam', 'm_sharpness': -8}, 'must divide'),
    ({'optimizer': 'looksam', 'looksam_every': 0}, 'looksam_every=0: .*at least 1'),
    ({'optimizer': 'esam', 'esam_beta': 1.5}, 'esam_beta=1.5'),
    ({'optimizer': 'asam', 'adaptive_rule': 'some'}, 'adaptive_rule=some'),
    ({'optimizer': 'frob_sam', 'num_probes': 1}, 'num_probes=1: .*at least 2'),
    ({'optimizer': 'gsam', 'gsam_rho_min': -1.0}, 'gsam_rho_min=-1.0'),
    ({'optimizer': 'gsam', 'rho': 0.1, 'gsam_rho_min': 0.2}, 'rho_max must be'),
  ],
)
def test_bad_optimizers_are_refused(fields, words):
  fields = {'base_optimizer': 'sgd', 'batch_size': 64, **fields}
  with pytest.raises(UsageError, match=words):
    tasks.resolve('digits_mlp', **fields)


@pytest.mark.parametrize(
  ('count', 'num_replicas', 'expected'),
  [
    (None, 1, (True, 0)),
    (64, 1, (True, 0)),
    (64, 4, (True, 0)),
    (None, 3, (True, 0)),  # 64 examples on 3 devices: unequal shares of one group
    (8, 1, (False, 8)),
    (8, 4, (False, 2)),
    (16, 4, (False, 0)),  # each device's share is one group
  ],
)
def test_who_shares_a_perturbation(count, num_replicas, expected):
  config = Config(optimizer='sam', batch_size=64, m_sharpness=count)
  found = sharing.of(config, num_replicas)
  assert (found.whole, found.groups) == expected


@pytest.mark.parametrize(('count', 'num_replicas'), [(32, 4), (16, 3), (16, 8)])
def test_a_group_over_some_devices_but_not_all_is_refused(count, num_replicas):
  config = Config(optimizer='sam', batch_size=64, m_sharpness=count)
  with pytest.raises(UsageError, match=f'm_sharpness={count} does not fit'):
    sharing.of(config, num_replicas)
