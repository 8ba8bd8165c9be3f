"""What is drawn, found and kept of sharded parameters lies as they do."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sam_jax import curvature, probes, sharpness

SPECS = {'kernel': P('data', 'fsdp'), 'bias': P(), 'rows': P('fsdp')}
TYPES = [AxisType.Auto, AxisType.Explicit]


def _loss(params, batch):
  """The Hessian is diagonal: kernel ** 2, and 2."""
  squares = jnp.sum(params['bias'] ** 2) + jnp.sum(params['rows'] ** 2)
  return jnp.mean(batch) * (jnp.sum(params['kernel'] ** 4) / 12 + squares)


def _params():
  return {
    'kernel': jnp.arange(64.0).reshape(16, 4) / 8,
    'bias': jnp.ones(3),
    'rows': jnp.linspace(-1, 1, 8).reshape(4, 2),
  }


def _placed(params, sizes=(4, 2), axis_type=AxisType.Auto):
  mesh = jax.make_mesh(sizes, ('data', 'fsdp'), axis_types=(axis_type,) * 2)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return jax.tree.map(put, params, SPECS)


def _operator(params):
  return curvature.hessian(_loss, params, [jnp.ones(4)])


def _assert_lies_as(vector, params):
  assert jax.tree.structure(vector) == jax.tree.structure(params)
  for x, y in zip(jax.tree.leaves(vector), jax.tree.leaves(params), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, y.ndim)


def _assert_equal(x, y, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)


@pytest.mark.parametrize('axis_type', TYPES)
def test_eigenpairs_and_density_need_no_context_of_a_mesh(axis_type):
  """`jax.make_mesh` makes explicit axes where nothing else is said."""
  params = _placed(_params(), axis_type=axis_type)
  operator = _operator(params)
  pairs = curvature.eigenpairs(operator, 3, 'largest', tol=1e-5)
  top = np.array([63, 62, 61]) ** 2 / 64
  np.testing.assert_allclose(pairs.eigenvalues, top, rtol=1e-5)
  for vector in pairs.eigenvectors:
    _assert_lies_as(vector, params)
  _assert_lies_as(operator.matvec(pairs.eigenvectors[0]), params)
  found, expected = (
    curvature.spectral_density(each, 6, 2) for each in (operator, _operator(_params()))
  )
  np.testing.assert_allclose(found.nodes, expected.nodes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('axis_type', TYPES)
def test_probes_are_those_of_one_device(axis_type):
  params, key = _params(), jax.random.key(3)
  placed = _placed(params, axis_type=axis_type)
  for draw in (probes.gaussian, probes.uniform_cube(0.5)):
    found = draw(key, placed)
    _assert_lies_as(found, placed)
    _assert_equal(found, draw(key, params), rtol=1e-6)
  diagonal = curvature.diagonal(_operator(placed), 2).value
  _assert_lies_as(diagonal, placed)
  _assert_equal(diagonal['kernel'], params['kernel'] ** 2, rtol=1e-5)
  measured = [
    (
      sharpness.average_case(_loss, p, [jnp.ones(2)], 0.1, num_samples=2).value,
      sharpness.worst_case(
        _loss, p, [jnp.ones(2)], 0.1, num_restarts=2, num_steps=1
      ).value,
    )
    for p in (placed, params)
  ]
  np.testing.assert_allclose(*measured, rtol=1e-3)


def test_parts_and_scaled_copies_of_an_operator_are_sharded_too():
  params = _placed(_params())
  operator = _operator(params)
  part = curvature.restricted(operator, 'kernel|bias')
  pairs = curvature.eigenpairs(part, 1, 'largest')
  np.testing.assert_allclose(pairs.eigenvalues, [63**2 / 64], rtol=1e-4)
  kept = {**params, 'rows': None}
  _assert_lies_as(pairs.eigenvectors[0], kept)
  scaled = curvature.preconditioned(operator, params)
  pairs = curvature.eigenpairs(scaled, 1, 'largest')
  np.testing.assert_allclose(pairs.eigenvalues, [(63 / 8) ** 4], rtol=1e-4)
  _assert_lies_as(pairs.eigenvectors[0], params)


def test_files_are_read_back_onto_the_mesh(tmp_path):
  params = _placed(_params())
  journal = tmp_path / 'products.journal'
  first = curvature.journaled(_operator(params), journal)
  pairs = curvature.eigenpairs(first, 2, 'largest')
  again = curvature.journaled(_operator(params), journal)
  repeated = curvature.eigenpairs(again, 2, 'largest')
  assert again.num_computed == 0
  pairs.save(tmp_path / 'pairs.npz')
  loaded = curvature.load_eigenpairs(tmp_path / 'pairs.npz', params)
  for other in (repeated, loaded):
    for x, y in zip(other.eigenvectors, pairs.eigenvectors, strict=True):
      _assert_lies_as(x, params)
      jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize('axis_type', TYPES)
def test_a_checkpoint_is_measured_on_another_mesh(tmp_path, axis_type):
  """With orbax alone: what it restores is what an operator takes."""
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'params', _placed(_params()))
  other = _placed(_params(), (2, 4), axis_type)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other
  )
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore(tmp_path / 'params', like)
  _assert_lies_as(params, other)
  operator = _operator(params)
  pairs = curvature.eigenpairs(operator, 2, 'largest', tol=1e-5)
  np.testing.assert_allclose(pairs.eigenvalues, [63**2 / 64, 62**2 / 64], rtol=1e-5)
  # Eigenvectors are written and read as the parameters are.
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'vectors', list(pairs.eigenvectors))
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    vectors = checkpointer.restore(tmp_path / 'vectors', [operator.structure] * 2)
  for vector, expected in zip(vectors, pairs.eigenvectors, strict=True):
    _assert_lies_as(vector, other)
    jax.tree.map(np.testing.assert_array_equal, vector, expected)


def test_parameters_on_two_meshes_are_refused_with_a_sentence():
  params = _placed(_params())
  params['bias'] = _placed(_params(), (2, 4))['bias']
  operator = curvature.operator(lambda v: v, params)
  with pytest.raises(ValueError, match='2 different meshes: place all of them on one'):
    curvature.eigenpairs(operator, 1)
