"""Spectral density and trace against known spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda op: curvature.trace(op, 3), 'num_matvecs=3'),
    (lambda op: curvature.spectral_density(op, 0), 'num_matvecs=0'),
    (lambda op: curvature.spectral_density(op, 5, sigma=0.0), 'sigma=0.0'),
    (lambda op: curvature.spectral_density(op, 5, max_basis_gib=1e-9), 'GiB'),
  ],
)
def test_wrong_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(_operator(_SPECTRUM))
