"""Results as entries of a summary: plain values that JSON holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sam_jax import curvature

_RESAMPLES = 200


def estimate(name: str, found: Any) -> dict[str, Any]:
  """A `curvature.Estimate` as entries of a summary; None is not measured."""
  return {
    name: found and found.value,
    f'{name}_standard_error': found and found.standard_error,
  }


def estimate_over_groups(name: str, found: Any) -> dict[str, Any]:
  """The same with an error over groups, which a single group does not have."""
  return estimate(name, found._replace(standard_error=found.standard_error or None))


def extremes(pairs: curvature.Eigenpairs, k: int, size: int) -> dict[str, Any]:
  """Eigenpairs of both ends as entries of a summary.

  Args:
    pairs: the largest k and the smallest k, descending.
    k: how many at each end were asked for.
    size: how many eigenvalues there are.
  """
  entries = [
    {'eigenvalue': value, 'residual': residual, 'converged': converged}
    for value, residual, converged in zip(
      pairs.eigenvalues, pairs.residuals, pairs.converged, strict=True
    )
  ]
  values = pairs.eigenvalues
  fifth = min(k, len(values)) >= 5
  return {
    'lambda_max': values[0],
    'lambda_max_residual': pairs.residuals[0],
    'lambda_max_converged': pairs.converged[0],
    'lambda_min': values[-1],
    'lambda_min_residual': pairs.residuals[-1],
    'top': entries[:k],
    'bottom': entries[-k:],
    # Fewer pairs than asked for are there if the products ran out before.
    'all_converged': pairs.converged.all() and len(values) >= min(2 * k, size),
    'no_copies_missed': pairs.verified,
    'lambda_max_over_abs_lambda_min': _over(values[0], values[-1], pairs.residuals[-1]),
    'lambda_1_over_lambda_5': (
      _over(values[0], values[4], pairs.residuals[4]) if fifth else None
    ),
  }


def _over(numerator: float, denominator: float, residual: float) -> float | None:
  """A ratio to an eigenvalue's size; None where that is 0 within its residual."""
  size = abs(denominator)
  return float(numerator / size) if size > residual else None


def extremes_errors(
  curvatures: np.ndarray, weights: np.ndarray | None, seed: Any
) -> dict[str, Any]:
  """Bootstrap standard errors of both extremes, the eigenvectors held fixed.

  To first order the eigenvalue of a resample is the mean of what its members add to
  ``v . A v``.

  Args:
    curvatures: float64 (2, n), what each of n members, examples or batches, adds at
      the eigenvector of lambda_max and at that of lambda_min.
    weights: float64 (n,), how much each member counts; None is all alike.
    seed: of the resamples, as `numpy.random.default_rng` takes it.
  """
  tops, bottoms = _resampled_means(curvatures, weights, seed)
  # Half the middle 68 %: a lambda_min that may be 0 leaves no standard deviation. Where
  # it is 0 in so many resamples that the middle reaches infinity, NaN.
  with np.errstate(divide='ignore', invalid='ignore'):
    high, low = np.quantile(tops / np.abs(bottoms), (0.84, 0.16))
    half = (high - low) / 2
  return {
    'lambda_max_standard_error': tops.std(ddof=1),
    'lambda_min_standard_error': bottoms.std(ddof=1),
    'lambda_max_over_abs_lambda_min_standard_error': half,
  }


def _resampled_means(
  values: np.ndarray, weights: np.ndarray | None, seed: Any
) -> np.ndarray:
  """Means of (r, n) values over resamples of the n with repetition, (r, resamples)."""
  rng = np.random.default_rng(seed)
  count = values.shape[1]
  means = []
  for _ in range(_RESAMPLES):
    chosen = rng.integers(count, size=count)
    if weights is None:
      means.append(values[:, chosen].mean(1))
    else:
      means.append(np.average(values[:, chosen], axis=1, weights=weights[chosen]))
  return np.stack(means, axis=1)


def mean_with_error(
  name: str, values: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float | None]:
  """The mean of (n,) values and its standard error, as entries of a summary.

  With weights the error is that of a ratio of sums, to first order; a single value has
  the error 0 where it is an example, and None where it is a weighted batch.
  """
  count = len(values)
  if weights is None:
    mean = float(values.mean())
    error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
  else:
    shares = weights / weights.sum()
    mean, error = float(shares @ values), None
    if count > 1:
      with np.errstate(invalid='ignore', over='ignore'):  # A loss may be infinite.
        spread = ((shares * (values - mean)) ** 2).sum()
      error = float(np.sqrt(spread * count / (count - 1)))
  return {name: mean, f'{name}_standard_error': error}


def plain(value: Any) -> Any:
  """NumPy numbers as Python's, and what is not finite as null, for JSON."""
  if isinstance(value, dict):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, list):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
