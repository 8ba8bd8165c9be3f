"""Products as pure functions, and how often operators trace a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import curvature


def _outputs(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['in'] + params['bias'][None])
  return hidden @ params['out'][0]


def _example_losses(params, batch):
  return batch['w'] * ((_outputs(params, batch) - batch['y']) ** 2).sum(1)


def _loss_of_outputs(outputs, batch):
  losses = batch['w'] * ((outputs - batch['y']) ** 2).sum(1)
  return losses.sum() / batch['w'].sum()


def _loss(params, batch):
  return _loss_of_outputs(_outputs(params, batch), batch)


def _weight(batch):
  return batch['w'].sum()


def _network(seed, dtype=None):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'in': jax.random.normal(keys[0], (4, 6), dtype) / 2,
    'bias': jax.random.normal(keys[1], (6,), dtype),
    'out': [jax.random.normal(keys[2], (6, 3), dtype) / 2],
  }


def _batches(dtype=None):
  """Three batches of 8 places with 8, 5 and 0 examples."""
  keys = jax.random.split(jax.random.key(9))
  counts = jnp.array([8, 5, 0])
  return {
    'x': jax.random.normal(keys[0], (3, 8, 4), dtype),
    'y': jax.random.normal(keys[1], (3, 8, 3), dtype),
    'w': (jnp.arange(8)[None] < counts[:, None]).astype(jnp.result_type(float)),
  }


_PRODUCTS = {
  'hessian': curvature.hessian_product(_loss),
  'gauss_newton': curvature.gauss_newton_product(_outputs, _loss_of_outputs),
  'fisher': curvature.empirical_fisher_product(_example_losses, weight=_weight),
}


def _dense(kind, params, batch):
  flat, unravel = ravel_pytree(params)
  if kind == 'hessian':
    return jax.hessian(lambda w: _loss(unravel(w), batch))(flat)
  if kind == 'fisher':
    rows = jax.jacobian(lambda w: _example_losses(unravel(w), batch))(flat)
    return rows.T @ rows / _weight(batch)
  jacobian = jax.jacobian(lambda w: _outputs(unravel(w), batch))(flat)
  weights = 2 * batch['w'] / _weight(batch)
  return jnp.einsum('nop,n,noq->pq', jacobian, weights, jacobian)


@pytest.mark.parametrize('kind', _PRODUCTS)
def test_products_equal_dense_matrices(x64, kind):
  """Over vmapped vectors and parameters, one batch and stacked ones, one empty."""
  product = _PRODUCTS[kind]
  mean = curvature.mean_product(product, weight=_weight)
  batches = _batches()
  members = jax.tree.map(lambda *x: jnp.stack(x), _network(0), _network(1))
  whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
  first = jax.tree.map(lambda x: x[0], batches)
  _, unravel = ravel_pytree(_network(0))
  units = jax.vmap(unravel)(jnp.eye(48))

  @jax.jit
  def columns(members, batches):
    over_units = lambda p, b, f: jax.vmap(lambda v: ravel_pytree(f(p, b, v))[0])(units)
    one = jax.tree.map(lambda x: x[0], batches)
    return jax.vmap(
      lambda p: (
        over_units(p, one, product),
        over_units(p, batches, mean),
        over_units(p, one, lambda p, b, v: product.linearize(p, b)(v)),
      )
    )(members)

  one, many, linear = columns(members, batches)
  for index in range(2):
    params = jax.tree.map(lambda x, i=index: x[i], members)
    np.testing.assert_allclose(one[index], _dense(kind, params, first), atol=1e-12)
    np.testing.assert_allclose(many[index], _dense(kind, params, whole), atol=1e-12)
    np.testing.assert_allclose(linear[index], one[index], atol=1e-12)


def test_products_are_differentiable_and_equal_for_equal_functions(x64):
  batch = jax.tree.map(lambda x: x[0], _batches())
  params, vector = _network(0), _network(1)

  def quadratic(params):
    image = curvature.hessian_product(_loss)(params, batch, vector)
    return ravel_pytree(image)[0] @ ravel_pytree(vector)[0]

  along = jax.jit(
    lambda t: quadratic(jax.tree.map(lambda p, v: p + t * v, params, vector))
  )
  slope = jax.jit(jax.grad(along))(0.0)
  step = 1e-4
  np.testing.assert_allclose(
    slope, (along(step) - along(-step)) / (2 * step), rtol=1e-5
  )
  for again in (
    curvature.hessian_product(_loss),
    curvature.gauss_newton_product(_outputs, _loss_of_outputs),
    curvature.empirical_fisher_product(_example_losses, weight=_weight),
  ):
    assert again in _PRODUCTS.values()
    assert curvature.mean_product(again) == curvature.mean_product(again)


@pytest.mark.parametrize('kind', _PRODUCTS)
def test_every_matrix_product_has_the_highest_precision(kind):
  batch = jax.tree.map(lambda x: x[0], _batches())
  made = jax.make_jaxpr(_PRODUCTS[kind])(_network(0), batch, _network(1))
  text = str(made)
  highest = '(Precision.HIGHEST, Precision.HIGHEST)'
  assert text.count('dot_general') == text.count(highest) > 2


def test_narrow_parameters_and_vectors_are_widened():
  batch = jax.tree.map(lambda x: x[0], _batches())
  params, vector = _network(0, jnp.bfloat16), _network(1, jnp.bfloat16)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, vector))
  for product in (_PRODUCTS['hessian'], curvature.mean_product(_PRODUCTS['hessian'])):
    if product is not _PRODUCTS['hessian']:
      batch = jax.tree.map(lambda x: x[None], batch)
    narrow = product(params, batch, vector)
    jax.tree.map(
      np.testing.assert_array_equal, narrow, product(wide[0], batch, wide[1])
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype('float32')}


def test_operators_of_one_loss_trace_it_once():
  """For several checkpoints, and for single batches of one shape."""
  traces = []

  def losses(params, batch):
    traces.append(1)
    return _example_losses(params, batch)

  loss = lambda params, batch: losses(params, batch).mean()
  of_outputs = lambda outputs, batch: outputs.mean()
  made = (
    lambda *at, **room: curvature.hessian(loss, *at, **room),
    lambda *at, **room: curvature.gauss_newton(losses, of_outputs, *at, **room),
    lambda *at, **room: curvature.empirical_fisher(losses, *at, **room),
  )
  batches = _batches()
  parts = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(3)]
  for make in made:
    for room in (2.0, 0.0):
      make(_network(0), parts[:1], max_cache_gib=room).matvec(_network(1))
      count = len(traces)
      for part in parts:
        operator = make(_network(1), [part], max_cache_gib=room)
        operator.matvec(_network(0))
      make(_network(2), parts, max_cache_gib=room).matvec(_network(0))
      assert len(traces) == count > 0
