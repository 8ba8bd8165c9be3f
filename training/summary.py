"""The numbers a run ends with: `summary.json`."""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

from training import config as config_lib
from training import metrics as metrics_lib
from training.config import Config

FILE_NAME = 'summary.json'


def write(
  workdir: pathlib.Path,
  config: Config,
  *,
  train: dict[str, float],
  test: dict[str, float],
  facts: dict[str, Any],
) -> dict[str, Any]:
  """Writes `summary.json`.

  Args:
    workdir: the run's folder, with its metrics.
    config: the run's configuration.
    train: loss and accuracy of the training split in evaluation mode.
    test: the same of the test split.
    facts: wall time, parameter count, device and the like.

  Returns:
    What is written.
  """
  lines = [x for x in metrics_lib.read(workdir) if x['split'] == 'test']
  best = max(lines, key=lambda line: line['accuracy'])
  summary = {
    'task': config.task,
    'optimizer': config.optimizer,
    'base_optimizer': config.base_optimizer,
    'rho': config.rho,
    'seed': config.seed,
    'final': {
      'train_loss': train['loss'],
      'train_accuracy': train['accuracy'],
      'test_loss': test['loss'],
      'test_accuracy': test['accuracy'],
      'generalization_gap': test['loss'] - train['loss'],
    },
    'best': {
      'test_accuracy': best['accuracy'],
      'test_accuracy_epoch': best['epoch'],
      'test_loss': min(line['loss'] for line in lines),
    },
    'note': (
      'losses and accuracies are means over the whole split in evaluation mode; a loss '
      'is KL(labels smoothed by label_smoothing || softmax), which is cross-entropy '
      'without smoothing; generalization_gap = test_loss - train_loss'
    ),
    **facts,
    'versions': config_lib.versions(),
  }
  config_lib.write_json(workdir / FILE_NAME, summary)
  return summary


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
  final = summary['final']
  radius = '' if summary['rho'] is None else f' (rho {summary["rho"]:g})'
  return '\n'.join(
    [
      f'{summary["task"]}, {summary["optimizer"]}{radius}, seed {summary["seed"]}: '
      f'{summary["steps"]} steps, {summary["num_parameters"]:,} parameters, '
      f'{summary["wall_time_seconds"]:.1f} s on {summary["device"]}',
      f'  train loss {final["train_loss"]:.4f}  accuracy '
      f'{100 * final["train_accuracy"]:.2f} %',
      f'  test  loss {final["test_loss"]:.4f}  accuracy '
      f'{100 * final["test_accuracy"]:.2f} %  (best '
      f'{100 * summary["best"]["test_accuracy"]:.2f} % in epoch '
      f'{summary["best"]["test_accuracy_epoch"]})',
      f'  generalization gap (test - train loss) {final["generalization_gap"]:.4f}; '
      f'macro F1 {summary["test_scores"]["macro_f1"]:.4f}{_waiting(summary)}',
    ]
  )


def _waiting(summary: dict[str, Any]) -> str:
  share = summary.get('input_wait_share')  # Earlier versions did not measure it.
  return '' if share is None else f'; steps waited for input {100 * share:.2f} %'
