"""Compares the sharpness of several trained networks: a table and figures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import measurements
from measurements import files
from measurements.measurement import Column, Rows, Section, Summary, entry, number
from sam_jax.measuring import page
from training import config as config_lib
from training.config import Config
from training.errors import UsageError

TABLE, RESULTS = 'comparison.md', 'comparison.json'
_UNKNOWN = '-'


class Run(NamedTuple):
  """A measured run."""

  workdir: pathlib.Path
  config: Config
  summary: Summary


Groups = Mapping[str, Sequence[Run]]


def claim(out: pathlib.Path) -> None:
  """Makes the folder of a comparison, or takes that of an earlier one.

  Raises:
    UsageError: it cannot be written, or holds files of something else.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in out.iterdir())
  except OSError as error:
    raise UsageError(
      f'--out={out} cannot be written ({error.strerror}): choose another folder.'
    ) from error
  # A comparison that was killed while it was written leaves only the second.
  own = (RESULTS, f'{RESULTS}.tmp')
  strangers = [n for n in names if n not in own and not n.startswith('.')]
  if strangers and not _is_comparison(out / RESULTS):
    raise UsageError(
      f'--out={out} holds files that are not those of a comparison (as '
      f'{strangers[0]}): choose a new or empty folder.'
    )


def _is_comparison(path: pathlib.Path) -> bool:
  """Whether a file is the results of a comparison."""
  try:
    groups = json.loads(path.read_text())
    summaries = [summary for runs in groups.values() for summary in runs.values()]
    return all('fingerprint' in summary for summary in summaries)
  except (OSError, ValueError, AttributeError, TypeError):
    return False


def write(runs: Sequence[Run], out: pathlib.Path) -> str:
  """Writes the comparison as Markdown, JSON and HTML, with side-by-side figures.

  Args:
    runs: measured runs; those that differ by their seed only are averaged.
    out: folder to write to, made where it is missing.

  Returns:
    The table that compares.
  """
  out.mkdir(parents=True, exist_ok=True)
  groups = _groups(runs)
  sections = _sections(groups)
  # First, because it marks the folder as a comparison's.
  config_lib.write_json(
    out / RESULTS,
    {
      name: {str(run.workdir): run.summary for run in members}
      for name, members in groups.items()
    },
  )
  (out / TABLE).write_text(page.markdown('Comparison', sections))
  figures = _figures(groups, out)
  (out / files.REPORT).write_text(page.html('Comparison', sections, figures))
  return page.markdown_table(sections[0].rows)


def write_single(run: Run) -> None:
  """Writes `report.html` of one run, with all its figures."""
  folder = run.workdir / measurements.FOLDER
  figures = {
    figure.name: folder / figure.name
    for measurement in measurements.find().values()
    for figure in measurement.figures
    if figure.single
  }
  title = config_lib.title(run.config)
  text = page.html(title, _sections({title: [run]}), figures)
  (folder / files.REPORT).write_text(text)


def describe(summary: Summary) -> str:
  """A summary in a few lines of text."""
  words = []
  for measurement in measurements.find().values():
    told = measurement.details(summary) or [
      (column.heading, _cell([summary], column))
      for column in measurement.columns(summary)
    ]
    words += [f'{name} {text}' for name, text in told if text != _UNKNOWN]
  words.append(
    f'{summary["num_parameters"]:,} parameters, {summary["num_examples"]} '
    f'{summary["split"]} examples, {summary["num_matvecs"]} products, '
    f'{summary["seconds"]:.1f} s'
  )
  indent = '  '
  return textwrap.fill(
    ', '.join(words), 88, initial_indent=indent, subsequent_indent=indent
  )


def _sections(groups: Groups) -> list[Section]:
  runs = [run for members in groups.values() for run in members]
  names = _short_names([run.workdir for run in runs])
  summaries = {name: run.summary for name, run in zip(names, runs, strict=True)}
  found = [
    Section('', _table(groups), _reading(groups)),
    Section('Each run', _each(summaries), ''),
  ]
  for measurement in measurements.find().values():
    found += measurement.sections(summaries)
  return found


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Runs by name; a group holds the seeds of one configuration."""
  found: dict[str, list[Run]] = {}
  for run in runs:
    found.setdefault(_without_seed(run.config), []).append(run)
  labels = [config_lib.label(members[0].config) for members in found.values()]
  if len(set(labels)) < len(labels):
    labels = _short_names([members[0].workdir for members in found.values()])
  return dict(zip(labels, found.values(), strict=True))


def _without_seed(config: Config) -> str:
  """What the runs of one group share, as text."""
  kept = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(Config)
    if not field.metadata['may_change'] and field.name != 'seed'
  }
  return json.dumps(kept, sort_keys=True, default=str)


def _short_names(workdirs: Sequence[pathlib.Path]) -> list[str]:
  """Workdirs without the folders they share."""
  paths = [path.absolute() for path in workdirs]
  if len(set(paths)) < 2:
    return [path.name for path in paths]
  shared = os.path.commonpath(paths)
  return [os.path.relpath(path, shared) for path in paths]


def _table(groups: Groups) -> Rows:
  columns: dict[Column, None] = {}
  for measurement in measurements.find().values():
    for members in groups.values():
      for run in members:
        found = measurement.columns(run.summary)
        columns |= {c: None for c in found if entry(run.summary, c.path) is not None}
  rows = [['run', *(column.heading for column in columns)]]
  for name, members in groups.items():
    seeds = f' ({len(members)} seeds)' if len(members) > 1 else ''
    summaries = [run.summary for run in members]
    rows.append([name + seeds, *(_cell(summaries, column) for column in columns)])
  return rows


def _cell(summaries: Sequence[Summary], column: Column) -> str:
  """Mean over seeds with its standard error; of one run, that over examples."""
  values = [entry(summary, column.path) for summary in summaries]
  values = [value for value in values if value is not None]
  if not values:
    return _UNKNOWN
  if len(summaries) > 1:
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if values[1:] else None
  else:
    mean = values[0]
    *parents, name = column.path
    error = entry(summaries[0], (*parents, f'{name}_standard_error'))
  mean *= column.scale
  if error is None:
    return number(mean)
  error *= column.scale
  digits = _decimals(error)
  return f'{mean:.{digits}f} ± {error:.{digits}f}'


def _decimals(error: float) -> int:
  """Decimals that show two digits of an error."""
  return max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4


def _each(summaries: Mapping[str, Summary]) -> Rows:
  """A row a run: what the measurements tell of how sure they are."""
  rows = [['run'], *([name] for name in summaries)]

  def add(heading: str, texts: Sequence[str]) -> None:
    if set(texts) != {_UNKNOWN}:
      for row, text in zip(rows, (heading, *texts), strict=True):
        row.append(text)

  told = summaries.values()
  add('seed', [str(s['seed']) for s in told])
  for measurement in measurements.find().values():
    for details in zip(*map(measurement.details, told), strict=True):
      add(details[0][0], [text for _, text in details])
  add('products', [str(s['num_matvecs']) for s in told])
  add('seconds', [f'{s["seconds"]:.1f}' for s in told])
  return rows


def _reading(groups: Groups) -> str:
  """What the numbers are and what stands behind the signs of uncertainty."""
  summary = next(iter(groups.values()))[0].summary
  sentences = [
    f'{_matrix(summary)} of the loss that training minimised, over '
    f'{summary["num_examples"]} examples of the {summary["split"]} split, batch '
    f'normalization: {summary["batch_norm"]}, {summary["dtype"]}, matrix products of '
    'the highest precision.'
  ]
  for measurement in measurements.find().values():
    columns = measurement.columns(summary)
    if any(entry(summary, column.path) is not None for column in columns):
      sentences.append(measurement.reading(summary))
  if any(len(members) > 1 for members in groups.values()):
    sentences.append(
      'With several seeds, ± is the standard error of the mean over seeds.'
    )
  sentences.append(
    'For a single run, ± is the standard error over examples (for eigenvalues a '
    'bootstrap with the eigenvectors held fixed).'
  )
  return ' '.join(filter(None, sentences))


def _matrix(summary: Summary) -> str:
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


def _figures(groups: Groups, out: pathlib.Path) -> dict[str, pathlib.Path]:
  """Draws the first run of each group side by side on shared axes; the files."""
  folders = {
    _panel_title(name, members[0].config): members[0].workdir / measurements.FOLDER
    for name, members in groups.items()
  }
  configs = [members[0].config for members in groups.values()]
  title = ', '.join(dict.fromkeys(config_lib.short(c.task) for c in configs))
  drawn = {}
  for measurement in measurements.find().values():
    for figure in measurement.figures:
      sources = {name: folder / figure.source for name, folder in folders.items()}
      if figure.several and all(path.exists() for path in sources.values()):
        drawn[figure.name] = out / figure.name
        _draw(figure.plot, figure.load, sources, drawn[figure.name], title)
  return drawn


def _panel_title(name: str, config: Config) -> str:
  """What one run is headed with beside others of its task.

  Args:
    name: of its group: its method, or its folder where methods are the same.
    config: of the run that is drawn for the group.
  """
  drawn = f'{config_lib.label(config)}, seed {config.seed}'
  return drawn if name == config_lib.label(config) else f'{name}\n{drawn}'


def _draw(
  plot: Callable[..., Any],
  load: Callable[[pathlib.Path], Any],
  sources: Mapping[str, pathlib.Path],
  path: pathlib.Path,
  title: str,
) -> None:
  results = {name: load(source) for name, source in sources.items()}
  plot(results, title=title).savefig(path)
