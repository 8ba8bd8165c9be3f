"""Spectral density and trace against known spectra."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import curvature

_RNG = np.random.default_rng(0)
_OUTLIERS = np.array([30.0, 25.0, 12.0, 8.0, -2.0])
_SPECTRUM = np.r_[np.zeros(200), _RNG.exponential(0.3, 295), _OUTLIERS]


def _operator(values):
  values = jnp.asarray(values, jnp.float32)
  return curvature.operator(lambda v: values * v, values)


def _smoothed(values, grid, sigma):
  kernels = np.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2)
  return kernels.mean(1) / (sigma * np.sqrt(2 * np.pi))


def test_outliers_are_exact_and_the_rest_within_the_band():
  result = curvature.spectral_density(_operator(_SPECTRUM), 30, 6)
  for outlier in _OUTLIERS:
    assert np.abs(result.outliers - outlier).min() < 1e-3
  np.testing.assert_allclose(
    result.weights.sum(1) + len(result.outliers) / len(_SPECTRUM), 1, rtol=1e-12
  )
  truth = _smoothed(_SPECTRUM, result.grid, result.sigma)
  inside = (result.lower <= truth + 1e-9) & (truth <= result.upper + 1e-9)
  assert inside.mean() > 0.9
  assert np.trapezoid(result.density, result.grid) == pytest.approx(1, abs=1e-3)
  assert np.diff(result.grid).max() <= result.sigma / 3
  assert result.num_matvecs == 6 * 30


def test_moments_are_the_trace_and_the_squared_frobenius_norm():
  result = curvature.spectral_density(_operator(_SPECTRUM), 30, 6)
  for power in (1, 2):
    estimate = result.moment(power)
    assert abs(estimate.value - (_SPECTRUM**power).sum()) < 4 * estimate.standard_error


def test_known_pairs_are_deflated():
  operator = _operator(_SPECTRUM)
  pairs = curvature.eigenpairs(operator, 3)
  result = curvature.spectral_density(operator, 20, 2, pairs=pairs)
  np.testing.assert_array_equal(result.outliers, pairs.eigenvalues)
  assert result.nodes.max() < 12.1 and result.nodes.min() > -2


def test_a_repeated_eigenvalue_keeps_its_weight():
  values = np.r_[np.zeros(900), np.full(100, 2.0)]
  result = curvature.spectral_density(_operator(values), 10, 4)
  assert len(result.outliers) == 0
  high = (result.weights * (result.nodes > 1)).sum(1)
  np.testing.assert_allclose(high, 0.1, atol=0.05)


def test_full_order_is_exact(x64):
  values = np.linspace(-1, 3, 12)
  operator = curvature.operator(lambda v: jnp.asarray(values) * v, jnp.zeros(12))
  result = curvature.spectral_density(operator, 12, 3)
  np.testing.assert_allclose(np.sort(result.outliers), values, atol=1e-12)
  truth = _smoothed(values, result.grid, result.sigma)
  np.testing.assert_allclose(result.density, truth, atol=1e-10)
  estimate = curvature.trace(operator, 30)
  assert estimate.value == pytest.approx(values.sum(), abs=1e-12)
  assert estimate.standard_error == 0


def test_trace_is_within_its_standard_error():
  operator = _operator(_SPECTRUM)
  estimates = [curvature.trace(operator, 40, key=jax.random.key(i)) for i in range(20)]
  scores = [(e.value - _SPECTRUM.sum()) / e.standard_error for e in estimates]
  assert np.sum(np.abs(scores) <= 3) >= 19
  # The Lanczos basis takes the outliers out of the variance: Hutchinson's estimator
  # has the standard error sqrt(2 / 40) |A|_F here.
  hutchinson = np.sqrt(2 / 40 * (_SPECTRUM**2).sum())
  assert np.mean([e.standard_error for e in estimates]) < hutchinson / 4
  assert all(e.num_matvecs == 40 for e in estimates)


def test_trace_takes_known_pairs_out_of_its_variance():
  operator = _operator(_SPECTRUM)
  pairs = curvature.eigenpairs(operator, 4)
  known = curvature.trace(operator, 20, pairs=pairs)
  assert known.num_matvecs == 20
  assert abs(known.value - _SPECTRUM.sum()) < 4 * known.standard_error
  assert known.standard_error < 0.3 * np.sqrt(2 / 20 * (_SPECTRUM**2).sum())


def test_the_trace_makes_do_with_the_memory_there_is():
  operator = _operator(_SPECTRUM)
  vector_bytes = 4 * len(_SPECTRUM)
  products = {}
  for room in (7, 7 + 16, 100):  # work vectors; and one block of 16; and plenty
    estimate = curvature.trace(operator, 60, max_basis_gib=room * vector_bytes / 2**30)
    assert abs(estimate.value - _SPECTRUM.sum()) < 4 * estimate.standard_error
    assert estimate.num_matvecs == 60
    products[room] = estimate.standard_error
  # A block of 16 holds the outliers too.
  assert max(products[23], products[100]) < products[7] / 4
  plain = np.sqrt(2 / 60 * (_SPECTRUM**2).sum())
  assert products[7] == pytest.approx(plain, rel=0.5)


def test_the_density_places_what_outliers_there_is_memory_for():
  operator = _operator(_SPECTRUM)
  gib = lambda vectors: vectors * 4 * len(_SPECTRUM) / 2**30
  plenty = curvature.spectral_density(operator, 30, 3)
  assert len(plenty.outliers) >= 5
  none = curvature.spectral_density(operator, 30, 3, max_basis_gib=gib(32 + 7))
  assert len(none.outliers) == 0
  np.testing.assert_allclose(none.weights.sum(1), 1, rtol=1e-12)
  assert none.nodes.max() == pytest.approx(30, abs=1e-3)
  with pytest.raises(ValueError, match='need .* GiB'):
    curvature.spectral_density(operator, 30, 3, max_basis_gib=gib(32 + 6))


def test_the_band_of_one_probe_holds_for_few_eigenvalues():
  result = curvature.spectral_density(_operator(_SPECTRUM), 30, 1)
  assert np.isfinite(result.lower).all() and np.isfinite(result.upper).all()
  truth = _smoothed(_SPECTRUM, result.grid, result.sigma)
  assert ((result.lower <= truth) & (truth <= result.upper)).mean() > 0.8
  narrow = curvature.spectral_density(_operator(_SPECTRUM), 30, 8, sigma=result.sigma)
  at = np.argmax(result.density), np.argmax(narrow.density)
  widths = [(r.upper - r.lower)[i] for r, i in zip((result, narrow), at, strict=True)]
  assert widths[1] == pytest.approx(widths[0] / 8**0.5, rel=0.3)


def test_squared_frobenius_norm_and_what_pairs_take_out_of_its_variance():
  operator, truth = _operator(_SPECTRUM), (_SPECTRUM**2).sum()
  plain = curvature.squared_frobenius_norm(operator, 30)
  pairs = curvature.eigenpairs(operator, 4)
  known = curvature.squared_frobenius_norm(operator, 30, pairs=pairs)
  for estimate in (plain, known):
    assert abs(estimate.value - truth) < 4 * estimate.standard_error
    assert estimate.num_matvecs == 30
  assert known.standard_error < plain.standard_error / 20


def test_squared_frobenius_norm_counts_the_residuals_of_pairs(x64):
  matrix = np.random.default_rng(3).normal(size=(12, 12))
  matrix = jnp.asarray(matrix + matrix.T)
  operator = curvature.operator(lambda v: matrix @ v, jnp.zeros(12))
  pairs = curvature.eigenpairs(operator, 3, tol=0.3, verify=False)
  rough = dataclasses.replace(pairs, converged=np.ones(6, bool))
  estimates = [
    curvature.squared_frobenius_norm(operator, 400, key=jax.random.key(i), pairs=rough)
    for i in range(2)
  ]
  for estimate in estimates:
    assert abs(estimate.value - (matrix**2).sum()) < 4 * estimate.standard_error


def test_diagonal_and_traces_of_leaves_from_the_same_products(x64):
  rng = np.random.default_rng(4)
  matrix = rng.normal(size=(20, 20)) + np.diag(rng.uniform(0, 30, 20))
  matrix = jnp.asarray(matrix + matrix.T)
  like = {'dense': {'bias': jnp.zeros(4), 'kernel': jnp.zeros((4, 4))}}
  flat, unravel = ravel_pytree(like)
  operator = curvature.operator(lambda v: unravel(matrix @ ravel_pytree(v)[0]), like)
  found = curvature.diagonal(operator, 200)
  assert found.num_matvecs == operator.num_matvecs == 200
  truth = np.diag(matrix)
  value, error = (
    np.asarray(ravel_pytree(x)[0]) for x in (found.value, found.standard_error)
  )
  assert (np.abs(value - truth) < 4 * error).all()
  variance = (matrix**2).sum(1) - truth**2
  np.testing.assert_allclose(error, np.sqrt(variance / 200), rtol=0.25)

  assert list(found.leaf_traces) == ['dense/bias', 'dense/kernel']
  for path, part in (('dense/bias', slice(4)), ('dense/kernel', slice(4, 20))):
    estimate = found.leaf_traces[path]
    assert abs(estimate.value - truth[part].sum()) < 4 * estimate.standard_error
    assert estimate.value == pytest.approx(value[part].sum(), rel=1e-12)
    # Entries between the leaves and, twice, those within.
    inner = np.asarray(matrix)[part, part]
    spread = (np.asarray(matrix)[part] ** 2).sum() - (inner**2).sum()
    spread += 2 * ((inner**2).sum() - (np.diag(inner) ** 2).sum())
    assert estimate.standard_error == pytest.approx(np.sqrt(spread / 200), rel=0.25)


def test_estimates_of_what_is_not_finite_are_errors():
  operator = curvature.operator(lambda v: v * jnp.nan, jnp.ones(9))
  for estimator in (curvature.diagonal, curvature.squared_frobenius_norm):
    with pytest.raises(curvature.NonFiniteError, match='not finite'):
      estimator(operator, 4)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda op: curvature.trace(op, 3), 'num_matvecs=3'),
    (lambda op: curvature.trace(op, 30, max_basis_gib=1e-9), 'max_basis_gib=1e-09'),
    (lambda op: curvature.squared_frobenius_norm(op, 1), 'num_matvecs=1'),
    (lambda op: curvature.diagonal(op, 1), 'num_matvecs=1'),
    (lambda op: curvature.spectral_density(op, 0), 'num_matvecs=0'),
    (lambda op: curvature.spectral_density(op, 5, sigma=0.0), 'sigma=0.0'),
    (lambda op: curvature.spectral_density(op, 5, max_basis_gib=1e-9), 'GiB'),
  ],
)
def test_wrong_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(_operator(_SPECTRUM))
