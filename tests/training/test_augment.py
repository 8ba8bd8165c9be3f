"""Augmentation as a part of the step: from its key, in training only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipelines import ArraySplit
from training import Config, loop, parallel, sharing, step

NUM_REPLICAS = 2


def _noise(key, inputs):
  return inputs + jax.random.normal(key, inputs.shape, inputs.dtype)


@pytest.mark.parametrize('groups', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_step_that_augments_equals_one_on_augmented_inputs(small, x64, groups):
  config = Config(
    optimizer='sam',
    base_optimizer='momentum',
    rho=0.2,
    batch_size=8,
    m_sharpness=2 if groups else 4,  # groups on each replica, or one
    hyperparameters={'num_ascent_steps': 1},
  )
  problem, shared = small.problem(dropout_rate=0.0), sharing.of(config, NUM_REPLICAS)
  make = lambda augment: step.Stepper(
    problem._replace(augment=augment), config, 2, shared, parallel.AXIS
  )
  state = make(None).init(0)._replace(step=jnp.int32(3))
  shards = (NUM_REPLICAS, groups) if groups else (NUM_REPLICAS,)
  batch = next(small.split(8, dtype=np.float64).batches(8, shards=shards).epoch(0))

  def run(augment, batch):
    mapped = jax.vmap(make(augment).train, (None, 0), axis_name=parallel.AXIS)
    return jax.jit(mapped)(state, batch)

  keys = [
    jax.random.fold_in(jax.random.fold_in(state.key, 3), replica)
    for replica in range(NUM_REPLICAS)
  ]
  inputs = [
    _noise(jax.random.split(key)[1], shard)
    for key, shard in zip(keys, batch['inputs'], strict=True)
  ]
  inside, metrics = run(_noise, batch)
  outside, expected = run(None, {**batch, 'inputs': np.stack(inputs)})
  for name in metrics:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-10)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
    (inside.params, inside.batch_stats),
    (outside.params, outside.batch_stats),
  )


@pytest.mark.slow
def test_evaluation_sees_the_inputs_as_they_are(small, tmp_path):
  split = small.split(12)
  batch = next(split.batches(12).epoch(0))
  blank = ArraySplit(np.zeros_like(batch['inputs']), batch['labels'])
  config = Config(
    optimizer='sgd', base_optimizer='sgd', epochs=1, batch_size=12, learning_rate=0.0
  )
  summaries = [
    loop.train(
      config,
      small.problem(train=train)._replace(augment=augment),
      tmp_path / name,
      num_devices=1,
    )
    for name, train, augment in (
      ('plain', split, None),
      ('blanked', split, lambda key, inputs: jnp.zeros_like(inputs)),
      ('blank', blank, None),
    )
  ]
  plain, blanked, blank = (summary['final']['train_loss'] for summary in summaries)
  assert plain != blank
  # The batch statistics are those of blank inputs; the inputs themselves are not.
  assert blanked not in (plain, blank)
