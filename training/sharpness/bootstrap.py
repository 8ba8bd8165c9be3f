"""How far measured numbers would move with other examples."""

from __future__ import annotations

import numpy as np

_RESAMPLES = 200


def resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
  """Means of (r, n) values over resamples of the n with repetition, (r, resamples)."""
  rng = np.random.default_rng(seed)
  count = values.shape[1]
  return np.stack(
    [values[:, rng.integers(count, size=count)].mean(1) for _ in range(_RESAMPLES)],
    axis=1,
  )


def extremes(top: np.ndarray, bottom: np.ndarray, seed: int) -> dict[str, float]:
  """Standard errors of the two extreme eigenvalues and of their ratio.

  Args:
    top: what each example adds to v . A v for the largest eigenvalue's v, (n,). To
      first order the eigenvalue of a resample is the mean over it.
    bottom: the same for the smallest.
    seed: of the resamples.
  """
  tops, bottoms = resampled_means(np.stack([top, bottom]), seed)
  with np.errstate(divide='ignore', invalid='ignore'):
    ratio = tops / np.abs(bottoms)
  return {
    'lambda_max': float(tops.std(ddof=1)),
    'lambda_min': float(bottoms.std(ddof=1)),
    # Half the middle 68 %: a lambda_min that may be 0 leaves no standard deviation.
    'ratio': float(np.subtract(*np.quantile(ratio, (0.84, 0.16))) / 2),
  }


def standard_error(values: np.ndarray) -> float:
  """That of the mean of (n,) values; 0 for a single one."""
  count = len(values)
  return float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
