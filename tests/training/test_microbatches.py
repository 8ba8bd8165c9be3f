"""Accumulated steps: against the step of the whole batch, and written by hand."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from input_pipelines import ArraySplit
from training import (
  Classification,
  Config,
  Problem,
  UsageError,
  loop,
  metrics,
  microbatches,
  parallel,
  sharing,
  step,
)
from training import config as config_lib
from training.scores import smoothed_kl


class Plain(nn.Module):
  """Without batch normalization and dropout: what microbatches compute as a batch."""

  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(3)(nn.tanh(nn.Dense(8)(x)))


def _config(**fields):
  wanted = {'base_optimizer': 'momentum', 'batch_size': 12, 'learning_rate': 0.1}
  if fields.get('optimizer') == 'sgd':
    wanted['base_optimizer'] = 'sgd'
  return tasks.resolve('digits_mlp', **{**wanted, **fields})


def _jittered(key, inputs):
  """An augmentation: it is to see the whole batch, whatever the microbatches."""
  return inputs + 0.1 * jax.random.normal(key, inputs.shape, inputs.dtype)


def _run(problem, config, num_steps, dtype=jnp.float64, replicas=None):
  """The states and metrics of some steps, over epochs whose last batch is smaller."""
  count = replicas.num_replicas if replicas else 1
  shared = sharing.of(config, count)
  axes = () if replicas is None else (count,)
  batches = problem.train.batches(
    config.batch_size, shards=(*axes, *shared.axes), seed=0
  )
  axis = replicas.axis_name if replicas else None
  stepper = step.Stepper(problem, config, batches.steps_per_epoch, shared, axis)
  state = stepper.init(0, dtype=dtype)
  phase = True if config.optimizer == 'looksam' else None
  train = functools.partial(stepper.train, phase=phase)
  train = replicas.map(train) if replicas else jax.jit(train)
  state = replicas.replicate(state) if replicas else state
  metrics, number = [], 0
  while number < num_steps:
    for batch in batches.epoch(number // batches.steps_per_epoch):
      state, found = train(state, batch)
      metrics.append(found)
      number += 1
  return state, metrics


def _close(got, expected, tolerance=1e-12):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    if jnp.issubdtype(b.dtype, jnp.floating):
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
  ('fields', 'num'),
  [
    ({'optimizer': 'sgd'}, 3),
    ({'optimizer': 'sam', 'rho': 0.2}, 4),
    ({'optimizer': 'sam', 'rho': 0.2, 'm_sharpness': 4}, 2),
    ({'optimizer': 'looksam', 'rho': 0.2}, 3),
    ({'optimizer': 'esam', 'rho': 0.2}, 4),
    *(
      pytest.param(fields, num, marks=pytest.mark.slow)
      for fields, num in [
        ({'optimizer': 'asam', 'rho': 0.5}, 3),
        ({'optimizer': 'gsam', 'rho': 0.2}, 12),
        ({'optimizer': 'gsam', 'rho': 0.2, 'm_sharpness': 6}, 3),
        ({'optimizer': 'msam', 'rho': 0.2}, 2),
        ({'optimizer': 'trace_sam', 'rho': 0.01}, 2),
        ({'optimizer': 'decoupled_wsam', 'rho': 0.1}, 2),
      ]
    ),
  ],
)
def test_ten_steps_equal_those_of_the_whole_batch(fields, num, small, x64):
  """State and metrics, augmentation and the small last batch of an epoch included."""
  train = small.split(12 * 4 + 5, dtype=np.float64)  # The last of five holds 5.
  problem = small.problem(train)._replace(model=Plain(), augment=_jittered)
  expected, whole = _run(problem, _config(**fields), 10)
  got, parts = _run(problem, _config(**fields, grad_accum_steps=num), 10)
  _close(got, expected)
  _close(parts, whole)
  assert parts[0].keys() == whole[0].keys()
  assert [int(m['examples']) for m in parts] == [12, 12, 12, 12, 5] * 2


@pytest.mark.parametrize(
  'fields',
  [
    {'optimizer': 'sam', 'rho': 0.2},
    pytest.param(
      {'optimizer': 'sam', 'rho': 0.2, 'm_sharpness': 3, 'grad_accum_steps': 3},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_each_device_splits_its_own_share(fields, small, x64):
  """On two devices, in microbatches, against one device that takes whole batches."""
  train = small.split(12 + 7, dtype=np.float64)
  problem = small.problem(train)._replace(model=Plain())
  fields = {'grad_accum_steps': 2, **fields}
  replicas = parallel.DataParallel(2)
  got, parts = _run(problem, _config(**fields), 4, replicas=replicas)
  expected, whole = _run(problem, _config(**{**fields, 'grad_accum_steps': 1}), 4)
  if 'm_sharpness' in fields:  # On two devices the small batch is dealt otherwise.
    again = {**fields, 'grad_accum_steps': 1}
    mapped, whole = _run(problem, _config(**again), 4, replicas=replicas)
    expected, whole = (jax.tree.map(lambda x: x[0], x) for x in (mapped, whole))
  for tree in (got.params, got.opt_state):
    for leaf in jax.tree.leaves(tree):
      assert (np.asarray(leaf[0]) == np.asarray(leaf[1])).all()
  _close(jax.tree.map(lambda x: x[0], got.params), expected.params)
  _close(jax.tree.map(lambda x: x[0], parts), whole)


class Noisy(nn.Module):
  """Batch normalization and dropout, whose masks depend on the microbatch's key."""

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(6)(x))
    return nn.Dense(3)(nn.Dropout(0.4, deterministic=not train)(nn.tanh(x)))


@pytest.mark.slow
def test_a_step_equals_one_written_by_hand(small, x64):
  """SAM over a batch of 10 in 3 microbatches of 4, two of which hold a zero row.

  Each has its own batch statistics and its own dropout mask, the same in both passes.
  """
  problem = small.problem(small.split(10, dtype=np.float64))._replace(model=Noisy())
  config = _config(optimizer='sam', rho=0.2, base_optimizer='sgd', grad_accum_steps=3)
  stepper = step.Stepper(problem, config, 1, sharing.of(config))
  state = stepper.init(0, dtype=jnp.float64)
  batch = next(problem.train.batches(12, seed=0).epoch(0))
  got, metrics = jax.jit(stepper.train)(state, batch)
  key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 0)

  @jax.jit
  def value_and_grad(params, x, labels, weights, number):
    def loss(params):
      logits, new = Noisy().apply(
        {'params': params, 'batch_stats': state.batch_stats},
        x,
        train=True,
        rngs={'dropout': jax.random.fold_in(key, number)},
        mutable=['batch_stats'],
      )
      targets = jnp.where(jax.nn.one_hot(labels, 3) == 1, 0.9, 0.05)
      kl = targets * (jnp.log(targets) - jax.nn.log_softmax(logits))
      return weights @ kl.sum(-1) / 10, new['batch_stats']

    return jax.value_and_grad(loss, has_aux=True)(params)

  def whole(params):
    """Sums of losses and gradients, and the weighted mean of statistics."""
    found = []
    for number in range(3):
      rows = np.arange(number, 12, 3)
      pick = lambda a, r=rows: np.stack(
        [a[i] if i < 10 else np.zeros_like(a[0]) for i in r]
      )
      parts = [pick(batch[name]) for name in ('inputs', 'labels', 'weights')]
      found.append(
        (*value_and_grad(params, *parts, number), float(parts[2].sum()) / 10)
      )
    add = lambda *x: sum(x)
    value = sum(v for (v, _), _, _ in found)
    stats = [jax.tree.map(lambda x, s=s: s * x, new) for (_, new), _, s in found]
    return (
      value,
      jax.tree.map(add, *(g for _, g, _ in found)),
      jax.tree.map(add, *stats),
    )

  value, clean, stats = whole(state.params)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(clean)))
  at = jax.tree.map(lambda w, g: w + 0.2 * g / norm, state.params, clean)
  perturbed, grads, _ = whole(at)
  params = jax.tree.map(lambda w, g: w - 0.1 * g, state.params, grads)
  _close(got.params, params, 1e-7)  # The learning rate is of float32.
  _close(got.batch_stats, stats, 1e-10)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-10)
  np.testing.assert_allclose(metrics['perturbed_loss'], perturbed, rtol=1e-6)
  np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-6)


def test_without_microbatches_a_step_is_what_it_was(small):
  """One part has the key of the batch itself: no fold of a number into it."""
  problem = small.problem(dropout_rate=0.5)
  config = _config(optimizer='sam', rho=0.2, batch_size=22)
  assert sharing.of(config).microbatches == 1
  stepper = step.Stepper(problem, config, 1, sharing.of(config))
  state = stepper.init(0)
  batch = next(problem.train.batches(22, seed=0).epoch(0))
  _, metrics = jax.jit(stepper.train)(state, batch)
  logits, _ = problem.model.apply(
    {'params': state.params, 'batch_stats': state.batch_stats},
    batch['inputs'],
    train=True,
    rngs={'dropout': jax.random.fold_in(jax.random.fold_in(state.key, 0), 0)},
    mutable=['batch_stats'],
  )
  expected = problem.example_losses(logits, batch).mean()
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)


def test_temporaries_are_those_of_the_small_batch():
  """The step of 256 in four parts needs less than half of what it needs at once."""
  rng = np.random.default_rng(0)
  data = ArraySplit(rng.normal(size=(256, 8)).astype(np.float32), np.arange(256) % 3)

  class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
      for _ in range(6):
        x = nn.tanh(nn.Dense(32)(x))
      return nn.Dense(3)(x)

  inputs = np.zeros((1, 8), np.float32)
  problem = Problem(Deep(), data, data, smoothed_kl(0.1), Classification(3), inputs)

  def temporaries(size, num):
    config = _config(optimizer='sam', rho=0.05, batch_size=size, grad_accum_steps=num)
    stepper = step.Stepper(problem, config, 1, sharing.of(config))
    state = stepper.init(0)
    batch = next(problem.train.batches(size, seed=0).epoch(0))
    compiled = jax.jit(stepper.train).lower(state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large, parts = temporaries(64, 1), temporaries(256, 1), temporaries(256, 4)
  assert small < parts < (small + large) / 2, (small, parts, large)


def test_a_run_writes_the_lines_of_the_whole_batch(small, tmp_path):
  """The same steps and epochs, and the same numbers but for rounding."""
  train = small.split(12 * 2 + 5)
  problem = small.problem(train)._replace(model=Plain())
  found = []
  for num in (1, 4):
    config = _config(optimizer='sam', epochs=2, log_every=1, grad_accum_steps=num)
    folder = tmp_path / str(num)
    summary = loop.train(config, problem, folder, num_devices=1, timing=False)
    assert summary['grad_accum_steps'] == num
    found.append(metrics.read(folder))
  assert len(found[0]) == len(found[1]) == 2 * (3 + 2)
  for a, b in zip(*found, strict=True):
    assert a.keys() == b.keys()
    for name, value in a.items():
      assert b[name] == (
        pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
      )


@pytest.mark.parametrize(
  ('fields', 'devices', 'words'),
  [
    ({'grad_accum_steps': 5}, 1, '--grad_accum_steps=5: must divide --batch_size=12.'),
    ({'grad_accum_steps': 0}, 1, '--grad_accum_steps=0: must be at least 1.'),
    ({'grad_accum_steps': 4}, 2, 'the 6 examples of one of 2 devices'),
    (
      {'grad_accum_steps': 4, 'optimizer': 'sam', 'm_sharpness': 6},
      1,
      'the 6 examples of a group of --m_sharpness',
    ),
  ],
)
def test_what_does_not_divide_is_named(fields, devices, words):
  with pytest.raises(UsageError) as caught:
    sharing.of(_config(**{'optimizer': 'sgd', **fields}), devices)
  assert words in str(caught.value)


def test_packed_graphs_are_refused(small):
  """Arrays of other lengths than that of the graphs: none can be split by rows."""
  graphs = {'nodes': np.zeros((9, 2)), 'n_node': np.zeros(2, np.int32)}
  problem = small.problem()._replace(example_inputs=graphs)
  with pytest.raises(UsageError, match='--grad_accum_steps=2: .* cannot be split'):
    microbatches.check(problem, 2)
  microbatches.check(problem, 1)
  rows = {'image': np.zeros((1, 4)), 'text': np.zeros((1, 3, 2))}
  microbatches.check(problem._replace(example_inputs=rows), 2)


def test_a_run_of_before_has_one_part(tmp_path):
  """A config.json without the field is read, and its run is that of the default."""
  config_lib.save(Config(), tmp_path)
  stored = json.loads((tmp_path / 'config.json').read_text())
  del stored['config']['grad_accum_steps']
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  assert config_lib.load(tmp_path) == Config()
  with pytest.raises(UsageError, match='grad_accum_steps is 1 there and 2 here'):
    config_lib.check(Config(grad_accum_steps=2), tmp_path)
