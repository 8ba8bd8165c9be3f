"""The largest rise of the loss within a ball: what SAM minimises."""

from __future__ import annotations

import dataclasses
from typing import Any

import sam_jax
from measurements.context import Context
from measurements.measurement import (
  Column,
  Measurement,
  Summary,
  at_least,
  estimate,
  not_negative,
  one_of,
  option,
)
from sam_jax.measuring import entries
from training import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Options:
  """The ball, and who shares a perturbation in it."""

  worst_case_rho: float = option(
    0.05,
    'radius of the ball in which the loss is maximised; 0: not measured',
    not_negative,
  )
  worst_case_norm: str = option(
    'l2', 'norm of that ball, l2 or linf', one_of('l2', 'linf')
  )
  worst_case_group: int = option(
    128,
    'examples that share one worst perturbation: the m of m-sharpness',
    at_least(1),
  )
  worst_case_steps: int = option(20, 'steps of gradient ascent to it', at_least(1))
  adaptive_ball: bool = option(
    False, 'the ball and the noise are in units of |w|, parameter by parameter'
  )


def _run(context: Context) -> dict[str, Any]:
  options = context.options
  if not options.worst_case_rho:
    return estimate('worst_case_sharpness', None)
  found = sam_jax.sharpness.worst_case(
    context.objective.loss,
    context.params,
    context.examples(options.split, options.worst_case_group, options.num_examples),
    options.worst_case_rho,
    norm=options.worst_case_norm,
    adaptive=options.adaptive_ball,
    num_steps=options.worst_case_steps,
    key=context.key(4),
    weight=problem_lib.num_examples,
  )
  return entries.estimate_over_groups('worst_case_sharpness', found)


def _columns(summary: Summary) -> list[Column]:
  return [Column('worst case', ('worst_case_sharpness',))]


def _reading(summary: Summary) -> str:
  options = summary['options']
  unit = ' in units of |w|' if options['adaptive_ball'] else ''
  return (
    'worst case is the largest rise of the loss within '
    f'{options["worst_case_norm"]} distance {options["worst_case_rho"]:g}{unit}, for '
    f'groups of {options["worst_case_group"]} examples (± over groups).'
  )


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  order=60,
  switch='worst_case_rho',
  columns=_columns,
  reading=_reading,
  notes={
    'worst_case_sharpness': (
      'largest rise of the loss within the ball, found by gradient ascent for each '
      'group of examples: mean and standard error over groups'
    )
  },
)
