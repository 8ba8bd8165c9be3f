"""Sweeps: one run for each optimizer, radius, other value and seed, in a table."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training import checkpoints, extension, loop, meshes, methods, optimizers, parallel
from training import config as config_lib
from training import population as population_lib
from training.config import Config
from training.errors import TrainingDiverged, UsageError
from training.problem import Problem

_MAX_RUNS = 10_000
RESULTS_NAME = 'sweep.json'
# Measures the sharpness of a finished run: ``measure(config, problem, workdir)``.
Measure = Callable[[Config, Problem, pathlib.Path], dict[str, Any]]
# Fields that no model, data or loss depends on: runs that differ in them share those.
_OF_TRAINING = (
  'optimizer',
  'base_optimizer',
  'rho',
  'hyperparameters',
  'learning_rate',
  'schedule',
  'warmup_epochs',
  'momentum',
  'weight_decay',
  'clip_norm',
  'm_sharpness',
  'grad_accum_steps',
  'perturb_every',
  'perturb_from',
  'perturb_until',
  'seed',
)


def refuse(names: Sequence[str]) -> None:
  """Refuses several values of a field that no sweep can go over.

  Args:
    names: flags that have several values.

  Raises:
    UsageError: names the flag and what to do instead.
  """
  kept = [f.name for f in dataclasses.fields(Config) if f.metadata['may_change']]
  for name in names:
    if name == 'seed':
      raise UsageError(
        '--seed has several values, and a sweep counts seeds from one on: give '
        '--seed=S --seeds=N for S, S+1, ..., S+N-1.'
      )
    if name in (*kept, 'log_every'):
      raise UsageError(
        f'--{name} has several values, and the results do not depend on it, so there '
        'is nothing to compare: give one.'
      )


def points(
  resolve: Callable[..., Config],
  names: Sequence[str | None],
  radii: Sequence[float | None],
  seeds: int | None,
  swept: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Config]:
  """The runs of a command by their folder; one plain run has the folder ''.

  Base optimizers have no radius, and appear once whatever the radii are; so does each
  optimizer for other values that mean nothing to it. A folder is named by the optimizer
  where there are several, the radius, the other swept fields and the seed, as
  `sam/rho_0.1/learning_rate_0.3/seed_0`.

  Args:
    resolve: makes a configuration of optimizer=, rho=, seed= and what is swept, None if
      unset.
    names: optimizers.
    radii: values of rho.
    seeds: number of seeds from the configuration's own on; None is a single one.
    swept: the values of other fields, and of flags of methods, by name: a run for each
      combination.

  Raises:
    UsageError: one of the configurations, or seeds or runs that are none or too many.
  """
  swept = swept or {}
  if seeds is not None and not 1 <= seeds <= _MAX_RUNS:
    raise UsageError(f'--seeds={seeds}: must be at least 1 and at most {_MAX_RUNS}.')
  if len(names) == len(radii) == 1 and seeds is None and not swept:
    return {'': resolve(optimizer=names[0], rho=radii[0])}
  counts = [len(names), len(radii), seeds or 1, *map(len, swept.values())]
  if math.prod(counts) > _MAX_RUNS:
    raise UsageError(
      f'a sweep of {math.prod(counts):,} runs is more than {_MAX_RUNS:,}: give fewer '
      'values.'
    )
  texts = {name: _texts(values) for name, values in {'rho': radii, **swept}.items()}
  found = {}
  for name, radius, *values in itertools.product(names, radii, *swept.values()):
    fields = {'rho': radius, **dict(zip(swept, values, strict=True))}
    if name is not None and not methods.is_method(name) and len(names) > 1:
      fields = {n: x for n, x in fields.items() if n not in optimizers.OF_METHODS}
    first = resolve(optimizer=name, **fields)
    parts = [config_lib.short(first.optimizer)] if len(names) > 1 else []
    if first.rho is not None:
      parts.append(f'rho_{texts["rho"].get(first.rho, f"{first.rho:g}")}')
    parts += [
      f'{field}_{texts[field][fields[field]]}'
      for field in swept
      if optimizers.value(first, field) is not None
    ]
    for seed in range(first.seed, first.seed + (seeds or 1)):
      config = resolve(optimizer=name, seed=seed, **fields)
      found['/'.join([*parts, f'seed_{seed}'])] = config
  return found


def _texts(values: Sequence[Any]) -> dict[Any, str]:
  """Values as they stand in the names of folders: short, and all different."""
  short = {x: f'{x:g}' if isinstance(x, float) else f'{x}' for x in values}
  if len({*short.values()}) < len(values):
    short = {x: repr(x) for x in values}
  return {x: re.sub(r'[^\w.+-]', '_', text) for x, text in short.items()}


def run(
  configs: dict[str, Config],
  build: Callable[[Config], Problem],
  workdir: pathlib.Path,
  *,
  swept: Sequence[str] = (),
  measure: Measure | None = None,
  population: population_lib.Options | None = None,
  **options: Any,
) -> dict[str, Any] | None:
  """Runs what is not finished yet, one run after the other, into `sweep.json`.

  A member of a population that has diverged is no run any more: it has no part in the
  means, and `sweep.json` tells its step under ``diverged``.

  Args:
    configs: the runs by folder, as `points` makes them.
    build: makes the problem; once, unless the runs differ in what a problem may depend
      on.
    workdir: the sweep's folder.
    swept: names of the fields and flags, besides optimizer and rho, that differ.
    measure: measures each finished run; its numbers stand beside the run's own.
    population: trains those that share a program as one, before the others.
    **options: for `loop.train`.

  Returns:
    What `sweep.json` holds; None on a process that is not the primary one.

  Raises:
    UsageError: a folder belongs to another run, or a configuration does not fit the
      data.
    TrainingDiverged: all of the runs have.
  """
  if (workdir / config_lib.FILE_NAME).exists():
    raise UsageError(
      f'--workdir={workdir} holds a single run, not a sweep: choose another folder.'
    )
  for folder, config in configs.items():
    extension.check(config, workdir / folder)
  problems = _Problems(build)
  problem = problems.of(next(iter(configs.values())))
  for config in configs.values():  # Before the first is trained.
    config_lib.check_size(config, problem.train.num_examples)
    meshes.fit(config, problem, options.get('num_devices', 0), options.get('mesh'))
  if population is not None:
    population_lib.train(configs, problems.of, workdir, population)
  results, diverged = {}, {}
  for number, (folder, config) in enumerate(configs.items(), 1):
    if parallel.is_primary():
      print(f'[{number}/{len(configs)}] {folder}')
    died = checkpoints.diverged(workdir / folder)
    if died is not None:
      diverged[folder] = died
      continue
    problem = problems.of(config)
    finished = loop.train(config, problem, workdir / folder, **options)
    if not parallel.is_primary():
      continue
    results[folder] = dict(finished['final'])
    if measure:
      results[folder] |= measure(config, problem, workdir / folder)
  if not parallel.is_primary():
    return None
  if not results:
    raise TrainingDiverged(
      f'all {len(diverged)} runs in {workdir} have diverged: try a lower '
      '--learning_rate or --rho, in another --workdir.'
    )
  written = {
    'task': next(iter(configs.values())).task,
    'score': problem.scores.main._asdict(),
    'rows': _rows(configs, results, swept),
    'runs': results,
    **({'diverged': diverged} if diverged else {}),
  }
  config_lib.write_json(workdir / RESULTS_NAME, written)
  return written


class _Problems:
  """Makes the problems of configurations, and keeps the last one."""

  def __init__(self, build: Callable[[Config], Problem]):
    self._build = build
    self._last: tuple[Config, Problem] | None = None

  def of(self, config: Config) -> Problem:
    """The problem of a configuration; made only if the last one is another."""
    if self._last is None or not _share_problem(self._last[0], config):
      self._last = None  # Its data go before others come.
      self._last = config, self._build(config)
    return self._last[1]


def _share_problem(one: Config, other: Config) -> bool:
  """Whether model, data and loss of two configurations are the same."""
  kept = [f.name for f in dataclasses.fields(Config) if f.name not in _OF_TRAINING]
  return all(getattr(one, name) == getattr(other, name) for name in kept)


def _rows(
  configs: dict[str, Config],
  results: dict[str, dict[str, float]],
  swept: Sequence[str],
) -> list[dict[str, Any]]:
  """Mean and standard error over the seeds of each optimizer, radius and so on."""
  groups: dict[tuple[Any, ...], list[str]] = {}
  for folder, config in configs.items():
    values = (optimizers.value(config, name) for name in swept)
    groups.setdefault((config.optimizer, config.rho, *values), []).append(folder)
  rows = []
  for (optimizer, rho, *values), folders in groups.items():
    found = [results[folder] for folder in folders if folder in results]
    row = {'optimizer': optimizer, 'rho': rho, 'seeds': len(found)}
    row['swept'] = dict(zip(swept, values, strict=True))
    for name, example in found[0].items() if found else ():
      values = [result[name] for result in found if name in result]
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
