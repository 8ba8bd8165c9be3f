"""Sweeps: one run for each optimizer, radius and seed, compared in a table."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sam_jax import curvature
from training import checkpoints, loop, losses, optimizers, parallel, report
from training import config as config_lib
from training.config import Config
from training.errors import UsageError
from training.workload import Workload

TABLE_NAME, FIGURE_NAME, RESULTS_NAME = 'sweep.md', 'sweep.png', 'sweep.json'
_SHARPNESS_NAME = 'sharpness.json'
# Examples in a batch of the Hessian, and the relative residual lambda_max is found to.
_HESSIAN_BATCH = 128
_TOLERANCE = 1e-3

_COLUMNS = {
  'train_loss': 'train loss',
  'test_loss': 'test loss',
  'test_accuracy': 'test accuracy (%)',
  'generalization_gap': 'gap (test - train loss)',
  'lambda_max': 'lambda_max',
}


def points(
  resolve: Callable[..., Config],
  names: Sequence[str | None],
  radii: Sequence[float | None],
  seeds: int | None,
) -> dict[str, Config]:
  """The runs of a command by their folder; one plain run has the folder ''.

  Base optimizers have no radius, and appear once whatever the radii are.

  Args:
    resolve: makes a configuration of optimizer=, rho= and seed=, None if unset.
    names: optimizers.
    radii: values of rho.
    seeds: number of seeds from the configuration's own on; None is a single one.

  Raises:
    UsageError: one of the configurations, or seeds < 1.
  """
  if seeds is not None and seeds < 1:
    raise UsageError(f'--seeds={seeds}: must be at least 1.')
  if len(names) == len(radii) == 1 and seeds is None:
    return {'': resolve(optimizer=names[0], rho=radii[0])}
  found = {}
  for name in names:
    plain = name in optimizers.BASES and len(names) > 1
    for radius in [None] if plain else radii:
      first = resolve(optimizer=name, rho=radius)
      for seed in range(first.seed, first.seed + (seeds or 1)):
        config = resolve(optimizer=name, rho=radius, seed=seed)
        parts = [config.optimizer] if len(names) > 1 else []
        parts += [] if config.rho is None else [f'rho_{config.rho:g}']
        found['/'.join([*parts, f'seed_{seed}'])] = config
  return found


def run(
  configs: dict[str, Config],
  build: Callable[[Config], Workload],
  workdir: pathlib.Path,
  *,
  sharpness: bool = True,
  **options: Any,
) -> list[dict[str, Any]]:
  """Runs what is not finished yet, one run after the other, and compares.

  Args:
    configs: the runs by folder, as `points` makes them.
    build: makes the workload, once: the runs differ in optimizer, rho and seed only.
    workdir: the sweep's folder.
    sharpness: measure lambda_max of the training loss after each run.
    **options: for `loop.train`.

  Returns:
    The rows of the table.

  Raises:
    UsageError: a folder belongs to another run.
  """
  if (workdir / config_lib.FILE_NAME).exists():
    raise UsageError(
      f'--workdir={workdir} holds a single run, not a sweep: choose another folder.'
    )
  for folder, config in configs.items():
    config_lib.check(config, workdir / folder)
  workload = build(next(iter(configs.values())))
  results = {}
  for number, (folder, config) in enumerate(configs.items(), 1):
    if parallel.is_primary():
      print(f'[{number}/{len(configs)}] {folder}')
    finished = loop.train(config, workload, workdir / folder, **options)
    if not parallel.is_primary():
      continue
    results[folder] = dict(finished['final'])
    if sharpness:
      results[folder]['lambda_max'] = _lambda_max(config, workload, workdir / folder)
  if not parallel.is_primary():
    return []
  rows = _rows(configs, results)
  _write(workdir, configs, rows, results)
  return rows


def _lambda_max(config: Config, workload: Workload, workdir: pathlib.Path) -> float:
  """The largest Hessian eigenvalue of the training loss, measured once a run."""
  path = workdir / _SHARPNESS_NAME
  if path.exists():
    return json.loads(path.read_text())['lambda_max']
  params, batch_stats, _ = checkpoints.load_variables(workdir, workload)
  operator = curvature.hessian(
    losses.mean_loss(workload.model, config, batch_stats),
    params,
    list(workload.train.batches(_HESSIAN_BATCH).epoch(0)),
    weight=losses.num_examples,
  )
  pairs = curvature.eigenpairs(
    operator, 1, which='largest', tol=_TOLERANCE, key=jax.random.key(0)
  )
  measured = {
    'lambda_max': float(pairs.eigenvalues[0]),
    'residual': float(pairs.residuals[0]),
    'converged': bool(pairs.converged[0]),
  }
  config_lib.write_json(path, measured)
  return measured['lambda_max']


def _rows(
  configs: dict[str, Config], results: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
  """Mean and standard error over the seeds of each optimizer and radius."""
  groups: dict[tuple[str, float | None], list[str]] = {}
  for folder, config in configs.items():
    groups.setdefault((config.optimizer, config.rho), []).append(folder)
  rows = []
  for (optimizer, rho), folders in groups.items():
    row = {'optimizer': optimizer, 'rho': rho, 'seeds': len(folders)}
    for name in _COLUMNS:
      values = [results[f][name] for f in folders if name in results[f]]
      if values:
        row[name] = statistics.fmean(values)
        row[f'{name}_error'] = _standard_error(values)
    rows.append(row)
  return rows


def _standard_error(values: Sequence[float]) -> float | None:
  """Standard error of the mean; None for a single value."""
  if len(values) < 2:
    return None
  return statistics.stdev(values) / math.sqrt(len(values))


def _write(
  workdir: pathlib.Path,
  configs: dict[str, Config],
  rows: list[dict[str, Any]],
  results: dict[str, dict[str, float]],
) -> None:
  config_lib.write_json(workdir / RESULTS_NAME, {'rows': rows, 'runs': results})
  table = _table(rows)
  task = next(iter(configs.values())).task
  note = (
    f'{task}: mean +- standard error over seeds; losses in evaluation mode, over the '
    'whole split.'
  )
  (workdir / TABLE_NAME).write_text(f'{table}\n\n{note}\n')
  _figure(workdir / FIGURE_NAME, rows)
  print(f'\n{table}\n\n{note}\n{workdir}/')


def _table(rows: list[dict[str, Any]]) -> str:
  """A Markdown table, aligned to be read as plain text too."""
  columns = [name for name in _COLUMNS if name in rows[0]]
  cells = [['optimizer', 'rho', 'seeds', *(_COLUMNS[name] for name in columns)]]
  for row in rows:
    rho = '-' if row['rho'] is None else f'{row["rho"]:g}'
    cells.append([row['optimizer'], rho, str(row['seeds'])])
    cells[-1] += [_cell(row, name) for name in columns]
  return report.markdown_table(cells)


def _cell(row: dict[str, Any], name: str) -> str:
  scale, digits = (100, 2) if name.endswith('accuracy') else (1, 4)
  digits = 2 if name == 'lambda_max' else digits
  text = f'{scale * row[name]:.{digits}f}'
  error = row[f'{name}_error']
  return text if error is None else f'{text} +- {scale * error:.{digits}f}'


def _figure(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Accuracy, gap and sharpness against rho; base optimizers as horizontal lines."""
  # Slow to import, and needed once a sweep.
  from matplotlib.figure import Figure
  from matplotlib.ticker import NullLocator

  names = ['test_accuracy', 'generalization_gap', 'lambda_max']
  names = [name for name in names if name in rows[0]]
  figure = Figure(figsize=(3.6 * len(names), 3.3), layout='constrained')
  panels = figure.subplots(1, len(names), squeeze=False)[0]
  for axes, name in zip(panels, names, strict=True):
    scale = 100 if name.endswith('accuracy') else 1
    for index, optimizer in enumerate(dict.fromkeys(r['optimizer'] for r in rows)):
      chosen = [row for row in rows if row['optimizer'] == optimizer]
      values = [scale * row[name] for row in chosen]
      errors = [scale * (row[f'{name}_error'] or 0) for row in chosen]
      colour = f'C{index}'
      if chosen[0]['rho'] is None:
        axes.axhline(values[0], color=colour, label=optimizer)
        axes.axhspan(
          values[0] - errors[0], values[0] + errors[0], color=colour, alpha=0.15, lw=0
        )
        continue
      radii = [row['rho'] for row in chosen]
      axes.errorbar(
        radii, values, errors, fmt='o-', color=colour, label=optimizer, capsize=3
      )
    axes.set(xlabel='rho', ylabel=_COLUMNS[name])
    swept = sorted({row['rho'] for row in rows if row['rho'] is not None})
    if any(swept):
      axes.set_xscale('linear' if 0 in swept else 'log')
      axes.set_xticks(swept, [f'{radius:g}' for radius in swept])
      axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
  panels[0].legend(frameon=False)
  figure.savefig(path, dpi=120)
