"""Which runs of a sweep share a program, and how many of them fit a device at once."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from training.config import Config
from training.errors import UsageError
from training.members import Members

GIB = 1 << 30
# Fields that differ between the members of a population, with their names among the
# variables of a step. Zero turns a part of the step off, so that it is another program.
_VARIABLE = {
  'rho': 'rho',
  'learning_rate': 'learning_rate_scale',
  'weight_decay': 'weight_decay',
}
# Every member has two open files.
_MOST = 200
# Of the memory, what a population may take: the rest is the system's and fragments.
_SHARE = 0.8
_CGROUP = pathlib.Path('/sys/fs/cgroup/memory.max')


def groups(configs: Mapping[str, Config]) -> list[dict[str, Config]]:
  """The runs, by folder, in groups that share a program.

  Those of a group differ in nothing but the seed, the radius, the learning rate and the
  weight decay, and each of these is zero for all of them or for none.
  """
  found: dict[str, dict[str, Config]] = {}
  for folder, config in configs.items():
    fields = dataclasses.asdict(config)
    del fields['seed']
    for name in _VARIABLE:
      fields[name] = fields[name] if fields[name] is None else fields[name] > 0
    key = json.dumps(fields, sort_keys=True, default=repr)
    found.setdefault(key, {})[folder] = config
  return list(found.values())


def hyperparams(configs: Sequence[Config]) -> dict[str, list[float]]:
  """What differs between the members of a group, as `TrainState` has it.

  Learning rates are factors on that of the first, whose configuration the step has.
  """
  first, found = configs[0], {}
  for field, name in _VARIABLE.items():
    values = [getattr(config, field) for config in configs]
    if len({*values}) > 1:
      scale = first.learning_rate if field == 'learning_rate' else 1
      found[name] = [value / scale for value in values]
  return found


def chunks(group: Mapping[str, Config], most: int) -> list[dict[str, Config]]:
  """A group in as few parts of at most so many members as possible, evenly filled."""
  folders = list(group)
  count = -(-len(folders) // most)
  size, longer = divmod(len(folders), count)
  ends = [size * n + min(n, longer) for n in range(count + 1)]
  return [
    {folder: group[folder] for folder in folders[start:end]}
    for start, end in zip(ends, ends[1:], strict=False)
  ]


class Need(NamedTuple):
  """Bytes that a population takes on a device.

  Attributes:
    shared: the data.
    state: of each member, with its batch.
    work: of a member's step, beside its state.
  """

  shared: int
  state: int
  work: int

  def most(self, limit: int, mapping: str) -> int:
    """How many members of a device fit a limit, by vmap or by lax.map."""
    if mapping == 'map':  # The states before and after, and one member's work.
      return (limit - self.shared - self.work) // (2 * self.state)
    return (limit - self.shared) // (self.state + self.work)


def need(
  members: Members, phase: bool | None, state: Any, arrays: Any, items: Any
) -> Need:
  """What one member takes, from its compiled step.

  Args:
    members: a population of one.
    phase: of the step that takes most.
    state: its state, or its shapes and types.
    arrays: of the source, or their shapes and types.
    items: of one step.
  """
  shared, own = (_nbytes(tree) for tree in (arrays, (state, items)))
  found = members.train[phase].lower(state, arrays, items).compile().memory_analysis()
  if found is None:  # Not every platform tells: gradients, updates, two copies.
    return Need(shared, own, 4 * own)
  peak = (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    + found.temp_size_in_bytes
    - found.alias_size_in_bytes
  )
  return Need(shared, own, max(peak - shared - own, 0))


def _nbytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def limit(devices: Sequence[jax.Device], gib: float | None) -> int:
  """Bytes that a population may take on each device.

  Args:
    devices: all that it may use.
    gib: the user's own bound for all together, None for most of the memory there is.
  """
  if gib is not None:
    return int(gib * GIB / len(devices))
  stats = devices[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return int(_SHARE * stats['bytes_limit'])
  total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if _CGROUP.exists() and (text := _CGROUP.read_text().strip()).isdecimal():
    total = min(total, int(text))
  return int(_SHARE * total / len(devices))


def plan(
  group: Mapping[str, Config],
  needed: Need,
  bytes_limit: int,
  num_devices: int,
  mapping: str,
  say: Callable[[str], None],
) -> list[dict[str, Config]]:
  """A group in chunks that fit the devices, and a sentence about it.

  Raises:
    UsageError: not even one member fits.
  """
  fitting = needed.most(bytes_limit, mapping)
  own, there = needed.state + needed.work, _size(bytes_limit)
  if fitting < 1:
    raise UsageError(
      f'--population: one member needs {_size(needed.shared + own)} and a '
      f'device has {there} for it: raise --population_gib, lower --batch_size, or '
      'leave --population out.'
    )
  parts = chunks(group, min(fitting * num_devices, _MOST))
  several = f' in {len(parts)} populations, one after the other' * (len(parts) > 1)
  say(
    f'{len(group)} runs share a program and are trained as one{several}: a member '
    f'needs {_size(own)} and the data {_size(needed.shared)}, and each '
    f'of {num_devices} device(s) has {there}'
  )
  return parts


def _size(count: int) -> str:
  """A number of bytes for readers."""
  return f'{count / GIB:.1f} GiB' if count >= GIB else f'{count / (1 << 20):.2g} MiB'
