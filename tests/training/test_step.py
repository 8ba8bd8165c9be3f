"""The step: on several devices, by hand, and what it reports."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from training import Config, optimizers, parallel, sharing, step
from training import problem as problem_lib
from training.scores import smoothed_kl

_CONFIGS = {
  'sgd': {'optimizer': 'sgd', 'base_optimizer': 'sgd'},
  'sam': {'optimizer': 'sam', 'rho': 0.2},
  'sam, a group a replica': {'optimizer': 'sam', 'rho': 0.2, 'm_sharpness': 8},
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
  """A float64 state, the train step of a replica and the batches of one epoch."""
  shared = sharing.of(config, num_replicas)
  problem = small.problem(dropout_rate=dropout_rate)
  stepper = step.Stepper(problem, config, 3, shared, parallel.AXIS)
  # 13 examples come out unequally, on 8 groups so that one is empty.
  batches = small.split(26, dtype=np.float64).batches(
    13, shards=(num_replicas, *shared.axes), seed=0
  )
  return stepper.init(0, dtype=jnp.float64), stepper.train, batches.epoch(0)


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
    pytest.param('sam, a group a replica', 2, marks=pytest.mark.slow),
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
  config = _config(**_CONFIGS['sam, a group a replica'])
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
  problem, data = small.problem(), small.split(11, dtype=np.float64)
  stepper = step.Stepper(problem, config, 3, axis_name=parallel.AXIS)
  state = stepper.init(0, dtype=jnp.float64)
  run = jax.vmap(stepper.evaluate, in_axes=(None, 0), axis_name=parallel.AXIS)
  sums = [
    run((state.params, state.batch_stats), batch)
    for batch in data.batches(4, shards=(3,)).epoch(0)
  ]
  whole = next(data.batches(11).epoch(0))
  logits, _ = problem_lib.outputs(
    problem.model, state.params, state.batch_stats, whole['inputs']
  )
  expected = smoothed_kl(0.1)(logits, whole).sum()
  np.testing.assert_allclose(sum(s['loss'][0] for s in sums), expected, rtol=1e-9)
  assert sum(s['examples'][0] for s in sums) == 11
  correct = (logits.argmax(-1) == whole['labels']).sum()
  assert sum(s['accuracy'][0] for s in sums) == correct
  confusion = sum(s['totals']['confusion'][0] for s in sums)
  assert (confusion.sum(), np.trace(confusion)) == (11, correct)


def _without_batch_norm(small):
  """What several devices compute as one does: no statistics of a shard's own."""
  return small.problem(train=small.split(26, dtype=np.float64))._replace(
    model=Plain(), augment=None
  )


class Plain(nn.Module):
  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(3)(nn.tanh(nn.Dense(8)(x)))


def _run(run, state, batches):
  metrics = []
  for batch in batches:
    state, found = run(state, batch)
    metrics.append(found)
  return state, metrics


@pytest.mark.parametrize(
  'method',
  [
    'sam',
    'gsam',
    'looksam',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('sgd', 'asam', 'friendly_sam', 'frob_sam', 'decoupled_wsam', 'msam')
    ),
  ],
)
def test_the_number_of_devices_changes_nothing(method, small, x64):
  """The whole batch shares its perturbation, on one device, on four, on a mesh."""
  config = tasks.resolve(
    'digits_mlp',
    optimizer=method,
    base_optimizer='sgd' if method == 'sgd' else 'momentum',
    batch_size=13,
    learning_rate=0.1,
  )
  problem = _without_batch_norm(small)
  phase = True if method == 'looksam' else None
  make = lambda shards: problem.train.batches(13, shards=shards, seed=0).epoch(0)
  one = step.Stepper(problem, config, 2)
  start = one.init(0, dtype=jnp.float64)
  whole = jax.jit(functools.partial(one.train, phase=phase))
  expected, facts = _run(whole, start, make(()))

  replicas = parallel.DataParallel(4)
  four = step.Stepper(problem, config, 2, sharing.of(config, 4), parallel.AXIS)
  mapped = replicas.map(functools.partial(four.train, phase=phase))
  got, mapped_facts = _run(mapped, replicas.replicate(start), make((4,)))

  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  # 16 rows, three of them empty: a mesh wants equal shares.
  padded = (
    jax.tree.map(lambda x: jax.device_put(x.reshape(16, *x.shape[2:]), rows), batch)
    for batch in make((4,))
  )
  on_mesh, _ = _run(whole, start, padded)

  for a, b, c in zip(*map(_data, (expected, got, on_mesh)), strict=True):
    assert all((b[i] == b[0]).all() for i in range(4))
    np.testing.assert_allclose(b[0], a, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(c, a, rtol=1e-10, atol=1e-12)
  for a, b in zip(facts, mapped_facts, strict=True):
    assert set(a) == set(b)
    for name in a:
      np.testing.assert_allclose(b[name][0], a[name], rtol=1e-10)


@pytest.mark.parametrize(
  'method', ['sam', pytest.param('decoupled_wsam', marks=pytest.mark.slow)]
)
def test_a_population_is_vmap_over_states(method, small, x64):
  """Members differ in radius, rate, decay and seed; each equals its own single run."""
  resolve = lambda **fields: tasks.resolve(
    'digits_mlp', optimizer=method, base_optimizer='momentum', batch_size=13, **fields
  )
  problem = _without_batch_norm(small)
  members = [
    {'rho': 0.05, 'learning_rate_scale': 1.0, 'weight_decay': 1e-3},
    {'rho': 0.2, 'learning_rate_scale': 0.5, 'weight_decay': 1e-2},
    {'rho': 0.0, 'learning_rate_scale': 2.0, 'weight_decay': 0.0},
  ]
  stepper = step.Stepper(problem, resolve(learning_rate=0.1), 2)
  stacked = {name: jnp.array([m[name] for m in members]) for name in members[0]}
  init = lambda seed, hyperparams: stepper.init(seed, hyperparams, jnp.float64)
  states = jax.jit(jax.vmap(init))(jnp.arange(3), stacked)
  assert set(states.hyperparams) == set(optimizers.VARIABLE)
  batches = list(problem.train.batches(13, seed=0).epoch(0)) * 3
  got, metrics = _run(jax.jit(jax.vmap(stepper.train, (0, None))), states, batches)
  for number, member in enumerate(members):
    config = resolve(
      rho=member['rho'],
      learning_rate=0.1 * member['learning_rate_scale'],
      weight_decay=member['weight_decay'],
    )
    single = step.Stepper(problem, config, 2)
    alone, facts = _run(
      jax.jit(single.train), single.init(number, dtype=jnp.float64), batches
    )
    jax.tree.map(
      lambda a, b, n=number: np.testing.assert_allclose(
        a[n], b, rtol=1e-10, atol=1e-12
      ),
      got.params,
      alone.params,
    )
    for ours, theirs in zip(metrics, facts, strict=True):
      # At a radius of 0 a single run takes no second gradient, and tells no loss there.
      told = set(theirs) - (set() if member['rho'] else {'perturbed_loss'})
      for name in told:
        np.testing.assert_allclose(ours[name][number], theirs[name], rtol=1e-10)
