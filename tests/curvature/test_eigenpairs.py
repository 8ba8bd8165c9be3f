"""Extreme eigenpairs against dense and other solvers, and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import matfree.decomp
import matfree.eig
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from sam_jax import curvature


def _loss(params, batch):
  x, y = batch
  for kernel, bias in params[:-1]:
    x = jnp.tanh(x @ kernel + bias[None])
  logits = x @ params[-1]
  return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))


def _small_network():
  """A network of 148 parameters in float64, and its data."""
  rng = np.random.default_rng(0)
  params = [
    (jnp.asarray(rng.normal(size=(6, 12))), jnp.asarray(rng.normal(size=12))),
    (jnp.asarray(rng.normal(size=(12, 4)) / 2), jnp.zeros(4)),
    jnp.asarray(rng.normal(size=(4, 3))),
  ]
  x = jnp.asarray(rng.normal(size=(40, 6)))
  return params, (x, jnp.argmax(x[:, :3], axis=1))


def _diagonal(values, dtype=None):
  values = jnp.asarray(values, dtype)
  return curvature.operator(lambda v: values * v, values)


def _ends(values, k):
  values = np.sort(values)[::-1]
  return np.concatenate([values[:k], values[-k:]])


@pytest.fixture
def network(x64):
  params, batch = _small_network()
  parts = [jax.tree.map(lambda a, s=s: a[s], batch) for s in (slice(27), slice(27, 40))]
  flat, unravel = ravel_pytree(params)
  dense = np.asarray(jax.hessian(lambda w: _loss(unravel(w), batch))(flat))
  return curvature.hessian(_loss, params, parts), dense, unravel


def test_network_equals_dense_scipy_and_matfree(network):
  operator, dense, unravel = network
  values = np.linalg.eigvalsh(dense)
  scale = np.abs(values).max()
  result = curvature.eigenpairs(operator, 5, 'both', tol=1e-8)
  np.testing.assert_allclose(result.eigenvalues, _ends(values, 5), atol=1e-6 * scale)
  assert result.converged.all() and result.verified
  assert result.scale == pytest.approx(scale)

  def product(vector):
    tree = unravel(jnp.asarray(vector.ravel()))
    return np.asarray(ravel_pytree(operator.matvec(tree))[0])

  linear = scipy.sparse.linalg.LinearOperator(dense.shape, product, dtype=dense.dtype)
  scipys = scipy.sparse.linalg.eigsh(linear, 5, which='LA', return_eigenvectors=False)
  np.testing.assert_allclose(result.eigenvalues[:5], scipys[::-1], atol=1e-6 * scale)

  tridiagonal = matfree.decomp.tridiag_sym(80)
  matfrees = matfree.eig.eigh_partial(tridiagonal)(
    lambda v: dense @ v, jnp.ones(len(dense))
  )[0]
  np.testing.assert_allclose(
    result.eigenvalues, _ends(np.asarray(matfrees), 5), atol=1e-6 * scale
  )


def test_residuals_are_true_and_eigenvectors_orthonormal(network):
  operator, dense, _ = network
  result = curvature.eigenpairs(operator, 3, 'both', tol=1e-6)
  vectors = np.stack([ravel_pytree(v)[0] for v in result.eigenvectors])
  rest = vectors @ dense - result.eigenvalues[:, None] * vectors
  np.testing.assert_allclose(np.linalg.norm(rest, axis=1), result.residuals, atol=1e-9)
  np.testing.assert_allclose(vectors @ vectors.T, np.eye(6), atol=1e-9)
  assert (result.residuals <= 1e-6 * result.scale).all()
  for value, residual in zip(result.eigenvalues, result.residuals, strict=True):
    assert np.abs(np.linalg.eigvalsh(dense) - value).min() <= residual + 1e-12


@pytest.mark.slow
def test_million_float32_entries_without_copies():
  values = np.random.default_rng(0).uniform(-0.5, 1, 1_000_000)
  top, bottom = [60, 55, 50, 42, 40], [-1, -2, -3]
  values[:8] = top + bottom
  operator = _diagonal(np.random.default_rng(1).permutation(values), jnp.float32)
  for which, wanted in (('largest', top), ('smallest', bottom)):
    result = curvature.eigenpairs(operator, len(wanted), which, tol=1e-5)
    np.testing.assert_allclose(result.eigenvalues, wanted, atol=1e-5 * 60)
    assert result.converged.all() and result.verified
    assert result.num_matvecs < 60


_BULK = np.random.default_rng(0).uniform(-0.5, 1, 500)


@pytest.mark.parametrize(
  ('values', 'k'),
  [
    pytest.param(np.r_[9, 9, 9, 7, 7, 7, 7, -2, -2, -2, _BULK], 5, id='repeated'),
    pytest.param(np.r_[40.1, 40, 39, _BULK, np.zeros(7)], 2, id='close'),
    pytest.param(np.r_[np.zeros(480), _BULK[:30] + 1], 4, id='singular'),
    pytest.param(-np.abs(np.r_[_BULK, np.arange(2, 12)]), 3, id='negative'),
    pytest.param(np.random.default_rng(1).normal(size=510), 8, id='bulk-edges'),
    pytest.param(np.zeros(510), 3, id='zero'),
    pytest.param(np.array([3.0, 3.0, 3.0, 1.0]), 2, id='all-of-them'),
  ],
)
@pytest.mark.parametrize('max_basis_size', [400, 44])
def test_prescribed_spectra_with_their_multiplicity(x64, values, k, max_basis_size):
  operator = _diagonal(np.random.default_rng(2).permutation(values))
  result = curvature.eigenpairs(operator, k, tol=1e-6, max_basis_size=max_basis_size)
  atol = 1e-6 * np.abs(values).max()
  np.testing.assert_allclose(result.eigenvalues, _ends(values, k), atol=atol)
  assert result.converged.all() and result.verified


def test_without_verification_a_repeated_eigenvalue_is_not_called_verified(x64):
  operator = _diagonal(np.r_[9, 9, _BULK, np.zeros(8)])
  result = curvature.eigenpairs(operator, 2, 'largest', tol=1e-6, verify=False)
  assert not result.verified


def test_linear_regression_in_closed_form(x64):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(50, 8)))
  loss = lambda w, batch: 0.5 * jnp.mean((batch @ w - 1) ** 2)
  operator = curvature.hessian(loss, jnp.zeros(8), [x[:20], x[20:]])
  expected = np.linalg.eigvalsh(x.T @ x / 50)
  result = curvature.eigenpairs(operator, 2, tol=1e-8)
  np.testing.assert_allclose(result.eigenvalues, _ends(expected, 2), rtol=1e-7)


def test_warm_start_needs_fewer_products(network):
  operator, dense, _ = network
  cold = curvature.eigenpairs(operator, 3, 'largest', tol=1e-6, verify=False)
  warm = curvature.eigenpairs(
    operator, 3, 'largest', tol=1e-5, verify=False, start=cold
  )
  np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, atol=1e-5)
  assert warm.num_matvecs <= 8 < cold.num_matvecs
  vector = cold.eigenvectors[0]
  again = curvature.eigenpairs(operator, 1, 'largest', start=vector, verify=False)
  np.testing.assert_allclose(again.eigenvalues[0], cold.eigenvalues[0], rtol=1e-6)


def test_progress_ends_at_the_tolerance(network):
  operator, _, _ = network
  reports = []
  result = curvature.eigenpairs(operator, 2, tol=1e-5, progress=reports.append)
  assert reports[-1].residual <= 1e-5
  assert reports[-1].num_converged == reports[-1].num_wanted == 4
  assert reports[-1].num_matvecs + 4 == result.num_matvecs
  np.testing.assert_allclose(reports[-1].eigenvalues, result.eigenvalues, atol=1e-6)


def test_a_tolerance_out_of_reach_ends_and_says_so():
  operator = _diagonal(np.random.default_rng(1).normal(size=2000), jnp.float32)
  result = curvature.eigenpairs(operator, 3, tol=1e-12, max_num_matvecs=40)
  assert result.num_matvecs == 40
  assert not result.verified
  assert not result.converged.any()
  assert np.isfinite(result.residuals).all()


def test_not_finite_is_an_error():
  operator = curvature.operator(lambda v: v * jnp.nan, jnp.ones(9))
  with pytest.raises(curvature.NonFiniteError, match='not finite'):
    curvature.eigenpairs(operator, 1)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'which': 'top'}, "which='top'"),
    ({'k': 0}, 'k=0'),
    ({'k': 101}, 'k=101'),
    ({'k': 2.5}, 'k=2.5: give a whole number'),
    ({'tol': 0.0}, 'tol=0.0'),
    ({'max_num_matvecs': 3}, 'max_num_matvecs=3'),
    ({'max_basis_gib': 1e-6}, r'max_basis_gib=1e-06.*GiB'),
    ({'max_basis_size': 10}, 'max_basis_size=10'),
  ],
)
def test_wrong_arguments_are_named(arguments, message):
  operator = _diagonal(np.ones(100), jnp.float32)
  with pytest.raises(ValueError, match=message):
    curvature.eigenpairs(operator, **{'k': 3, **arguments})


def test_a_number_is_no_key():
  with pytest.raises(TypeError, match='key=0: give a key of jax.random'):
    curvature.eigenpairs(_diagonal(np.ones(100), jnp.float32), 1, key=0)


def test_saved_eigenpairs_are_read_bit_for_bit(network, tmp_path):
  operator, _, _ = network
  pairs = curvature.eigenpairs(operator, 2, tol=1e-6)
  path = tmp_path / 'pairs.npz'
  pairs.save(path)
  read = curvature.load_eigenpairs(path, operator.structure)
  assert jax.tree.structure(read.eigenvectors) == jax.tree.structure(pairs.eigenvectors)
  for field in dataclasses.fields(pairs):
    old, new = (getattr(x, field.name) for x in (pairs, read))
    jax.tree.map(np.testing.assert_array_equal, old, new)
    assert type(old) is type(new)
  warm = curvature.eigenpairs(operator, 2, tol=1e-5, start=read, verify=False)
  assert warm.num_matvecs < pairs.num_matvecs / 2
  with pytest.raises(ValueError, match=r'pairs.npz holds .* like= has'):
    curvature.load_eigenpairs(path, jnp.zeros(148))


def test_saved_eigenvectors_keep_narrow_types(tmp_path):
  values = jnp.array([3.0, 1.0, 0.5], jnp.bfloat16)
  operator = curvature.operator(lambda v: values * v, values)
  pairs = curvature.eigenpairs(operator, 1, 'largest', tol=0.1)
  pairs.save(tmp_path / 'pairs.npz')
  read = curvature.load_eigenpairs(tmp_path / 'pairs.npz', values)
  assert read.eigenvectors[0].dtype == jnp.bfloat16
  np.testing.assert_array_equal(read.eigenvectors[0], pairs.eigenvectors[0])


@pytest.mark.parametrize('scale', [1e-25, 1e-12, 1e12, 1e20])
def test_the_scale_of_the_operator_does_not_matter(scale):
  """Squares of such entries leave the range of float32."""
  values = scale * jnp.array([5.0, 3.0, 1.0, 0.5, -2.0], jnp.float32)
  result = curvature.eigenpairs(curvature.operator(lambda v: values * v, values), 1)
  np.testing.assert_allclose(result.eigenvalues, [5 * scale, -2 * scale], rtol=1e-4)
  assert result.converged.all()


@pytest.mark.parametrize('content', [b'hello', b'PK\x03\x04', b'', None])
def test_a_file_of_another_kind_is_no_eigenpairs(tmp_path, content):
  path = tmp_path / 'pairs.npz'
  if content is None:
    np.savez(path, something=np.ones(3))
  else:
    path.write_bytes(content)
  with pytest.raises(ValueError, match='pairs.npz is damaged, or no file that Eigen'):
    curvature.load_eigenpairs(path, jnp.zeros(3))
  with pytest.raises(FileNotFoundError):
    curvature.load_eigenpairs(tmp_path / 'none.npz', jnp.zeros(3))
