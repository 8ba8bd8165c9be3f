"""Checkpoints: orbax files with their digests, the newest ones of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import types
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from training import files
from training.config import write_json
from training.errors import TrainingDiverged, UsageError

if TYPE_CHECKING:
  import orbax.checkpoint as ocp

  from training.problem import Problem
  from training.step import TrainState

FOLDER = 'checkpoints'
# Of a member of a population that has diverged: at which step.
DIVERGED = 'diverged.json'
_DAMAGED = 'damaged_checkpoints'
_DIGESTS = 'digests.json'


class Checkpoint(NamedTuple):
  """A stored state.

  Attributes:
    arrays: path -> NumPy array: params/..., batch_stats/..., opt_state/..., key, step.
    position: JSON: where in the data the run stood, and its running sums.
  """

  arrays: dict[str, np.ndarray]
  position: dict[str, Any]


class Checkpoints:
  """The checkpoints of one workdir, written by one process.

  Attributes:
    made: whether the folder was missing.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    """Opens the folder, or makes it, and keeps the newest so many; 0 keeps all."""
    self._folder = (workdir / FOLDER).absolute()
    self._keep = keep or None
    _require_folder(self._folder)
    self.made = not self._folder.exists()
    self._folder.mkdir(exist_ok=True)
    self._manager = None

  def _orbax(self) -> ocp.CheckpointManager:
    """Orbax's manager of the folder, which is slow to import and opened when needed."""
    if self._manager is not None:
      return self._manager
    ocp = _import_orbax()
    only_me = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep,
      create=False,
      enable_async_checkpointing=False,
      cleanup_tmp_directories=True,
      multiprocessing_options=only_me,
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)
    return self._manager

  def save(
    self,
    state: TrainState,
    position: dict[str, Any],
    more: Mapping[str, np.ndarray] = types.MappingProxyType({}),
  ) -> None:
    """Stores a state at its step, whole or not at all.

    Args:
      state: of one replica.
      position: where in the data the run stands; JSON.
      more: further arrays by path.

    Raises:
      TrainingDiverged: a parameter is not finite; the older checkpoints stay.
      OSError: the disk is full; the older checkpoints stay.
    """
    arrays = {**to_arrays(state), **more}
    step = int(arrays['step'])
    for name, array in arrays.items():
      if name.startswith('params/') and not np.isfinite(array.astype(np.float32)).all():
        raise TrainingDiverged(
          f'the parameter {name[len("params/") :]} is not finite after step {step}: '
          'the last good checkpoint is kept; try a lower --learning_rate or --rho.'
        )
    ocp = _import_orbax()
    try:
      self._orbax().save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(_nest(arrays)),
          position=ocp.args.JsonSave(position),
        ),
      )
    except Exception as error:
      if full := files.no_space(error):
        raise full from error
      raise
    folder = self._folder / str(step)
    write_json(folder / _DIGESTS, _digests(folder))

  def restore_newest(self) -> Checkpoint | None:
    """Reads the newest checkpoint that is not damaged, None if there is none at all.

    Damaged ones that are newer are moved out of the way, with a warning.

    Raises:
      UsageError: there are checkpoints, and every one is damaged; nothing is moved.
    """
    found = steps(self._folder.parent)
    if not found:
      return None
    damages = {}
    for step in reversed(found):
      try:
        _verify(self._folder / str(step))
      except _Damage as damage:
        damages[step] = damage
        continue
      self._set_aside(damages)
      return _read(self._orbax(), self._folder, step)
    raise UsageError(
      f'{_all_damaged(self._folder, damages)}: the metrics of the run are kept; put '
      'the checkpoints back from a copy, or train again into another --workdir.'
    )

  def _set_aside(self, damages: dict[int, _Damage]) -> None:
    """Moves damaged checkpoints out of the folder, so that their steps are free."""
    shelf = self._folder.parent / _DAMAGED
    for step, damage in damages.items():
      shelf.mkdir(exist_ok=True)
      shutil.rmtree(shelf / str(step), ignore_errors=True)
      shutil.move(self._folder / str(step), shelf / str(step))
      warnings.warn(
        f'the checkpoint of step {step} in {self._folder} is damaged ({damage}): it '
        f'is moved to {shelf.name}/, and the run continues from the one before.',
        stacklevel=3,
      )
    if damages:
      self.close()  # orbax lists the folder only when it opens it

  def close(self) -> None:
    """Releases orbax's threads."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps of the checkpoints that a run has, ascending; reads none of them."""
  folder = workdir / FOLDER
  _require_folder(folder)
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def diverged(workdir: pathlib.Path) -> int | None:
  """The step at which the member of a population diverged; None if it did not."""
  path = workdir / DIVERGED
  return json.loads(path.read_text())['step'] if path.exists() else None


def load(workdir: pathlib.Path, step: int | None = None) -> Checkpoint:
  """Reads a checkpoint of a run; changes nothing.

  Args:
    workdir: the run's folder.
    step: which one; None reads the newest that is not damaged.

  Raises:
    UsageError: there is none, or each that could be read is damaged.
  """
  found = steps(workdir)
  if not found and (died := diverged(workdir)) is not None:
    raise UsageError(
      f'{workdir} has diverged at step {died} and has no checkpoint: leave it out.'
    )
  if not found:
    raise UsageError(
      f'{workdir} has no checkpoint yet: run train.py --workdir={workdir} first.'
    )
  if step is not None and step not in found:
    raise UsageError(
      f'{workdir} has no checkpoint of step {step}: it has '
      f'{", ".join(map(str, found))}; train.py --keep_checkpoints=0 keeps them all.'
    )
  folder = (workdir / FOLDER).absolute()
  damages = {}
  for number in reversed(found) if step is None else [step]:
    try:
      _verify(folder / str(number))
    except _Damage as damage:
      damages[number] = damage
      continue
    for skipped, damage in damages.items():
      warnings.warn(
        f'the checkpoint of step {skipped} in {folder} is damaged ({damage}): the one '
        f'of step {number} is read.',
        stacklevel=2,
      )
    ocp = _import_orbax()
    options = ocp.CheckpointManagerOptions(read_only=True)
    with contextlib.closing(ocp.CheckpointManager(folder, options=options)) as manager:
      return _read(manager, folder, number)
  which = (
    _all_damaged(folder, damages)
    if step is None
    else f'the checkpoint of step {step} in {folder} is damaged ({damages[step]})'
  )
  raise UsageError(
    f'{which}: put it back from a copy, or train again into another --workdir.'
  )


def load_variables(
  workdir: str | os.PathLike[str], problem: Problem
) -> tuple[Any, Any, int]:
  """The model of a run as it was last stored.

  Args:
    workdir: the run's folder.
    problem: has the run's model, which the checkpoint must fit.

  Returns:
    Its parameters and batch statistics in NumPy, and the step.

  Raises:
    UsageError: there is no checkpoint, or it is of another model.
  """
  workdir = pathlib.Path(workdir)
  variables = jax.eval_shape(
    problem.model.init, jax.random.key(0), problem.example_inputs
  )
  newest = load(workdir)
  params, batch_stats = (
    from_arrays(
      select(newest.arrays, name),
      variables.get(name, {}),
      f'the checkpoint in {workdir} ({name})',
    )
    for name in ('params', 'batch_stats')
  )
  return params, batch_stats, int(newest.arrays['step'])


def to_arrays(state: TrainState) -> dict[str, np.ndarray]:
  """A state as NumPy arrays by path; typed keys become their data."""
  arrays = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    if array.size:  # orbax stores no empty arrays
      arrays[name] = array
  return arrays


def from_arrays(arrays: dict[str, np.ndarray], like: Any, origin: str) -> Any:
  """Arrays by path in the structure of a state, or of a part of one.

  Args:
    arrays: as `to_arrays` makes them.
    like: the structure, with its shapes and types.
    origin: where the arrays come from, for the message.

  Raises:
    UsageError: names the first array that is missing, left over or of another shape.
  """
  wanted, structure = jax.tree_util.tree_flatten_with_path(like)
  left = dict(arrays)
  leaves = []
  for path, leaf in wanted:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    array = left.pop(name, None)
    if array is None and np.size(data):
      raise UsageError(
        f'{origin} is of another model or optimizer: it has no {name}, '
        f'{np.shape(data)} here.'
      )
    array = np.zeros_like(data) if array is None else array
    if array.shape != np.shape(data) or array.dtype != data.dtype:
      raise UsageError(
        f'{origin} is of another model or optimizer: {name} is '
        f'{array.dtype}{list(array.shape)} there and '
        f'{data.dtype}{list(np.shape(data))} here.'
      )
    if _is_key(leaf):
      array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    leaves.append(array)
  if left:
    raise UsageError(
      f'{origin} is of another model or optimizer: it also has {min(left)}.'
    )
  return structure.unflatten(leaves)


def select(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """The arrays under one field of the state, by the rest of their paths."""
  start = f'{prefix}/'
  return {
    name[len(start) :]: array
    for name, array in arrays.items()
    if name.startswith(start)
  }


def _require_folder(path: pathlib.Path) -> None:
  if path.exists() and not path.is_dir():
    raise UsageError(
      f'{path} is not a folder: put the checkpoints back, or move it away.'
    )


class _Damage(Exception):
  """Which file of a checkpoint is not what was written."""


def _all_damaged(folder: pathlib.Path, damages: dict[int, _Damage]) -> str:
  """The first half of a sentence."""
  list_of_steps = '; '.join(f'step {step}: {damages[step]}' for step in damages)
  return f'every checkpoint in {folder} is damaged ({list_of_steps})'


def _read(
  manager: ocp.CheckpointManager, folder: pathlib.Path, step: int
) -> Checkpoint:
  """Reads a checkpoint that has been verified; whatever orbax raises is no damage.

  Without digests nobody can tell damage from a full disk, a missing permission or too
  little memory: then too the error is shown as it is, and says what can be done.
  """
  ocp = _import_orbax()
  try:
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(), position=ocp.args.JsonRestore()
      ),
    )
  except Exception as error:
    if not (folder / str(step) / _DIGESTS).exists():
      error.add_note(
        f'The checkpoint {folder / str(step)} has no {_DIGESTS}, so that its files '
        'cannot be verified: the run was killed while it saved. If it cannot be read '
        'for that reason, move it away, and the one before is read.'
      )
    raise
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(restored.state)[0]
  }
  if (stored := int(arrays['step'])) != step:
    raise UsageError(
      f'{folder / str(step)} is the checkpoint of step {stored}: give the folder that '
      'name back.'
    )
  return Checkpoint(arrays, dict(restored.position))


def _verify(folder: pathlib.Path) -> None:
  """Compares a checkpoint's files with their digests before orbax opens them.

  A run killed between orbax's last rename and ours leaves a whole checkpoint without
  digests; it is accepted.

  Raises:
    _Damage: a file is changed or missing, or the digests themselves are no digests.
    OSError: a file cannot be read, whatever it holds.
  """
  path = folder / _DIGESTS
  if not path.exists():
    return
  try:
    written = dict(json.loads(path.read_bytes()))
  except (ValueError, TypeError):
    raise _Damage(f'{_DIGESTS} is changed') from None
  for name, digest in written.items():
    if not (folder / name).is_file():
      raise _Damage(f'{name} is missing')
    if _digest(folder / name) != digest:
      raise _Damage(f'{name} is changed')


def _digests(folder: pathlib.Path) -> dict[str, str]:
  """The digest of every file of a checkpoint but that of the digests."""
  return {
    path.relative_to(folder).as_posix(): _digest(path)
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path.name != _DIGESTS
  }


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'blake2b').hexdigest()


def _nest(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  """Arrays as nested dicts, so that orbax files read well without this project."""
  tree: dict[str, Any] = {}
  for name, array in arrays.items():
    *parents, leaf = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = array
  return tree


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _import_orbax() -> types.ModuleType:
  """Imports orbax, which is slow, and silences its log: what matters is raised."""
  import orbax.checkpoint as ocp

  logging.getLogger('absl').setLevel(logging.CRITICAL)
  return ocp
