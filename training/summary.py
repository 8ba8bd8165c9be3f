"""The numbers a run ends with: `summary.json`."""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

import numpy as np

from training import config as config_lib
from training import curves
from training import metrics as metrics_lib
from training.config import Config
from training.problem import Problem, Score

FILE_NAME = 'summary.json'
_ACCURACY = {'name': 'accuracy', 'label': 'accuracy', 'scale': 100, 'unit': '%'}


def write(
  workdir: pathlib.Path,
  config: Config,
  score: Score,
  *,
  train: dict[str, float],
  test: dict[str, float],
  facts: dict[str, Any],
) -> dict[str, Any]:
  """Writes `summary.json`.

  Args:
    workdir: the run's folder, with its metrics.
    config: the run's configuration.
    score: the problem's main score.
    train: loss and main score of the training split in evaluation mode.
    test: the same of the test split.
    facts: wall time, parameter count, device and the like.

  Returns:
    What is written.
  """
  lines = [x for x in metrics_lib.read(workdir) if x['split'] == 'test']
  choose = max if score.higher_is_better else min
  best = choose(lines, key=lambda line: line[score.name])
  summary = {
    'task': config.task,
    'optimizer': config.optimizer,
    'base_optimizer': config.base_optimizer,
    'rho': config.rho,
    'hyperparameters': config.hyperparameters,
    'm_sharpness': config.m_sharpness,
    'grad_accum_steps': config.grad_accum_steps,
    'seed': config.seed,
    'final': {
      'train_loss': train['loss'],
      f'train_{score.name}': train[score.name],
      'test_loss': test['loss'],
      f'test_{score.name}': test[score.name],
      'generalization_gap': test['loss'] - train['loss'],
    },
    'best': {
      f'test_{score.name}': best[score.name],
      f'test_{score.name}_epoch': best['epoch'],
      'test_loss': min(line['loss'] for line in lines),
    },
    'score': score._asdict(),
    'note': (
      'losses and scores are means over the whole split in evaluation mode; '
      'generalization_gap = test_loss - train_loss'
    ),
    **facts,
    'versions': config_lib.versions(),
  }
  config_lib.write_json(workdir / FILE_NAME, summary)
  return summary


def finish(
  workdir: pathlib.Path,
  config: Config,
  problem: Problem,
  *,
  train: dict[str, float],
  test: dict[str, float],
  totals: dict[str, np.ndarray],
  facts: dict[str, Any],
) -> dict[str, Any]:
  """Draws what a run that is over has to show, and writes `summary.json`.

  Args:
    workdir: the run's folder, with all its metrics.
    config: the run's configuration.
    problem: what was trained.
    train: loss and main score of the training split in evaluation mode.
    test: the same of the test split.
    totals: the sums over the test split that further scores are made of.
    facts: wall time, parameter count, device and the like.

  Returns:
    What is written.
  """
  scores, title = problem.scores, config_lib.title(config)
  found = scores.summarize(totals)
  lines = metrics_lib.read(workdir)
  curves.save(workdir, lines, title, scores.main, problem.loss_name)
  scores.draw(workdir, found, title)
  facts = {
    **facts,
    'epochs': config.epochs,
    'num_train_examples': problem.train.num_examples,
    'num_test_examples': problem.test.num_examples,
    'test_scores': found,
    'test_scores_text': scores.describe(found),
  }
  return write(workdir, config, scores.main, train=train, test=test, facts=facts)


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished run, or None; a damaged one is written again."""
  path = pathlib.Path(workdir) / FILE_NAME
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError:
    warnings.warn(f'{path} is damaged and is made anew.', stacklevel=2)
    return None


def describe(summary: dict[str, Any]) -> str:
  """A summary in a few lines of text."""
  final, best = summary['final'], summary['best']
  # Earlier versions knew classification only.
  score = Score(**summary.get('score', _ACCURACY))
  radius = '' if summary['rho'] is None else f' (rho {summary["rho"]:g})'
  more = summary.get('test_scores_text', '')
  return '\n'.join(
    [
      f'{summary["task"]}, {summary["optimizer"]}{radius}, seed {summary["seed"]}: '
      f'{summary["steps"]} steps, {summary["num_parameters"]:,} parameters, '
      f'{summary["wall_time_seconds"]:.1f} s on {summary["device"]}',
      f'  train loss {final["train_loss"]:.4f}  '
      f'{score.show(final[f"train_{score.name}"])}',
      f'  test  loss {final["test_loss"]:.4f}  '
      f'{score.show(final[f"test_{score.name}"])}  (best '
      f'{score.format(best[f"test_{score.name}"])} in epoch '
      f'{best[f"test_{score.name}_epoch"]})',
      f'  generalization gap (test - train loss) {final["generalization_gap"]:.4f}'
      f'{"; " + more if more else ""}{_waiting(summary)}',
      *_measured(summary),
    ]
  )


def _waiting(summary: dict[str, Any]) -> str:
  share = summary.get('input_wait_share')  # Earlier versions did not measure it.
  return '' if share is None else f'; steps waited for input {100 * share:.2f} %'


def _measured(summary: dict[str, Any]) -> list[str]:
  """A line for what was measured during training."""
  return [
    f'  {name} took {100 * found["share_of_wall_time"]:.1f} % of the time'
    f'{"; " + found["text"] if found.get("text") else ""}'
    for name, found in summary.get('during_training', {}).items()
  ]
