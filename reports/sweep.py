"""A sweep's table and figure, from its `sweep.json`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from sam_jax.measuring import page
from sam_jax.measuring.page import Rows

RESULTS, TABLE, FIGURE = 'sweep.json', 'sweep.md', 'sweep.png'
# Sweeps of earlier versions, which do not name their score, hold accuracies.
_ACCURACY = {'name': 'accuracy', 'label': 'accuracy', 'scale': 100, 'unit': '%'}


def write(workdir: pathlib.Path) -> str:
  """Writes `sweep.md` and `sweep.png` beside `sweep.json`.

  That file holds `rows`, one for each optimizer and radius: `optimizer`, `rho` (None
  for a base optimizer alone), `seeds`, and numbers, each with its standard error over
  seeds as `NAME_error`; and, if it is new enough, `task` and the main `score` of the
  task: its name, label, scale and unit.

  Args:
    workdir: the sweep's folder.

  Returns:
    The table and a note.
  """
  found = json.loads((workdir / RESULTS).read_text())
  rows, score = found['rows'], found.get('score', _ACCURACY)
  shown = {name: text for name, text in _headings(score).items() if name in rows[0]}
  where = f'{found["task"]}: ' if 'task' in found else ''
  note = (
    f'{where}mean +- standard error over seeds; losses in evaluation mode, over the '
    'whole split.'
  )
  text = f'{page.markdown_table(_table(rows, shown, score))}\n\n{note}'
  (workdir / TABLE).write_text(f'{text}\n')
  _figure(workdir / FIGURE, rows, shown, score)
  return text


def _headings(score: dict[str, Any]) -> dict[str, str]:
  unit = f' ({score["unit"]})' if score['unit'] else ''
  return {
    'train_loss': 'train loss',
    'test_loss': 'test loss',
    f'test_{score["name"]}': f'test {score["label"]}{unit}',
    'generalization_gap': 'gap (test - train loss)',
    'lambda_max': 'lambda_max',
  }


def _scale(name: str, score: dict[str, Any]) -> float:
  return score['scale'] if name == f'test_{score["name"]}' else 1


def _table(
  rows: list[dict[str, Any]], shown: dict[str, str], score: dict[str, Any]
) -> Rows:
  cells = [['optimizer', 'rho', 'seeds', *shown.values()]]
  for row in rows:
    rho = '-' if row['rho'] is None else f'{row["rho"]:g}'
    cells.append([row['optimizer'], rho, str(row['seeds'])])
    cells[-1] += [_cell(row, name, _scale(name, score)) for name in shown]
  return cells


def _cell(row: dict[str, Any], name: str, scale: float) -> str:
  if row.get(name) is None:
    return '-'
  digits = 2 if scale != 1 or name == 'lambda_max' else 4
  text = f'{scale * row[name]:.{digits}f}'
  error = row[f'{name}_error']
  return text if error is None else f'{text} +- {scale * error:.{digits}f}'


def _figure(
  path: pathlib.Path,
  rows: list[dict[str, Any]],
  shown: dict[str, str],
  score: dict[str, Any],
) -> None:
  """Score, gap and sharpness against rho; base optimizers as horizontal lines."""
  from matplotlib.figure import Figure  # Slow to import, and needed once a sweep.

  names = [name for name in shown if not name.endswith('_loss')]
  figure = Figure(figsize=(3.6 * len(names), 3.3), layout='constrained')
  panels = figure.subplots(1, len(names), squeeze=False)[0]
  for axes, name in zip(panels, names, strict=True):
    for index, optimizer in enumerate(dict.fromkeys(r['optimizer'] for r in rows)):
      chosen = [r for r in rows if r['optimizer'] == optimizer and name in r]
      if chosen:
        _curve(axes, chosen, name, _scale(name, score), f'C{index}')
    axes.set(xlabel='rho', ylabel=shown[name])
    _radii(axes, sorted({row['rho'] for row in rows if row['rho'] is not None}))
    axes.grid(alpha=0.3)
  panels[0].legend(frameon=False)
  figure.savefig(path, dpi=120)


def _curve(
  axes: Any, rows: list[dict[str, Any]], name: str, scale: float, colour: str
) -> None:
  """One optimizer's numbers against rho, or across where it has none."""
  label = rows[0]['optimizer']
  values = [scale * row[name] for row in rows]
  errors = [scale * (row[f'{name}_error'] or 0) for row in rows]
  if rows[0]['rho'] is None:
    low, high = values[0] - errors[0], values[0] + errors[0]
    axes.axhline(values[0], color=colour, label=label)
    axes.axhspan(low, high, color=colour, alpha=0.15, lw=0)
    return
  radii = [row['rho'] for row in rows]
  axes.errorbar(radii, values, errors, fmt='o-', color=colour, label=label, capsize=3)


def _radii(axes: Any, swept: list[float]) -> None:
  """Ticks at the radii that were swept."""
  from matplotlib.ticker import NullLocator

  if any(swept):
    axes.set_xscale('linear' if 0 in swept else 'log')
    axes.set_xticks(swept, [f'{radius:g}' for radius in swept])
    axes.xaxis.set_minor_locator(NullLocator())
