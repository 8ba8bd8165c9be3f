"""The mean rise of the loss under noise in the parameters."""

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
  option,
)
from training import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Options:
  """The noise; `adaptive_ball` of the worst case holds for it too."""

  average_case_sigma: float = option(
    0.01,
    'standard deviation of the noise under which the loss is averaged; 0: none',
    not_negative,
  )
  average_case_samples: int = option(20, 'draws of that noise', at_least(2))


def _run(context: Context) -> dict[str, Any]:
  options = context.options
  if not options.average_case_sigma:
    return estimate('average_case_sharpness', None)
  found = sam_jax.sharpness.average_case(
    context.objective.loss,
    context.params,
    context.batches,
    options.average_case_sigma,
    adaptive=options.adaptive_ball,
    num_samples=options.average_case_samples,
    key=context.key(5),
    weight=problem_lib.num_examples,
  )
  return estimate('average_case_sharpness', found)


def _columns(summary: Summary) -> list[Column]:
  return [Column('average case', ('average_case_sharpness',))]


def _reading(summary: Summary) -> str:
  options = summary['options']
  unit = ' in units of |w|' if options['adaptive_ball'] else ''
  return (
    'average case is the mean rise of the loss under Gaussian noise of standard '
    f'deviation {options["average_case_sigma"]:g}{unit} (± over draws).'
  )


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  order=70,
  switch='average_case_sigma',
  columns=_columns,
  reading=_reading,
  notes={
    'average_case_sharpness': (
      'mean rise of the loss under Gaussian noise in the parameters, standard error '
      'over draws'
    )
  },
)
