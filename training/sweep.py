"""Sweeps: one run for each optimizer, radius and seed, compared in a table."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from training import config as config_lib
from training import loop, methods, parallel
from training.config import Config
from training.errors import UsageError
from training.problem import Problem

_MAX_SEEDS = 10_000
RESULTS_NAME = 'sweep.json'
# Measures the sharpness of a finished run: ``measure(config, problem, workdir)``.
Measure = Callable[[Config, Problem, pathlib.Path], dict[str, Any]]


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
    UsageError: one of the configurations, or seeds that are none or too many.
  """
  if seeds is not None and not 1 <= seeds <= _MAX_SEEDS:
    raise UsageError(f'--seeds={seeds}: must be at least 1 and at most {_MAX_SEEDS}.')
  if len(names) == len(radii) == 1 and seeds is None:
    return {'': resolve(optimizer=names[0], rho=radii[0])}
  found = {}
  for name in names:
    plain = name is not None and not methods.is_method(name) and len(names) > 1
    for radius in [None] if plain else radii:
      first = resolve(optimizer=name, rho=radius)
      for seed in range(first.seed, first.seed + (seeds or 1)):
        config = resolve(optimizer=name, rho=radius, seed=seed)
        parts = [config_lib.short(config.optimizer)] if len(names) > 1 else []
        parts += [] if config.rho is None else [f'rho_{config.rho:g}']
        found['/'.join([*parts, f'seed_{seed}'])] = config
  return found


def run(
  configs: dict[str, Config],
  build: Callable[[Config], Problem],
  workdir: pathlib.Path,
  *,
  measure: Measure | None = None,
  **options: Any,
) -> dict[str, Any] | None:
  """Runs what is not finished yet, one run after the other, into `sweep.json`.

  Args:
    configs: the runs by folder, as `points` makes them.
    build: makes the problem, once: the runs differ in optimizer, rho and seed only.
    workdir: the sweep's folder.
    measure: measures each finished run; its numbers stand beside the run's own.
    **options: for `loop.train`.

  Returns:
    What `sweep.json` holds; None on a process that is not the primary one.

  Raises:
    UsageError: a folder belongs to another run.
  """
  if (workdir / config_lib.FILE_NAME).exists():
    raise UsageError(
      f'--workdir={workdir} holds a single run, not a sweep: choose another folder.'
    )
  for folder, config in configs.items():
    config_lib.check(config, workdir / folder)
  problem = build(next(iter(configs.values())))
  results = {}
  for number, (folder, config) in enumerate(configs.items(), 1):
    if parallel.is_primary():
      print(f'[{number}/{len(configs)}] {folder}')
    finished = loop.train(config, problem, workdir / folder, **options)
    if not parallel.is_primary():
      continue
    results[folder] = dict(finished['final'])
    if measure:
      results[folder] |= measure(config, problem, workdir / folder)
  if not parallel.is_primary():
    return None
  written = {
    'task': next(iter(configs.values())).task,
    'score': problem.scores.main._asdict(),
    'rows': _rows(configs, results),
    'runs': results,
  }
  config_lib.write_json(workdir / RESULTS_NAME, written)
  return written


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
    for name, example in results[folders[0]].items():
      values = [results[f][name] for f in folders if name in results[f]]
      if isinstance(example, float):
        row[name] = statistics.fmean(values)
        row[f'{name}_error'] = _standard_error(values)
    rows.append(row)
  return rows


def _standard_error(values: Sequence[float]) -> float | None:
  """Standard error of the mean; None for a single value."""
  if len(values) < 2:
    return None
  return statistics.stdev(values) / math.sqrt(len(values))
