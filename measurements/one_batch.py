"""The extremes of single batches of the training size, as published figures have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from measurements.context import Context
from measurements.measurement import (
  Measurement,
  Section,
  Summary,
  at_least,
  number,
  option,
)
from sam_jax.measuring import entries
from training import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Options:
  """How many batches."""

  one_batch_repeats: int = option(
    5,
    'also measure single batches of the training size, so many; 0: none',
    at_least(0),
  )


def _run(context: Context) -> dict[str, Any]:
  repeats, split = context.options.one_batch_repeats, context.options.split
  if not repeats:
    return {'one_batch': None}
  size = context.network.config.batch_size
  available = getattr(context.network.problem, split).num_examples
  found = []
  batches = context.examples(split, size, min(repeats * size, available))
  for index, batch in enumerate(batches):
    if problem_lib.num_examples(batch) < size:
      continue
    operator = context.finished(context.over([batch]))
    context.count(index, len(batches))
    title = f'batch {index + 1} of {len(batches)}'
    pairs = context.search(
      f'one_batch_{index}', operator, 1, 'both', title, verify=False
    )
    found.append(entries.extremes(pairs, 1, operator.size))
  return {'one_batch': _over_batches(found, size) if found else None}


def _over_batches(found: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
  """Extremes of single batches, in numbers."""
  top, bottom, residuals, ratios = (
    np.array([extremes[name] for extremes in found], np.float64)
    for name in (
      'lambda_max',
      'lambda_min',
      'lambda_min_residual',
      'lambda_max_over_abs_lambda_min',
    )
  )
  # A batch whose lambda_min is next to 0 has any ratio: so its median and range. Where
  # it is 0 within its residual the ratio is larger than can be told.
  ratios = np.where(np.isnan(ratios), np.inf, ratios)
  several = len(found) > 1
  return {
    'batch_size': batch_size,
    'num_batches': len(found),
    'lambda_max': top.mean(),
    'lambda_max_standard_deviation': top.std(ddof=1) if several else None,
    'lambda_min': bottom.mean(),
    'lambda_min_standard_deviation': bottom.std(ddof=1) if several else None,
    'lambda_min_residual': residuals.max(),
    'all_converged': all(extremes['all_converged'] for extremes in found),
    'ratio_median': np.median(ratios),
    'ratio_range': [ratios.min(), ratios.max()],
  }


def _sections(summaries: Mapping[str, Summary]) -> list[Section]:
  headings = ['lambda_max', 'lambda_min', 'its residual', 'ratio']
  rows = [['run', 'examples', 'batches', *headings]]
  for name, summary in summaries.items():
    one = summary.get('one_batch')
    if one:
      low, high = one['ratio_range']
      ratio = number(one['ratio_median'])
      if low != high:
        ratio += f' ({number(low)} to {number(high)})'
      rows.append([name, str(one['batch_size']), str(one['num_batches'])])
      rows[-1] += [_spread(one, 'lambda_max'), _spread(one, 'lambda_min')]
      rows[-1] += [number(one['lambda_min_residual']), ratio]
  return [Section('Single batches', rows, _TEXT)] if rows[1:] else []


def _spread(one: Mapping[str, Any], name: str) -> str:
  deviation = one[f'{name}_standard_deviation']
  spread = '' if deviation is None else f' ± {number(deviation)}'
  return number(one[name]) + spread


_TEXT = (
  'The Hessian of one training batch, as published one-batch figures have it; ± is the '
  'standard deviation over batches, the residual the largest, the ratio is the median '
  'with its range, - where lambda_min is 0 within its residual. lambda_min '
  'shrinks faster than lambda_max as the Hessian averages over more examples, so the '
  'ratio grows with their number.'
)

MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  order=90,
  switch='one_batch_repeats',
  sections=_sections,
  notes={
    'one_batch': (
      'extremes of the Hessian of single batches of the training size: mean and '
      'standard deviation over batches; of the ratio the median and the range'
    )
  },
)
