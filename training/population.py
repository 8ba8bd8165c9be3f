"""Runs of a sweep that share a program, trained as one: `train.py --population`.

The runs of a group are the members of a population. Each has the folder and the files
of a run that was trained alone. The population has a folder of its own while it trains,
with its checkpoints and the list of its members: one that was stopped goes on with the
members, and by the mapping, that it was started with.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from training import (
  checkpoints,
  extension,
  grouping,
  optimizers,
  parallel,
  population_run,
  stopping,
)
from training import config as config_lib
from training.config import Config
from training.errors import UsageError
from training.members import Members
from training.population_run import FILE_NAME
from training.problem import Problem

FOLDER = 'population'


class Options(NamedTuple):
  """How populations are trained.

  Attributes:
    gib: memory that they may take on all devices together; None for most there is.
    mapping: how a device goes through its members, one of `members.MAPPINGS`; None
      takes vmap on accelerators, and on the CPU what is faster.
    num_devices: devices of this process to use; 0 uses all.
    timing: False leaves the clock's fields out of `metrics.jsonl`.
  """

  gib: float | None = None
  mapping: str | None = None
  num_devices: int = 0
  timing: bool = True


def train(
  configs: Mapping[str, Config],
  problem_of: Callable[[Config], Problem],
  workdir: pathlib.Path,
  options: Options,
) -> None:
  """Goes on with the populations of a sweep, and trains others of what is not begun.

  A run that shares its program with no other is left, as is one that was begun alone.

  Args:
    configs: the runs by folder.
    problem_of: the problem of a configuration.
    workdir: the sweep's folder.
    options: how.

  Raises:
    UsageError: the memory does not suffice for a single member, a configuration is not
      valid, the examples are streamed, or another process trains in a folder.
    SystemExit: 128 + signal number after SIGTERM or SIGINT, with a checkpoint saved.
  """
  if jax.process_count() > 1:
    raise UsageError(
      '--population trains in one process: leave out --coordinator and --num_processes.'
    )
  if all(len(group) == 1 for group in grouping.groups(configs)):
    raise UsageError(
      '--population: no two of these runs share a program, which may differ in seed, '
      'rho, learning rate and weight decay only (each zero for all or for none): give '
      '--seeds or more values, or leave --population out.'
    )
  for config in configs.values():
    config_lib.validate(config)
    optimizers.validate(config)
  parallel.DataParallel(options.num_devices)  # which refuses more than there are
  devices = jax.local_devices()[: options.num_devices or None]
  with stopping.listen() as stop:

    def run(members, problem, folder, mapping):
      population = population_run.Run(
        members, problem, workdir, folder, devices, mapping
      )
      with contextlib.closing(population):
        population.run(stop, options.timing)
      if stop.signal_number:
        stop.leave()
      return population.mapping

    for path in sorted((workdir / FOLDER).glob(f'*/{FILE_NAME}')):
      members, mapping = _read(path, workdir, configs)
      if all(_is_over(config, workdir / name) for name, config in members.items()):
        population_run.remove(path.parent)
        continue
      run(members, problem_of(next(iter(members.values()))), path.parent, mapping)
    new = {name: c for name, c in configs.items() if _is_new(c, workdir / name)}
    for group in grouping.groups(new):
      if len(group) == 1:
        continue
      problem, mapping = problem_of(next(iter(group.values()))), options.mapping
      _require_order(problem)
      for part in _parts(group, problem, devices, options):
        mapping = run(part, problem, _free(workdir / FOLDER), mapping)


def _require_order(problem: Problem) -> None:
  """Refuses streams, which have a single order."""
  if hasattr(problem.train.batches(1), 'local_epoch'):
    raise UsageError(
      '--population: the examples of this task are streamed, in the order of one seed: '
      'leave it out.'
    )


def _is_over(config: Config, workdir: pathlib.Path) -> bool:
  return (
    bool(extension.finished(config, workdir))
    or checkpoints.diverged(workdir) is not None
  )


def _is_new(config: Config, workdir: pathlib.Path) -> bool:
  return not (_is_over(config, workdir) or checkpoints.steps(workdir))


def _free(folder: pathlib.Path) -> pathlib.Path:
  """The folder of a new population."""
  taken = [int(path.name) for path in folder.glob('*') if path.name.isdigit()]
  return folder / str(max(taken, default=-1) + 1)


def _read(
  path: pathlib.Path, workdir: pathlib.Path, configs: Mapping[str, Config]
) -> tuple[dict[str, Config], str]:
  """Members and mapping of a population that has been begun.

  Raises:
    UsageError: its file is damaged, or a member's folder has gone.
  """
  try:
    found = json.loads(path.read_text())
    folders, mapping = found['members'], found['mapping']
  except (ValueError, KeyError, TypeError) as error:
    raise UsageError(
      f'{path} is damaged ({error}): remove {path.parent}, and its members are trained '
      'anew.'
    ) from error
  members = {}
  for folder in folders:
    wanted = configs.get(folder)
    if wanted is None or (workdir / folder / config_lib.FILE_NAME).exists():
      stored = config_lib.load(workdir / folder)
      same = wanted is not None and not config_lib.differences(stored, wanted)
      wanted = wanted if same else stored
    members[folder] = wanted
  return members, mapping


def _parts(
  group: Mapping[str, Config],
  problem: Problem,
  devices: Sequence[jax.Device],
  options: Options,
) -> list[dict[str, Config]]:
  """A group in parts that fit the devices."""
  configs = list(group.values())
  stepper, batches = population_run.stepper_of(configs[0], problem, [configs[0].seed])
  one = Members(stepper, 1, devices, options.mapping or 'vmap')
  arrays, items = None, None
  if population_run.is_resident(problem, configs[0]):
    arrays = dict(problem.train.arrays)
    items = np.asarray(batches.indices(0)[0], np.int32)
  else:
    items = next(iter(batches.epoch(0)))
  needed = grouping.need(
    one,
    None if optimizers.phase(configs[0], stepper.steps_per_epoch, 0) is None else True,
    one.shapes(grouping.hyperparams(configs)),
    arrays,
    items,
  )
  limit = grouping.limit(devices, options.gib)
  return grouping.plan(
    group, needed, limit, len(devices), options.mapping or 'vmap', print
  )
