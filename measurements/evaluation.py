"""Loss and score of both splits in evaluation mode, with standard errors."""

from __future__ import annotations

import math
from typing import Any

from measurements.context import Context
from measurements.measurement import Column, Measurement, Summary
from measurements.objective import SPLITS, example_scores, of_examples
from sam_jax.measuring.entries import mean_with_error

# Summaries of earlier versions, which do not name their score, hold accuracies.
_ACCURACY = {'name': 'accuracy', 'label': 'accuracy', 'scale': 100, 'unit': '%'}


def score_of(summary: Summary) -> dict[str, Any]:
  """What a summary says of its score: name, label, scale and unit."""
  return (summary.get('evaluation') or {}).get('score', _ACCURACY)


def score_heading(split: str, score: dict[str, Any]) -> str:
  """The heading of a score over a column."""
  label = 'acc.' if score['name'] == 'accuracy' else score['label']
  return ' '.join(filter(None, (split, label, score['unit'])))


def _run(context: Context) -> dict[str, Any]:
  return {'evaluation': _evaluation(context)}


def _evaluation(context: Context) -> dict[str, Any]:
  score = context.network.problem.scores.main
  result: dict[str, Any] = {}
  for split in SPLITS:
    batches = context.examples(split, context.options.batch_size, 0)
    parts = [
      example_scores(context.objective, context.params, batch) for batch in batches
    ]
    for name, values in zip(
      ('loss', score.name), zip(*parts, strict=True), strict=True
    ):
      values = of_examples(values, batches)
      result |= mean_with_error(f'{split}_{name}', values)
  result['generalization_gap'] = result['test_loss'] - result['train_loss']
  result['generalization_gap_standard_error'] = math.hypot(
    *(result[f'{split}_loss_standard_error'] for split in SPLITS)
  )
  named = {name: getattr(score, name) for name in _ACCURACY}
  return {**result, 'score': named}


def _hook(context: Context) -> dict[str, Any]:
  found = _evaluation(context)
  del found['score']
  return found


def _columns(summary: Summary) -> list[Column]:
  score, columns = score_of(summary), []
  for split in SPLITS:
    columns.append(Column(f'{split} loss', ('evaluation', f'{split}_loss')))
    heading = score_heading(split, score)
    path = ('evaluation', f'{split}_{score["name"]}')
    columns.append(Column(heading, path, score['scale']))
  return [*columns, Column('gap', ('evaluation', 'generalization_gap'))]


def _reading(summary: Summary) -> str:
  score = score_of(summary)
  scores = 'accuracies' if score['name'] == 'accuracy' else f'{score["label"]}s'
  return (
    f'Losses and {scores} are in evaluation mode over the whole splits; gap is test '
    'loss - train loss.'
  )


MEASUREMENT = Measurement(
  run=_run, order=10, columns=_columns, reading=_reading, hook=_hook
)
