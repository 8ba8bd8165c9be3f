"""The trace, by random probes beside the known eigenvalues."""

from __future__ import annotations

import dataclasses
from typing import Any

from measurements import eigenvalues
from measurements.context import Context
from measurements.measurement import (
  Measurement,
  Summary,
  at_least,
  estimate,
  option,
  with_error,
)
from sam_jax import curvature


@dataclasses.dataclass(frozen=True)
class Options:
  """How many products."""

  trace_matvecs: int = option(30, 'products for the trace', at_least(2))


def _run(context: Context) -> dict[str, Any]:
  return _trace(context, eigenvalues.pairs_of(context))


def _trace(context: Context, pairs: curvature.Eigenpairs | None) -> dict[str, Any]:
  total = context.options.trace_matvecs
  with context.counted('trace', context.operator, total) as products:
    found = curvature.trace(products, total, key=context.key(2), pairs=pairs)
  return estimate('trace', found)


def _details(summary: Summary) -> list[tuple[str, str]]:
  error = summary.get('trace_standard_error')
  return [('trace', with_error(summary.get('trace'), error, '.5g'))]


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  needs=('eigenvalues',),
  order=50,
  details=_details,
  hook=lambda context: _trace(context, None),
)
