"""Compares the sharpness of several trained networks: a table and figures."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import statistics
from typing import Any, NamedTuple

from sam_jax import landscape, plotting
from training import config as config_lib
from training import sharpness
from training.config import Config

TABLE, RESULTS = 'comparison.md', 'comparison.json'


class Run(NamedTuple):
  """A measured run."""

  workdir: pathlib.Path
  config: Config
  summary: dict[str, Any]


class _Column(NamedTuple):
  """A column of the table: its heading, where it is found, and how it is shown."""

  heading: str
  path: tuple[str, ...]
  scale: float = 1.0


_COLUMNS = (
  _Column('train loss', ('evaluation', 'train_loss')),
  _Column('train acc. %', ('evaluation', 'train_accuracy'), 100),
  _Column('test loss', ('evaluation', 'test_loss')),
  _Column('test acc. %', ('evaluation', 'test_accuracy'), 100),
  _Column('gap', ('evaluation', 'generalization_gap')),
  _Column('lambda_max', ('lambda_max',)),
  _Column('lambda_min', ('lambda_min',)),
  _Column('ratio', ('lambda_max_over_abs_lambda_min',)),
  _Column('adaptive', ('adaptive_sharpness',)),
)


def write(runs: list[Run], out: pathlib.Path) -> str:
  """Writes `comparison.md`, `comparison.json` and the side-by-side figures.

  Args:
    runs: measured runs; those that differ by their seed only are averaged.
    out: folder to write to, made where it is missing.

  Returns:
    The table that compares.
  """
  out.mkdir(parents=True, exist_ok=True)
  groups = _groups(runs)
  table = _table(groups)
  parts = [
    '# Comparison',
    table,
    _reading(groups),
    '## How sure each run is',
    _certainty(runs),
    _CERTAINTY_NOTE,
    '## Single batches',
    _single_batches(runs),
    _SINGLE_NOTE,
  ]
  (out / TABLE).write_text('\n\n'.join(parts) + '\n')
  config_lib.write_json(
    out / RESULTS,
    {
      name: {str(run.workdir): run.summary for run in members}
      for name, members in groups.items()
    },
  )
  _figures(groups, out)
  return table


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
  """Runs by name; a group holds the seeds of one configuration."""
  found: dict[Config, list[Run]] = {}
  for run in runs:
    neutral = {
      field.name: field.default
      for field in dataclasses.fields(Config)
      if field.metadata['may_change'] or field.name == 'seed'
    }
    found.setdefault(dataclasses.replace(run.config, **neutral), []).append(run)
  labels = [_label(config) for config in found]
  if len(set(labels)) < len(labels):
    labels = _short_names([members[0].workdir for members in found.values()])
  return dict(zip(labels, found.values(), strict=True))


def _label(config: Config) -> str:
  radius = '' if config.rho is None else f', rho {config.rho:g}'
  base = config.base_optimizer
  over = f' over {base}' if base and base != config.optimizer else ''
  return f'{config.optimizer}{over}{radius}'


def _short_names(workdirs: list[pathlib.Path]) -> list[str]:
  """Workdirs without the folders they share."""
  paths = [path.absolute() for path in workdirs]
  if len(set(paths)) < 2:
    return [path.name for path in paths]
  shared = os.path.commonpath(paths)
  return [os.path.relpath(path, shared) for path in paths]


def _table(groups: dict[str, list[Run]]) -> str:
  rows = [['run', *(column.heading for column in _COLUMNS)]]
  for name, members in groups.items():
    seeds = f' ({len(members)} seeds)' if len(members) > 1 else ''
    rows.append([name + seeds, *(_cell(members, column) for column in _COLUMNS)])
  return _markdown(rows)


def _cell(members: list[Run], column: _Column) -> str:
  """Mean over seeds with its standard error; of one run, that over examples."""
  values = [_get(run.summary, column.path) for run in members]
  values = [value for value in values if value is not None]
  if not values:
    return '-'
  if len(members) > 1:
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if values[1:] else None
  else:
    mean = values[0]
    *parents, name = column.path
    error = _get(members[0].summary, (*parents, f'{name}_standard_error'))
  mean *= column.scale
  if error is None:
    return _number(mean)
  error *= column.scale
  digits = _decimals(error)
  return f'{mean:.{digits}f} ± {error:.{digits}f}'


def _decimals(error: float) -> int:
  """Decimals that show two digits of an error."""
  return max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4


def _get(summary: dict[str, Any], path: tuple[str, ...]) -> Any:
  for name in path:
    summary = (summary or {}).get(name)
  return summary


def _reading(groups: dict[str, list[Run]]) -> str:
  """What the numbers are and what stands behind the signs of uncertainty."""
  summary = next(iter(groups.values()))[0].summary
  several = any(len(members) > 1 for members in groups.values())
  seeds = (
    'With several seeds, ± is the standard error of the mean over seeds. '
    if several
    else ''
  )
  return (
    'Losses and accuracies are in evaluation mode over the whole splits; gap is test '
    'loss - train loss. The Hessian is that of the loss that training minimised, over '
    f'{summary["num_examples"]} examples of the {summary["split"]} split, batch '
    f'normalization: {summary["batch_norm"]}, {summary["dtype"]}, matrix products of '
    'the highest precision. lambda_max and lambda_min are its largest and its '
    'algebraically smallest eigenvalue, ratio is lambda_max / |lambda_min|. adaptive '
    'is the largest eigenvalue of T H T with T = |w|, which does not change when '
    f'layers are rescaled without changing the function. {seeds}For a single run, ± is '
    'the standard error over examples (for eigenvalues a bootstrap with the '
    'eigenvectors held fixed).'
  )


def _certainty(runs: list[Run]) -> str:
  rows = [
    [
      'run',
      'seed',
      'lambda_max',
      'residual',
      'lambda_min',
      'residual',
      'lambda_1 / lambda_5',
      'trace',
      'all converged',
      'products',
      'seconds',
    ]
  ]
  for name, run in zip(_short_names([r.workdir for r in runs]), runs, strict=True):
    s = run.summary
    rows.append(
      [
        name,
        str(s['seed']),
        f'{s["lambda_max"]:.6g}',
        f'{s["lambda_max_residual"]:.1e}',
        f'{s["lambda_min"]:.6g}',
        f'{s["lambda_min_residual"]:.1e}',
        _number(s['lambda_1_over_lambda_5']),
        f'{s["trace"]:.5g} ± {s["trace_standard_error"]:.2g}',
        'yes' if s['all_converged'] and s['adaptive_sharpness_converged'] else 'no',
        str(s['num_matvecs']),
        f'{s["seconds"]:.1f}',
      ]
    )
  return _markdown(rows)


_CERTAINTY_NOTE = (
  'An eigenvalue of the Hessian lies within the residual |H v - lambda v| of each '
  'value; the residuals are measured, not predicted.'
)


def _single_batches(runs: list[Run]) -> str:
  rows = [['run', 'examples', 'batches', 'lambda_max', 'lambda_min', 'ratio']]
  for name, run in zip(_short_names([r.workdir for r in runs]), runs, strict=True):
    one = run.summary['one_batch']
    if one:
      cells = [
        f'{_number(one[key])} ± {_number(one[f"{key}_standard_deviation"])}'
        for key in ('lambda_max', 'lambda_min')
      ]
      low, high = one['ratio_range']
      ratio = f'{_number(one["ratio_median"])} ({_number(low)} to {_number(high)})'
      rows.append([name, str(one['batch_size']), str(one['num_batches'])])
      rows[-1] += [*cells, ratio]
  return _markdown(rows) if rows[1:] else 'Not measured.'


_SINGLE_NOTE = (
  'The Hessian of one training batch, as published one-batch figures have it; ± is the '
  'standard deviation over batches, the ratio is the median with its range. lambda_min '
  'shrinks faster than lambda_max as the Hessian averages over more examples, so the '
  'ratio grows with their number.'
)


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.4g}'


def _markdown(rows: list[list[str]]) -> str:
  """A Markdown table, aligned to be read as plain text too."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + ' |'
    for row in rows
  ]
  lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
  return '\n'.join(lines)


def _figures(groups: dict[str, list[Run]], out: pathlib.Path) -> None:
  """The first run of each group, side by side on shared axes."""
  first = {name: members[0].workdir for name, members in groups.items()}
  densities = {name: sharpness.read_density(path) for name, path in first.items()}
  plotting.spectral_density(densities).savefig(out / sharpness.DENSITY_FIGURE)
  paths = {
    name: path / sharpness.FOLDER / sharpness.LANDSCAPE for name, path in first.items()
  }
  if not all(path.exists() for path in paths.values()):
    return
  surfaces = {name: landscape.load(path) for name, path in paths.items()}
  plotting.landscape(surfaces).savefig(out / sharpness.LANDSCAPE_FIGURE)
  figure = plotting.landscape(surfaces, 'surface')
  figure.savefig(out / 'landscape_surface.png')
