"""How the sharpness of one run changed while it was trained."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import measurements
from measurements.evaluation import score_heading, score_of
from measurements.measurement import Rows, Summary, number, with_error
from sam_jax.measuring import page
from training import config as config_lib

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
  return workdir / measurements.FOLDER / f'step_{step:08d}'


def write(workdir: pathlib.Path, summaries: Sequence[Summary], title: str) -> str:
  """Writes the numbers by step and their picture into `hessian/`.

  Args:
    workdir: the run's folder.
    summaries: of its steps, ascending; what was not measured is null.
    title: above the picture.

  Returns:
    A table of the steps.
  """
  out = workdir / measurements.FOLDER
  score = score_of(summaries[0])
  names = ('train_loss', 'test_loss', f'test_{score["name"]}')
  entries = [
    {
      'step': summary['step'],
      **{name: summary.get(name) for name in _FIELDS},
      **{name: (summary.get('evaluation') or {}).get(name) for name in names},
    }
    for summary in summaries
  ]
  config_lib.write_json(out / RESULTS, entries)
  _figure(out / FIGURE, entries, title)
  return page.markdown_table(_rows(entries, score))


def _rows(entries: list[dict[str, Any]], score: dict[str, Any]) -> Rows:
  def scaled(value: float | None) -> float | None:
    return None if value is None else score['scale'] * value

  names = ('train loss', score_heading('test', score))
  return [
    ['step', *names, 'lambda_max', 'lambda_min', 'adaptive'],
    *(
      [
        f'{entry["step"]:,}',
        number(entry['train_loss'], '.4f'),
        number(scaled(entry[f'test_{score["name"]}'])),
        with_error(entry['lambda_max'], entry['lambda_max_standard_error'], '.5g'),
        number(entry['lambda_min']),
        number(entry['adaptive_sharpness']),
      ]
      for entry in entries
    ),
  ]


def _figure(path: pathlib.Path, entries: list[dict[str, Any]], title: str) -> None:
  from matplotlib.figure import Figure  # Slow to import, and needed once.

  figure = Figure(figsize=(9, 3.4), layout='constrained')
  for panel, names, label in zip(
    figure.subplots(1, 2),
    (('lambda_max', 'adaptive_sharpness'), ('train_loss', 'test_loss')),
    ('largest eigenvalue', 'loss'),
    strict=True,
  ):
    for index, (name, style) in enumerate(zip(names, ('o-', 's--'), strict=True)):
      known = [entry for entry in entries if entry[name] is not None]
      steps, values = ([entry[key] for entry in known] for key in ('step', name))
      errors = [entry.get(f'{name}_standard_error') or 0 for entry in known]
      if known:
        panel.errorbar(
          steps,
          values,
          errors if any(errors) else None,
          fmt=style,
          color=f'C{index}',
          label=name.replace('_', ' ') if '_m' not in name else name,
        )
        panel.set_yscale('log')
        panel.legend(frameon=False)
    panel.set(xlabel='step', ylabel=label)
    panel.grid(alpha=0.3)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
