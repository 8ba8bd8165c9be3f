"""Means over the end of a run, with intervals that heed autocorrelation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NUM_BLOCKS = 8
# The 97.5 % quantile of Student's t with 7 degrees of freedom.
_QUANTILE = 2.364624


def late_mean(
  values: Sequence[tuple[int, float]], step: int
) -> tuple[float | None, float | None]:
  r"""The mean over the last third of the steps, with its 95 % interval.

  The values of the last third are cut into `NUM_BLOCKS` = 8 consecutive blocks, of
  lengths that differ by one at most. The half-width of the interval is

  .. math:: t_{0.975, 7}\, \frac{s}{\sqrt 8}

  with the standard deviation s of the means of the blocks. Neighbouring values may be
  correlated; means of blocks that are longer than the correlation are nearly not.

  Args:
    values: pairs of a step and a value, by step.
    step: the run's last.

  Returns:
    The mean, and the half-width of its interval; None where there are no values, or
    fewer than blocks.

  >>> late_mean([(0, 9.), (10, 1.), (15, 3.)], 15)
  (2.0, None)

  References:
    Flegal and Jones, Batch means and spectral variance estimators in Markov chain Monte
    Carlo, Annals of Statistics 38 (2010), arXiv 0811.1729.
  """
  last = [value for number, value in values if 3 * number >= 2 * step]
  if not last:
    return None, None
  if len(last) < NUM_BLOCKS:
    return float(np.mean(last)), None
  means = [block.mean() for block in np.array_split(last, NUM_BLOCKS)]
  half = _QUANTILE * np.std(means, ddof=1) / math.sqrt(NUM_BLOCKS)
  return float(np.mean(last)), float(half)


def show(mean: float, interval: float | None) -> str:
  """A mean with its interval, as ``0.98 ± 0.01``."""
  return f'{mean:.3f}' if interval is None else f'{mean:.3f} ± {interval:.3f}'
