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
from training import report, sharpness
from training.config import Config
from training.report import Section

TABLE, RESULTS = 'comparison.md', 'comparison.json'
SURFACE_FIGURE = 'landscape_surface.png'


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
  _Column('worst case', ('worst_case_sharpness',)),
  _Column('average case', ('average_case_sharpness',)),
)


def write(runs: list[Run], out: pathlib.Path) -> str:
  """Writes the comparison as Markdown, JSON and HTML, with side-by-side figures.

  Args:
    runs: measured runs; those that differ by their seed only are averaged.
    out: folder to write to, made where it is missing.

  Returns:
    The table that compares.
  """
  out.mkdir(parents=True, exist_ok=True)
  groups = _groups(runs)
  sections = _sections(groups, runs)
  (out / TABLE).write_text(report.markdown('Comparison', sections))
  config_lib.write_json(
    out / RESULTS,
    {
      name: {str(run.workdir): run.summary for run in members}
      for name, members in groups.items()
    },
  )
  figures = _figures(groups, out)
  (out / report.FILE_NAME).write_text(report.html('Comparison', sections, figures))
  return report.markdown_table(sections[0].rows)


def write_single(run: Run) -> None:
  """Writes `report.html` of one run, with all its figures."""
  folder = run.workdir / sharpness.FOLDER
  figures = {name: folder / name for name in sharpness.FIGURES}
  title = f'{run.config.task}: {sharpness.label(run.config)}, seed {run.config.seed}'
  text = report.html(title, _sections({title: [run]}, [run]), figures)
  (folder / report.FILE_NAME).write_text(text)


def _sections(groups: dict[str, list[Run]], runs: list[Run]) -> list[Section]:
  sections = [
    Section('', _table(groups), _reading(groups)),
    Section('How sure each run is', _certainty(runs), _CERTAINTY_NOTE),
    Section('Single batches', _single_batches(runs), _SINGLE_NOTE),
  ]
  layers = [
    Section(f'Layers of {name}', _layers(run.summary['layers']), _LAYERS_NOTE)
    for name, run in zip(_short_names([r.workdir for r in runs]), runs, strict=True)
    if run.summary['layers']
  ]
  return sections + layers


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
  labels = [sharpness.label(config) for config in found]
  if len(set(labels)) < len(labels):
    labels = _short_names([members[0].workdir for members in found.values()])
  return dict(zip(labels, found.values(), strict=True))


def _short_names(workdirs: list[pathlib.Path]) -> list[str]:
  """Workdirs without the folders they share."""
  paths = [path.absolute() for path in workdirs]
  if len(set(paths)) < 2:
    return [path.name for path in paths]
  shared = os.path.commonpath(paths)
  return [os.path.relpath(path, shared) for path in paths]


def _table(groups: dict[str, list[Run]]) -> report.Rows:
  columns = [
    column
    for column in _COLUMNS
    if any(_get(r.summary, column.path) is not None for g in groups.values() for r in g)
  ]
  rows = [['run', *(column.heading for column in columns)]]
  for name, members in groups.items():
    seeds = f' ({len(members)} seeds)' if len(members) > 1 else ''
    rows.append([name + seeds, *(_cell(members, column) for column in columns)])
  return rows


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
    f'loss - train loss. {_matrix(summary)} of the loss that training minimised, over '
    f'{summary["num_examples"]} examples of the {summary["split"]} split, batch '
    f'normalization: {summary["batch_norm"]}, {summary["dtype"]}, matrix products of '
    'the highest precision. lambda_max and lambda_min are its largest and its '
    'algebraically smallest eigenvalue, ratio is lambda_max / |lambda_min|, left out '
    'where lambda_min is 0 within its residual. adaptive is the largest eigenvalue of '
    'T A T with T = |w| and A the same matrix, which does not change when layers are '
    f'rescaled without changing the function. {_ball(summary)}{seeds}For a single run, '
    '± is the standard error over examples (for eigenvalues a bootstrap with the '
    'eigenvectors held fixed).'
  )


def _matrix(summary: dict[str, Any]) -> str:
  """What the measured matrix A is, as the beginning of a sentence."""
  names = {
    'hessian': 'Hessian',
    'gauss_newton': 'Gauss-Newton matrix',
    'fisher': 'empirical Fisher matrix',
  }
  name = names[summary['operator']]
  block = summary['params_regex']
  which = f' (the block of the parameters that match {block})' if block else ''
  sides = {'none': 'A', 'adaptive': 'T A T with T = |w|', 'adam': 'P^-1/2 A P^-1/2'}
  text = sides[summary['preconditioner']]
  if text == 'A':
    return f'The matrix A is the {name}{which}'
  return f'The matrix measured is {text}{which}, where A is the {name}'


def _ball(summary: dict[str, Any]) -> str:
  """What worst and average case are, where they were measured."""
  options, text = summary['options'], ''
  unit = ' in units of |w|' if options['adaptive_ball'] else ''
  if summary['worst_case_sharpness'] is not None:
    text += (
      'worst case is the largest rise of the loss within '
      f'{options["worst_case_norm"]} distance {options["worst_case_rho"]:g}{unit}, for '
      f'groups of {options["worst_case_group"]} examples (± over groups). '
    )
  if summary['average_case_sharpness'] is not None:
    text += (
      'average case is its mean rise under Gaussian noise of standard deviation '
      f'{options["average_case_sigma"]:g}{unit} (± over draws). '
    )
  return text


def _certainty(runs: list[Run]) -> report.Rows:
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
  return rows


_CERTAINTY_NOTE = (
  'An eigenvalue of the Hessian lies within the residual |H v - lambda v| of each '
  'value; the residuals are measured, not predicted.'
)


def _single_batches(runs: list[Run]) -> report.Rows:
  headings = ['lambda_max', 'lambda_min', 'its residual', 'ratio']
  rows = [['run', 'examples', 'batches', *headings]]
  for name, run in zip(_short_names([r.workdir for r in runs]), runs, strict=True):
    one = run.summary['one_batch']
    if one:
      cells = [
        _with_deviation(one[key], one[f'{key}_standard_deviation'])
        for key in ('lambda_max', 'lambda_min')
      ]
      low, high = one['ratio_range']
      ratio = _number(one['ratio_median'])
      if low != high:
        ratio += f' ({_number(low)} to {_number(high)})'
      rows.append([name, str(one['batch_size']), str(one['num_batches'])])
      rows[-1] += [*cells, _number(one['lambda_min_residual']), ratio]
  return rows


_SINGLE_NOTE = (
  'The Hessian of one training batch, as published one-batch figures have it; ± is the '
  'standard deviation over batches, the residual the largest, the ratio is the median '
  'with its range, - where lambda_min is 0 within its residual. lambda_min '
  'shrinks faster than lambda_max as the Hessian averages over more examples, so the '
  'ratio grows with their number.'
)


def _with_deviation(value: float, deviation: float | None) -> str:
  text = _number(value)
  return text if deviation is None else f'{text} ± {_number(deviation)}'


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.4g}'


def _layers(layers: list[dict[str, Any]]) -> report.Rows:
  rows = [['layer', 'parameters', 'trace', 'lambda_max', 'residual']]
  for layer in layers:
    trace = f'{layer["trace"]:.4g} ± {layer["trace_standard_error"]:.2g}'
    rows.append(
      [
        layer['layer'],
        f'{layer["num_parameters"]:,}',
        trace,
        f'{layer["lambda_max"]:.5g}',
        f'{layer["lambda_max_residual"]:.1e}',
      ]
    )
  return rows


_LAYERS_NOTE = (
  'Each layer by itself: the block of the operator that belongs to its parameters. '
  'The traces add up to that of the whole; no lambda_max exceeds the whole one.'
)


def _figures(
  groups: dict[str, list[Run]], out: pathlib.Path
) -> dict[str, pathlib.Path]:
  """Draws the first run of each group side by side on shared axes; the files."""
  first = {
    name: members[0].workdir / sharpness.FOLDER for name, members in groups.items()
  }
  densities = {
    name: sharpness.read_density(folder / sharpness.SPECTRUM)
    for name, folder in first.items()
  }
  drawn = {sharpness.DENSITY_FIGURE: plotting.spectral_density(densities)}
  for source, names in (
    (
      sharpness.LANDSCAPE,
      {sharpness.LANDSCAPE_FIGURE: 'contour', SURFACE_FIGURE: 'surface'},
    ),
    (sharpness.EIGEN_RATIO, {sharpness.EIGEN_RATIO_FIGURE: 'heatmap'}),
  ):
    paths = {name: folder / source for name, folder in first.items()}
    if all(path.exists() for path in paths.values()):
      surfaces = {name: landscape.load(path) for name, path in paths.items()}
      for figure_name, kind in names.items():
        drawn[figure_name] = plotting.landscape(surfaces, kind)
  for name, figure in drawn.items():
    figure.savefig(out / name)
  return {name: out / name for name in drawn}
