"""Curvature where parameters and batches lie on one mesh of eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sam_jax import curvature

DEVICES = 8


def _loss(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['in'])
  return jnp.mean((hidden @ params['out'] - batch['y']) ** 2)


def _problem(width, size, dtype):
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
  params = {'in': normal(6, width) / 2, 'out': normal(width, 1) / width**0.5}
  return params, {'x': normal(size, 6), 'y': normal(size, 1)}


def _placed(params, batch, sizes=(4, 2)):
  mesh = jax.make_mesh(sizes, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  specs = {'in': P(None, 'fsdp'), 'out': P('fsdp')}
  rows = P(('data', 'fsdp'))
  return jax.tree.map(put, params, specs), jax.tree.map(lambda x: put(x, rows), batch)


def _measured(params, batch):
  operator = curvature.hessian(_loss, params, [batch])
  pairs = curvature.eigenpairs(operator, 3, 'largest', tol=1e-9)
  density = curvature.spectral_density(operator, 8, 2, pairs=pairs)
  return {
    'eigenvalues': pairs.eigenvalues,
    'nodes': density.nodes,
    'weights': density.weights,
    'trace': curvature.trace(operator, 6, pairs=pairs).value,
  }


def test_results_are_those_of_one_device_and_of_the_dense_matrix(x64):
  params, batch = _problem(8, 16, jnp.float64)
  expected = _measured(params, batch)
  found = _measured(*_placed(params, batch))
  for name, value in found.items():
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9),
      value,
      expected[name],
    )
  flat, unflatten = jax.flatten_util.ravel_pytree(params)
  dense = jax.jit(jax.hessian(lambda w: _loss(unflatten(w), batch)))(flat)
  top = np.linalg.eigvalsh(dense)[::-1][:3]
  np.testing.assert_allclose(found['eigenvalues'], top, rtol=1e-6)


def _bytes(function, *arguments):
  """Bytes a device holds: arguments, results and temporaries, by the compiler."""
  found = jax.jit(function).lower(*arguments).compile().memory_analysis()
  return (
    found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
  )


def _top(product, params, batch):
  matvec = functools.partial(product, params, batch)
  return curvature.top_eigenpairs(matvec, params, 2, max_basis_size=16)


@pytest.mark.parametrize('kind', ['product', 'top_eigenpairs'])
def test_a_device_holds_its_share_of_vectors_and_basis(kind):
  """Of 8 devices each holds an eighth, and 15 % at most besides."""
  product = curvature.hessian_product(_loss)
  params, batch = _problem(1 << 14, DEVICES, jnp.float32)

  def size(params, batch):
    if kind == 'product':
      return _bytes(product, params, batch, params)
    return _bytes(functools.partial(_top, product), params, batch)

  whole, share = size(params, batch), size(*_placed(params, batch, (1, DEVICES)))
  vector = sum(x.nbytes for x in jax.tree.leaves(params))
  assert whole >= (3 if kind == 'product' else 16) * vector
  assert share <= whole / DEVICES * 1.15
