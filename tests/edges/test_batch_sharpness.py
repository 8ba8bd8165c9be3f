"""Batch sharpness against dense Hessians in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from sam_jax import edges


def loss(w, x):
  return jnp.mean(jnp.tanh(x @ w['a']) ** 2) + jnp.mean((x @ w['a']) * w['b']) ** 2


def problem():
  keys = jax.random.split(jax.random.key(0), 3)
  w = {'a': jax.random.normal(keys[0], (3,)), 'b': jax.random.normal(keys[1], ())}
  return w, list(jax.random.normal(keys[2], (5, 4, 3)))


def quotients(w, batches, directions):
  """Rayleigh quotients of dense Hessians of a straight-line implementation."""
  flat = lambda w: jnp.append(w['a'], w['b'])
  values = []
  for batch, d in zip(batches, directions, strict=True):
    at = lambda v, batch=batch: loss({'a': v[:3], 'b': v[3]}, batch)
    hessian = np.asarray(jax.hessian(at)(flat(w)))
    d = np.asarray(flat(d))
    values.append(d @ hessian @ d / (d @ d))
  return np.array(values)


def check(found, values):
  np.testing.assert_allclose(found.value, values.mean(), rtol=1e-10)
  error = math.sqrt(values.var(ddof=1) / len(values))
  np.testing.assert_allclose(found.standard_error, error, rtol=1e-10)
  assert found.num_batches == len(values)


def test_along_the_gradient(x64):
  w, batches = problem()
  directions = [jax.grad(loss)(w, batch) for batch in batches]
  check(edges.batch_sharpness(loss, w, batches), quotients(w, batches, directions))


@pytest.mark.parametrize('normalized', [True, False])
def test_along_the_steps_of_sam(x64, normalized):
  w, batches = problem()
  tx = sam_jax.sam(0.3) if normalized else sam_jax.usam(0.3)
  directions = []
  for batch in batches:
    gradient = lambda p, batch=batch: jax.grad(loss)(p, batch)
    directions.append(tx.update(gradient(w), tx.init(w), w, grad_fn=gradient)[0])
  found = edges.batch_sharpness(
    loss,
    w,
    batches,
    direction=edges.perturbed_direction(loss, 0.3, normalized=normalized),
  )
  check(found, quotients(w, batches, directions))
  assert edges.perturbed_direction(loss, 0.3) == edges.perturbed_direction(loss, 0.3)


def test_batches_without_a_gradient_are_left_out():
  square = lambda w, x: 0.5 * jnp.mean(x * w**2)
  batches = [jnp.array([1.0, 3.0]), jnp.zeros(2), jnp.array([4.0, 4.0])]
  found = edges.batch_sharpness(square, jnp.array(1.0), batches)
  assert found == (3.0, 1.0, 2)
  one = edges.batch_sharpness(square, jnp.array(1.0), batches[:2])
  assert one.value == 2 and math.isnan(one.standard_error) and one.num_batches == 1
  none = edges.batch_sharpness(square, jnp.array(1.0), batches[1:2])
  assert math.isnan(none.value) and none.num_batches == 0


@pytest.mark.parametrize('size', [1e-30, 1e25])
def test_gradients_of_any_size(size):
  curved = lambda w, x: 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * w**2) * jnp.mean(x)
  found = edges.batch_sharpness(curved, jnp.array([size, size]), [jnp.ones(2)])
  np.testing.assert_allclose(found.value, (1 + 27) / 10, rtol=1e-5)


def test_narrow_parameters_are_widened():
  square = lambda w, x: 0.5 * jnp.sum(x * w**2)
  w = jnp.ones(2, jnp.bfloat16)
  found = edges.batch_sharpness(square, w, [jnp.array([1.0, 3.0])])
  np.testing.assert_allclose(found.value, 2.8, rtol=1e-5)
