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

  That file holds `rows`, one for each optimizer, radius and combination of what else
  was swept: `optimizer`, `rho` (None for a base optimizer alone), `seeds`, `swept` (the
  other fields' values by name, None where they mean nothing), and numbers, each with
  its standard error over seeds as `NAME_error`; and, if it is new enough, `task` and
  the main `score` of the task: its name, label, scale and unit. It may name runs that
  have `diverged` with their steps; a row of no others has no seeds and no numbers.

  Args:
    workdir: the sweep's folder.

  Returns:
    The table and a note.
  """
  found = json.loads((workdir / RESULTS).read_text())
  rows, score = found['rows'], found.get('score', _ACCURACY)
  headings = _headings(score).items()
  shown = {n: text for n, text in headings if any(n in row for row in rows)}
  where = f'{found["task"]}: ' if 'task' in found else ''
  note = (
    f'{where}mean +- standard error over seeds; losses in evaluation mode, over the '
    'whole split.'
  )
  if diverged := found.get('diverged'):
    names = ', '.join(f'{folder} (step {n})' for folder, n in diverged.items())
    note += f' Diverged, and in no mean: {names}.'
  text = f'{page.markdown_table(_table(rows, shown, score))}\n\n{note}'
  (workdir / TABLE).write_text(f'{text}\n')
  title = f'{where}{_spread(rows)}'
  _figure(workdir / FIGURE, rows, shown, score, title)
  return text


def _spread(rows: list[dict[str, Any]]) -> str:
  """What the figure shows of several seeds."""
  counts = sorted({row['seeds'] for row in rows} - {0})
  if counts == [1]:
    return 'one seed'
  some = f'{counts[0]}' if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'
  return f'mean ± standard error over {some} seeds'


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
  swept = list(rows[0].get('swept', {}))
  cells = [['optimizer', 'rho', *swept, 'seeds', *shown.values()]]
  for row in rows:
    fields = [_text(_value(row, name)) for name in ('rho', *swept)]
    cells.append([row['optimizer'], *fields, str(row['seeds'])])
    cells[-1] += [_cell(row, name, _scale(name, score)) for name in shown]
  return cells


def _value(row: dict[str, Any], name: str) -> Any:
  """The value of what was swept; None where it means nothing."""
  return row['rho'] if name == 'rho' else row.get('swept', {})[name]


def _text(value: Any) -> str:
  """A swept value in a table."""
  if value is None:
    return '-'
  short = f'{value:g}' if isinstance(value, float) else f'{value}'
  return short if isinstance(value, str) or float(short) == value else f'{value}'


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
  title: str,
) -> None:
  """Score, gap and sharpness against what was swept, a curve for each of the others.

  What has no place on that axis is a horizontal line, as the base optimizers of a sweep
  over radii.
  """
  from matplotlib.figure import Figure  # Slow to import, and needed once a sweep.

  across, others = _axes(rows)
  curves: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    curves.setdefault(_curve_label(row, across, others), []).append(row)
  names = [name for name in shown if not name.endswith('_loss')]
  figure = Figure(figsize=(3.6 * len(names), 3.6), layout='constrained')
  panels = figure.subplots(1, len(names), squeeze=False)[0]
  places = _places({_value(row, across) for row in rows} - {None})
  for axes, name in zip(panels, names, strict=True):
    for index, (label, chosen) in enumerate(curves.items()):
      chosen = [row for row in chosen if name in row]
      if chosen:
        x = [places.get(_value(row, across)) for row in chosen]
        _curve(axes, x, chosen, name, _scale(name, score), f'C{index}', label)
    axes.set(xlabel=across, ylabel=shown[name])
    _ticks(axes, places)
    axes.grid(alpha=0.3)
  panels[0].legend(fontsize=8, framealpha=0.6)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)


def _axes(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
  """What the figure has across, and what else differs; the first of most values."""
  counts = {
    name: len({_value(row, name) for row in rows} - {None})
    for name in ('rho', *rows[0].get('swept', {}))
  }
  across = max(counts, key=lambda name: counts[name])
  return across, [n for n, count in counts.items() if n != across and count > 1]


def _curve_label(row: dict[str, Any], across: str, others: list[str]) -> str:
  """The legend of the curve that a row lies on."""
  values = {name: _value(row, name) for name in others}
  words = [f'{n} {_text(x)}' for n, x in values.items() if x is not None]
  return ', '.join([row['optimizer'], *words])


def _places(values: set[Any]) -> dict[Any, float]:
  """Where the swept values lie on the axis: numbers by size, words one by one."""
  if any(isinstance(value, str) for value in values):
    return {value: place for place, value in enumerate(sorted(values, key=str))}
  return {value: float(value) for value in sorted(values)}


def _curve(
  axes: Any,
  places: list[float | None],
  rows: list[dict[str, Any]],
  name: str,
  scale: float,
  colour: str,
  label: str,
) -> None:
  """Numbers at their places, or across where they have none."""
  values = [scale * row[name] for row in rows]
  errors = [scale * (row[f'{name}_error'] or 0) for row in rows]
  if places[0] is None:
    low, high = values[0] - errors[0], values[0] + errors[0]
    axes.axhline(values[0], color=colour, label=label)
    band = f'{label}, ± standard error' if errors[0] else None
    axes.axhspan(low, high, color=colour, alpha=0.15, lw=0, label=band)
    return
  order = sorted(range(len(rows)), key=lambda index: places[index])
  x, y, spread = ([some[i] for i in order] for some in (places, values, errors))
  axes.errorbar(x, y, spread, fmt='o-', color=colour, label=label, capsize=3)


def _ticks(axes: Any, places: dict[Any, float]) -> None:
  """Ticks at the values that were swept."""
  from matplotlib.ticker import NullLocator

  if not any(places.values()):
    return
  words = any(isinstance(value, str) for value in places)
  logarithmic = not words and min(places.values()) > 0
  axes.set_xscale('log' if logarithmic else 'linear')
  axes.set_xticks(list(places.values()), [_text(value) for value in places])
  axes.xaxis.set_minor_locator(NullLocator())
