"""Accumulated steps: against the step of the whole batch, and written by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from input_pipelines import ArraySplit
from training import Config, UsageError, microbatches, parallel, sharing, step


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
