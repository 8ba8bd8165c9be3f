"""Curvature of parameters that lie on a mesh with explicit axes, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import curvature


def _loss(params, batch):
  """The Hessian is diagonal: ``mean(batch) kernel ** 2``, and 2 ``mean(batch)``."""
  quartic = jnp.sum(params['kernel'] ** 4) / 12
  return jnp.mean(batch) * (quartic + jnp.sum(params['bias'] ** 2))


def _measure(params):
  operator = curvature.hessian(_loss, params, [jnp.ones(4)])
  pairs = curvature.eigenpairs(operator, 2, 'largest', tol=1e-5)
  again = curvature.eigenpairs(operator, 2, 'largest', tol=1e-5, start=pairs)
  density = curvature.spectral_density(operator, 6, 2, pairs=pairs)
  results = {
    'eigenvalues': pairs.eigenvalues,
    'again': again.eigenvalues,
    'density': density.moment(1).value,
    'alone': curvature.spectral_density(operator, 6, 2).moment(1).value,
    'trace': curvature.trace(operator, 8, pairs=pairs).value,
    'squares': curvature.squared_frobenius_norm(operator, 8, pairs=pairs).value,
    'diagonal': curvature.diagonal(operator, 4).value,
  }
  return results, pairs.eigenvectors[0]


def test_results_are_those_of_one_device_and_vectors_lie_as_parameters():
  kernel, bias = jnp.arange(32.0).reshape(16, 2) / 8, jnp.ones(3)
  expected, _ = _measure({'bias': bias, 'kernel': kernel})
  np.testing.assert_allclose(
    expected['eigenvalues'], [31**2 / 64, 30**2 / 64], rtol=1e-4
  )
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,))
  with jax.set_mesh(mesh):
    params = {'bias': bias, 'kernel': jax.device_put(kernel, jax.P('x'))}
    found, vector = _measure(params)
    assert jax.typeof(vector['kernel']).sharding.spec == jax.P('x', None)
    assert jax.typeof(vector['bias']).sharding.spec == jax.P(None)
  for name, value in found.items():
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), value, expected[name]
    )
