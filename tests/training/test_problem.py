"""The label-smoothed loss against closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import Classification, Problem
from training import problem as problem_lib
from training.scores import smoothed_kl


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
def test_smoothed_kl_is_the_kl_divergence(smoothing, x64):
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
  expected = []
  for row, label in zip(logits, labels, strict=True):
    p = np.exp(row) / np.exp(row).sum()
    # The paper's: smoothing / (C - 1), not / C, on each wrong class.
    target = np.full(4, smoothing / 3)
    target[label] = 1 - smoothing
    expected.append(
      sum(t * np.log(t / q) for t, q in zip(target, p, strict=True) if t > 0)
    )
  got = smoothed_kl(smoothing)(jnp.asarray(logits), {'labels': jnp.asarray(labels)})
  np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_gradient_of_the_smoothed_loss_is_probabilities_minus_targets(x64):
  logits = jnp.array([[1.0, -2.0, 0.5]])
  batch = {'labels': jnp.array([2])}
  grads = jax.grad(lambda x: smoothed_kl(0.0)(x, batch).sum())(logits)
  expected = np.exp(logits) / np.exp(logits).sum() - np.array([[0, 0, 1]])
  np.testing.assert_allclose(grads, expected, atol=1e-14)


class _Linear(nn.Module):
  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(3)(x)


def _batch(weights):
  rng = np.random.default_rng(1)
  return {
    'inputs': rng.normal(size=(4, 5)).astype(np.float32),
    'labels': np.array([0, 1, 2, 0], np.int32),
    'weights': np.array(weights, np.float32),
  }


def _mean(model, dtype='float32'):
  problem = Problem(model, None, None, smoothed_kl(0.1), Classification(3), None)
  return lambda params, batch: problem_lib.loss(
    problem, params, {}, batch, dtype=dtype
  )[0]


def test_padding_changes_nothing():
  model = _Linear()
  params = model.init(jax.random.key(0), jnp.zeros((1, 5)))['params']
  mean = _mean(model)
  padded = _batch([1, 1, 0, 0])
  short = {name: leaf[:2] for name, leaf in padded.items()}
  np.testing.assert_allclose(mean(params, padded), mean(params, short), rtol=1e-6)
  assert problem_lib.num_examples(padded) == 2


def test_bfloat16_computes_in_bfloat16_and_differentiates_in_float32():
  model = _Linear()
  params = model.init(jax.random.key(0), jnp.zeros((1, 5)))['params']
  batch = _batch([1, 1, 1, 1])
  full = _mean(model)
  half = _mean(model, 'bfloat16')
  assert half(params, batch).dtype == jnp.float32
  assert full(params, batch) != half(params, batch)
  np.testing.assert_allclose(full(params, batch), half(params, batch), rtol=0.05)
  assert jax.grad(half)(params, batch)['Dense_0']['kernel'].dtype == jnp.float32
