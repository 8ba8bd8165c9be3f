"""The step: on several devices, by hand, and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import Config, losses, optimizers, parallel, step

_CONFIGS = {
  'sgd': {'optimizer': 'sgd', 'base_optimizer': 'sgd'},
  'sam': {'optimizer': 'sam', 'rho': 0.2},
  'sam, synchronised': {'optimizer': 'sam', 'rho': 0.2, 'sync_perturbation': True},
  'sam, groups': {'optimizer': 'sam', 'rho': 0.2, 'm_sharpness': 2},
}


def _config(**fields):
  return Config(
    **{
      'base_optimizer': 'momentum',
      'learning_rate': 0.1,
      'schedule': 'constant',
      'batch_size': 16,
      'weight_decay': 0.01,
      **fields,
    }
  )


def _setup(small, config, num_replicas, dropout_rate=0.3):
  """A float64 state, the train step and the batches of one epoch."""
  model = small.Network(dropout_rate)
  tx = optimizers.build(config, 3, num_replicas)
  groups = optimizers.num_groups(config, num_replicas)
  state = step.init_state(model, tx, np.zeros((1, 5)), 0)
  params = jax.tree.map(lambda x: x.astype(jnp.float64), state.params)
  stats = jax.tree.map(lambda x: x.astype(jnp.float64), state.batch_stats)
  state = state._replace(params=params, batch_stats=stats, opt_state=tx.init(params))
  # 13 examples come out unequally, on 8 groups so that one is empty.
  batches = small.split(26, dtype=np.float64).batches(
    13, shards=(num_replicas, *([groups] if groups else [])), seed=0
  )
  return state, step.make_train_step(model, tx, config, groups), batches.epoch(0)


def _stacked(state, num_replicas):
  return jax.tree.map(lambda leaf: jnp.stack([leaf] * num_replicas), state)


def _data(tree):
  """Leaves as NumPy arrays, typed keys as their data."""
  return [
    np.asarray(jax.random.key_data(x))
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    else np.asarray(x)
    for x in jax.tree.leaves(tree)
  ]


@pytest.mark.parametrize(
  ('name', 'num_replicas'),
  [
    pytest.param('sgd', 2, marks=pytest.mark.slow),
    ('sam', 2),
    pytest.param('sam', 4, marks=pytest.mark.slow),
    pytest.param('sam, synchronised', 4, marks=pytest.mark.slow),
    ('sam, groups', 2),
  ],
)
def test_several_devices_equal_one_with_the_same_shards(name, num_replicas, small, x64):
  config = _config(**_CONFIGS[name])
  state, train_step, batches = _setup(small, config, num_replicas)
  replicas = parallel.DataParallel(num_replicas)
  mapped = replicas.map(train_step, donate=True)
  one_device = jax.jit(jax.vmap(train_step, axis_name=parallel.AXIS))
  expected = _stacked(state, num_replicas)
  got = replicas.replicate(state)
  for batch in batches:
    got, got_metrics = mapped(got, batch)
    expected, expected_metrics = one_device(expected, batch)
    for a, b in zip(_data(got_metrics), _data(expected_metrics), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
  for a, b in zip(_data(got), _data(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    # The whole state, records included, is the same on every replica.
    assert all((a[i] == a[0]).all() for i in range(num_replicas))


def _by_hand(small, config, state, batch):
  """SAM over momentum SGD with L2, each shard perturbed for itself, in plain loops."""
  model = small.Network(0.0)
  num_shards = len(batch['labels'])
  total = float(batch['weights'].sum())

  @jax.jit
  def value_and_grad(params, x, labels, weights):
    def loss(params):
      # Batch normalization sees the padding rows too; the loss does not.
      logits, new = model.apply(
        {'params': params, 'batch_stats': state.batch_stats},
        x,
        train=True,
        mutable=['batch_stats'],
      )
      targets = jnp.where(jax.nn.one_hot(labels, 3) == 1, 0.9, 0.05)
      kl = targets * (jnp.log(targets) - jax.nn.log_softmax(logits))
      return weights @ kl.sum(-1) * num_shards / total, new['batch_stats']

    return jax.value_and_grad(loss, has_aux=True)(params)

  params = jax.tree.map(np.asarray, state.params)
  values, norms, grads = [], [], []
  batch_stats = jax.tree.map(np.zeros_like, jax.tree.map(np.asarray, state.batch_stats))
  for shard in range(num_shards):
    examples = [batch[name][shard] for name in ('inputs', 'labels', 'weights')]
    (value, stats), grad = value_and_grad(params, *examples)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grad)))
    perturbed = jax.tree.map(
      lambda w, g, n=norm: w + config.rho * np.asarray(g) / n, params, grad
    )
    grads.append(value_and_grad(perturbed, *examples)[1])
    values.append(value)
    norms.append(norm)
    share = float(examples[2].sum()) / total
    batch_stats = jax.tree.map(
      lambda a, b, s=share: a + s * np.asarray(b), batch_stats, stats
    )
  descent = jax.tree.map(
    lambda w, *g: sum(map(np.asarray, g)) / num_shards + config.weight_decay * w,
    params,
    *grads,
  )
  # The first step of momentum is the gradient itself.
  params = jax.tree.map(lambda w, d: w - config.learning_rate * d, params, descent)
  return params, batch_stats, np.mean(values), np.mean(norms)


def test_a_step_equals_one_written_by_hand(small, x64):
  config = _config(**_CONFIGS['sam'])
  state, train_step, batches = _setup(small, config, 2, dropout_rate=0.0)
  batch = next(batches)
  stacked = _stacked(state, 2)
  got, metrics = jax.jit(jax.vmap(train_step, axis_name=parallel.AXIS))(stacked, batch)
  params, batch_stats, loss, norm = _by_hand(small, config, state, batch)
  for a, b in [(got.params, params), (got.batch_stats, batch_stats)]:
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-9, atol=1e-12), a, b
    )
  np.testing.assert_allclose(metrics['loss'][0], loss, rtol=1e-9)
  np.testing.assert_allclose(metrics['gradient_norm'][0], norm, rtol=1e-9)
  assert metrics['perturbed_loss'][0] > loss
  assert metrics['rho'][0] == 0.2
  np.testing.assert_allclose(metrics['learning_rate'][0], 0.1, rtol=1e-6)


def test_both_passes_drop_the_same_units(small, x64):
  # At a vanishing radius the perturbed pass repeats the clean one, masks included.
  config = _config(optimizer='sam', rho=1e-12)
  state, train_step, batches = _setup(small, config, 2, dropout_rate=0.5)
  stacked = _stacked(state, 2)
  run = jax.jit(jax.vmap(train_step, axis_name=parallel.AXIS))
  batch = next(batches)
  _, metrics = run(stacked, batch)
  np.testing.assert_allclose(metrics['perturbed_loss'], metrics['loss'], rtol=1e-9)
  # And other units in another step.
  _, later = run(stacked._replace(step=stacked.step + 1), batch)
  assert abs(later['loss'][0] - metrics['loss'][0]) > 1e-4


def test_evaluation_sums_over_the_split_whatever_the_shards(small, x64):
  config = _config(**_CONFIGS['sgd'])
  state, _, _ = _setup(small, config, 1)
  model, data = small.Network(), small.split(11, dtype=np.float64)
  eval_step = step.make_eval_step(model, config)
  run = jax.vmap(eval_step, in_axes=(None, 0), axis_name=parallel.AXIS)
  sums = [
    run((state.params, state.batch_stats), batch)
    for batch in data.batches(4, shards=(3,)).epoch(0)
  ]
  whole = next(data.batches(11).epoch(0))
  logits, _ = losses.apply(model, state.params, state.batch_stats, whole['inputs'])
  expected = losses.smoothed_kl(logits, whole['labels'], 0.1).sum()
  np.testing.assert_allclose(sum(s['loss'][0] for s in sums), expected, rtol=1e-9)
  assert sum(s['examples'][0] for s in sums) == 11
  correct = (logits.argmax(-1) == whole['labels']).sum()
  assert sum(s['correct'][0] for s in sums) == correct
