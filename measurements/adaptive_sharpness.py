"""The largest eigenvalue in units of the parameters: invariant to rescaling."""

from __future__ import annotations

from typing import Any

from measurements.context import Context
from measurements.measurement import Column, Measurement, Summary


def _run(context: Context) -> dict[str, Any]:
  # Every parameter is scaled, biases too: only then is the result invariant.
  pairs = context.search(
    'adaptive_sharpness',
    context.adaptive_operator,
    1,
    'largest',
    'adaptive sharpness',
  )
  return {
    'adaptive_sharpness': pairs.eigenvalues[0],
    'adaptive_sharpness_residual': pairs.residuals[0],
    'adaptive_sharpness_converged': pairs.converged[0],
  }


def _columns(summary: Summary) -> list[Column]:
  return [Column('adaptive', ('adaptive_sharpness',))]


def _reading(summary: Summary) -> str:
  return (
    'adaptive is the largest eigenvalue of T A T with T = |w|, which does not change '
    'when layers are rescaled without changing the function.'
  )


MEASUREMENT = Measurement(
  run=_run,
  order=30,
  columns=_columns,
  reading=_reading,
  notes={
    'adaptive_sharpness': (
      'largest eigenvalue of T H T with T = |w| of every parameter: does not change '
      'when layers are rescaled without changing the function'
    )
  },
)
