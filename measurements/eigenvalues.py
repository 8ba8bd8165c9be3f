"""The extreme eigenvalues: the largest is the sharpness of a network."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from measurements.context import Context
from measurements.measurement import (
  Column,
  Measurement,
  Summary,
  at_least,
  number,
  option,
)
from measurements.network import Network
from measurements.objective import (
  Objective,
  example_curvatures,
  of_examples,
  width,
)
from measurements.registry import Shared
from sam_jax import curvature
from sam_jax.measuring import entries
from training.errors import UsageError
from training.problem import Problem


@dataclasses.dataclass(frozen=True)
class Options:
  """How many."""

  top_k: int = option(5, 'eigenvalues at each end', at_least(1))


# That of the last problem: a sweep measures many networks of one.
_last: list[Objective] = []


def lambda_max(problem: Problem, params: Any, batch_stats: Any) -> dict[str, Any]:
  """The largest Hessian eigenvalue of the training loss, as it is defined everywhere.

  That is the loss over the whole training split in evaluation mode, in float32, or in
  float64 where parameters are, whatever training computed in; the residual
  |H v - lambda v| is at most 1e-4 of the largest absolute eigenvalue. Calls with the
  same problem load the data and compile once.

  Args:
    problem: what is trained.
    params: parameters of its model.
    batch_stats: running batch statistics, possibly empty.

  Returns:
    `lambda_max`, its measured residual `lambda_max_residual`, and
    `lambda_max_converged`.

  Raises:
    NonFiniteError: the parameters or the data hold NaN or infinity.
  """
  options = Shared(dtype=width(params))
  if not _last or _last[0].problem is not problem or _last[0].options != options:
    _last[:] = [Objective(problem, options)]
  network = Network(None, problem, params, batch_stats, 0, {}, pathlib.Path())
  return largest(Context(network, _last[0]))


def largest(context: Context) -> dict[str, Any]:
  """The largest eigenvalue alone."""
  pairs = context.search(
    'lambda_max', context.operator, 1, 'largest', 'lambda_max', verify=False
  )
  return {
    'lambda_max': float(pairs.eigenvalues[0]),
    'lambda_max_residual': float(pairs.residuals[0]),
    'lambda_max_converged': bool(pairs.converged[0]),
  }


def pairs_of(context: Context) -> curvature.Eigenpairs:
  """The eigenpairs at both ends, which other measurements stand on."""
  search = lambda: context.search(
    'eigenpairs', context.operator, context.options.top_k, 'both', 'eigenpairs'
  )
  return context.part('eigenpairs', search)


def _check(context: Context) -> None:
  size = context.operator.size
  if context.options.top_k > size:
    raise UsageError(
      f'--top_k={context.options.top_k}: only {size} parameters are measured; give at '
      'most that.'
    )


def _run(context: Context) -> dict[str, Any]:
  pairs = pairs_of(context)
  return {
    **entries.extremes(pairs, context.options.top_k, context.operator.size),
    **_over_examples(context, pairs),
  }


def _over_examples(
  context: Context, pairs: curvature.Eigenpairs
) -> dict[str, float | None]:
  """Bootstrap standard errors over examples, the eigenvectors held fixed."""
  values = []
  for index in (0, -1):
    direction = context.direction(pairs.eigenvectors[index])
    parts = [
      example_curvatures(context.objective, context.params, direction, batch)
      for batch in context.batches
    ]
    values.append(of_examples(parts, context.batches))
  return entries.extremes_errors(np.stack(values), None, context.options.seed)


def _columns(summary: Summary) -> list[Column]:
  return [
    Column('lambda_max', ('lambda_max',)),
    Column('lambda_min', ('lambda_min',)),
    Column('ratio', ('lambda_max_over_abs_lambda_min',)),
  ]


def _details(summary: Summary) -> list[tuple[str, str]]:
  find = summary.get
  sure = find('all_converged') and find('adaptive_sharpness_converged', True)
  return [
    ('lambda_max', number(find('lambda_max'), '.6g')),
    ('its residual', number(find('lambda_max_residual'), '.1e')),
    ('lambda_min', number(find('lambda_min'), '.6g')),
    ('its residual', number(find('lambda_min_residual'), '.1e')),
    ('lambda_1 / lambda_5', number(find('lambda_1_over_lambda_5'))),
    ('all converged', 'yes' if sure else '-' if find('lambda_max') is None else 'NO'),
  ]


def _reading(summary: Summary) -> str:
  return (
    'lambda_max and lambda_min are its largest and its algebraically smallest '
    'eigenvalue, ratio is lambda_max / |lambda_min|, left out where lambda_min is 0 '
    'within its residual; the residuals |A v - lambda v| are measured, and an '
    'eigenvalue lies within each of them.'
  )


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  order=20,
  check=_check,
  columns=_columns,
  details=_details,
  reading=_reading,
  notes={
    'residual': '|H v - lambda v|, measured: an eigenvalue lies within it of lambda',
    'lambda_min': 'the algebraically smallest eigenvalue',
    'lambda_max_standard_error': (
      'bootstrap over examples with the eigenvector held fixed'
    ),
  },
  hook=largest,
)
