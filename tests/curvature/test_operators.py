"""Products with the Hessian of a data set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import curvature


def _network(key, dtype=jnp.float32):
  first, second = jax.random.split(key)
  return {
    'in': {
      'kernel': jax.random.normal(first, (4, 5), dtype),
      'bias': jnp.ones(5, dtype),
    },
    'out': [jax.random.normal(second, (5, 3), dtype)],
  }


def _loss(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['in']['kernel'] + params['in']['bias'][None])
  logits = hidden @ params['out'][0]
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch['y'][:, None], axis=1)
  return -jnp.mean(picked)


def _batch(key, size, dtype=jnp.float32):
  return {
    'x': jax.random.normal(key, (size, 4), dtype),
    'y': jax.random.randint(jax.random.fold_in(key, 1), (size,), 0, 3),
  }


def _dense(params, batch):
  flat, unravel = ravel_pytree(params)
  return np.asarray(jax.hessian(lambda w: _loss(unravel(w), batch))(flat))


def _columns(operator):
  flat, unravel = ravel_pytree(operator.params)
  return np.stack(
    [
      ravel_pytree(operator.matvec(unravel(row)))[0]
      for row in jnp.eye(flat.size, dtype=flat.dtype)
    ]
  )


def test_hvp_is_exact(x64):
  params = _network(jax.random.key(0), jnp.float64)
  batch = _batch(jax.random.key(1), 7, jnp.float64)
  vector = _network(jax.random.key(2), jnp.float64)
  product = curvature.hvp(lambda p: _loss(p, batch), params, vector)
  expected = _dense(params, batch) @ ravel_pytree(vector)[0]
  np.testing.assert_allclose(ravel_pytree(product)[0], expected, atol=1e-12)


def test_batches_of_unequal_size_are_one_big_batch(x64):
  params = _network(jax.random.key(0), jnp.float64)
  whole = _batch(jax.random.key(1), 12, jnp.float64)
  parts = [
    jax.tree.map(lambda x, s=s: x[s], whole)
    for s in (slice(0, 7), slice(7, 11), slice(11, 12))
  ]
  operator = curvature.hessian(_loss, params, parts)
  matrix = _columns(operator)
  np.testing.assert_allclose(matrix, _dense(params, whole), atol=1e-12)
  assert operator.num_examples == 12
  assert operator.num_matvecs == operator.size == matrix.shape[0]


@pytest.mark.parametrize('room', [0.0, 5e-6])
def test_products_are_the_same_with_no_or_little_cache(x64, room):
  params = _network(jax.random.key(0), jnp.float64)
  parts = [_batch(jax.random.key(i), 12, jnp.float64) for i in range(3)]
  cached = curvature.hessian(_loss, params, parts)
  anew = curvature.hessian(_loss, params, parts, max_cache_gib=room)
  for _ in range(2):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-14),
      cached.matvec(params),
      anew.matvec(params),
    )


def test_weight_counts_the_examples_of_a_batch(x64):
  params = _network(jax.random.key(0), jnp.float64)
  first, second = (_batch(jax.random.key(i), 4, jnp.float64) for i in (1, 2))
  weights = iter([3.0, 1.0])
  operator = curvature.hessian(
    _loss, params, [first, second], weight=lambda batch: next(weights)
  )
  expected = 0.75 * _dense(params, first) + 0.25 * _dense(params, second)
  np.testing.assert_allclose(_columns(operator), expected, atol=1e-12)


class _Stream:
  """Batches that are made anew whenever they are iterated."""

  passes = 0

  def __iter__(self):
    self.passes += 1
    return (_batch(jax.random.key(i), 3) for i in range(2))


def test_iterators_are_kept_and_other_iterables_streamed():
  params = _network(jax.random.key(0))
  stream = _Stream()
  streamed = curvature.hessian(_loss, params, stream)
  kept = curvature.hessian(_loss, params, iter(_Stream()))
  for _ in range(2):
    jax.tree.map(
      np.testing.assert_array_equal, streamed.matvec(params), kept.matvec(params)
    )
  assert stream.passes == 3  # the weights, then a pass a product


def test_narrow_parameters_are_widened():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _network(jax.random.key(0)))
  operator = curvature.hessian(_loss, params, [_batch(jax.random.key(1), 3)])
  assert operator.dtype == np.float32


def test_preconditioned_top_eigenvalue_is_invariant_to_rescaling(x64):
  def loss(params, batch):
    hidden = jax.nn.relu(batch['x'] @ params[0])
    return jnp.mean((hidden @ params[1]) ** 2)

  def sharpness(params):
    batch = _batch(jax.random.key(1), 9, jnp.float64)
    hessian = curvature.hessian(loss, params, [batch])
    scaled = curvature.preconditioned(hessian, jax.tree.map(jnp.abs, params))
    plain = curvature.eigenpairs(hessian, 1, 'largest', tol=1e-9)
    adaptive = curvature.eigenpairs(scaled, 1, 'largest', tol=1e-9)
    return plain.eigenvalues[0], adaptive.eigenvalues[0]

  keys = jax.random.split(jax.random.key(0))
  params = [jax.random.normal(keys[0], (4, 6)), jax.random.normal(keys[1], (6, 2))]
  plain, adaptive = sharpness(params)
  plain_rescaled, adaptive_rescaled = sharpness([10 * params[0], params[1] / 10])
  np.testing.assert_allclose(adaptive_rescaled, adaptive, rtol=1e-10)
  assert plain_rescaled > 5 * plain


@pytest.mark.parametrize(
  ('params', 'batches', 'weight', 'error', 'message'),
  [
    (jnp.ones(2), [], None, ValueError, 'no examples'),
    (jnp.ones(2), [jnp.ones((2, 2))], lambda b: -1, ValueError, 'not negative'),
    (jnp.ones(2), [jnp.float32(1)], None, ValueError, 'pass weight='),
    (jnp.ones(2), {'x': jnp.ones((2, 2))}, None, TypeError, r'is a dict, .* \[batch\]'),
    (jnp.ones(2, int), [jnp.ones((2, 2))], None, TypeError, 'dtype int32'),
    ({}, [jnp.ones((2, 2))], None, ValueError, 'no entries'),
  ],
)
def test_wrong_input_is_named(params, batches, weight, error, message):
  with pytest.raises(error, match=message):
    curvature.hessian(lambda w, x: jnp.sum(w), params, batches, weight=weight)


def test_parameters_that_were_donated_are_an_error():
  """JAX itself may end the process where they lie on several devices."""
  params = jnp.ones(3)
  operator = curvature.hessian(
    lambda w, x: jnp.mean((x @ w) ** 2), params, [jnp.eye(3)], max_cache_gib=0.0
  )
  operator.matvec(jnp.ones(3))
  params.delete()
  with pytest.raises(ValueError, match='have been donated or deleted since'):
    operator.matvec(jnp.ones(3))
