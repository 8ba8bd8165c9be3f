"""How the sharpness of one run changed while it was trained."""

from __future__ import annotations

import pathlib
from typing import Any

from training import config as config_lib
from training import report, sharpness

RESULTS, FIGURE = 'over_training.json', 'over_training.png'
_FIELDS = (
  'lambda_max',
  'lambda_max_residual',
  'lambda_max_standard_error',
  'lambda_min',
  'adaptive_sharpness',
  'trace',
  'trace_standard_error',
)


def folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Where the measurement of one step goes."""
  return workdir / sharpness.FOLDER / f'step_{step:08d}'


def write(workdir: pathlib.Path, summaries: list[dict[str, Any]], title: str) -> str:
  """Writes the numbers by step and their picture into `hessian/`.

  Args:
    workdir: the run's folder.
    summaries: of its steps, ascending.
    title: above the picture.

  Returns:
    A table of the steps.
  """
  out = workdir / sharpness.FOLDER
  names = ('train_loss', 'test_loss', 'test_accuracy')
  entries = [
    {
      'step': summary['step'],
      **{name: summary[name] for name in _FIELDS},
      **{name: summary['evaluation'][name] for name in names},
    }
    for summary in summaries
  ]
  config_lib.write_json(out / RESULTS, entries)
  _figure(out / FIGURE, entries, title)
  return report.markdown_table(_rows(entries))


def _rows(entries: list[dict[str, Any]]) -> report.Rows:
  names = ('train loss', 'test acc. %', 'lambda_max', 'lambda_min', 'adaptive')
  return [
    ['step', *names],
    *(
      [
        f'{entry["step"]:,}',
        f'{entry["train_loss"]:.4f}',
        f'{100 * entry["test_accuracy"]:.2f}',
        f'{entry["lambda_max"]:.5g} ± {entry["lambda_max_standard_error"]:.2g}',
        f'{entry["lambda_min"]:.4g}',
        f'{entry["adaptive_sharpness"]:.4g}',
      ]
      for entry in entries
    ),
  ]


def _figure(path: pathlib.Path, entries: list[dict[str, Any]], title: str) -> None:
  from matplotlib.figure import Figure  # Slow to import, and needed once.

  figure = Figure(figsize=(9, 3.4), layout='constrained')
  panels = figure.subplots(1, 2)
  steps = [entry['step'] for entry in entries]
  top = [entry['lambda_max'] for entry in entries]
  errors = [entry['lambda_max_standard_error'] for entry in entries]
  panels[0].errorbar(steps, top, errors, fmt='o-', color='C0', label='lambda_max')
  adaptive = [entry['adaptive_sharpness'] for entry in entries]
  panels[0].plot(steps, adaptive, 's--', color='C1', label='adaptive sharpness')
  panels[0].set(xlabel='step', ylabel='largest eigenvalue', yscale='log')
  for name, style in (('train_loss', 'o-'), ('test_loss', 's--')):
    values = [entry[name] for entry in entries]
    panels[1].plot(steps, values, style, label=name.replace('_', ' '))
  panels[1].set(xlabel='step', ylabel='loss (nats)', yscale='log')
  for panel in panels:
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
