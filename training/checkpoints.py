"""Checkpoints: orbax files with their digests, the newest ones of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from training.config import write_json
from training.errors import TrainingDiverged, UsageError
from training.problem import Problem
from training.step import TrainState

FOLDER = 'checkpoints'
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
  """The checkpoints of one workdir, written by one process."""

  def __init__(self, workdir: pathlib.Path, keep: int = 2):
    """Opens the folder, or makes it, and keeps the newest so many; 0 keeps all."""
    self._folder = (workdir / FOLDER).absolute()
    self._keep = keep or None
    self._folder.mkdir(exist_ok=True)
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    _quiet_orbax()
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
    return ocp.CheckpointManager(self._folder, options=options)

  def save(self, state: TrainState, position: dict[str, Any]) -> None:
    """Stores a state at its step, whole or not at all.

    Raises:
      TrainingDiverged: a parameter is not finite; the older checkpoints stay.
    """
    arrays = to_arrays(state)
    step = int(arrays['step'])
    for name, array in arrays.items():
      if name.startswith('params/') and not np.isfinite(array.astype(np.float32)).all():
        raise TrainingDiverged(
          f'the parameter {name[len("params/") :]} is not finite after step {step}: '
          'the last good checkpoint is kept; try a lower --learning_rate or --rho.'
        )
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(_nest(arrays)),
        position=ocp.args.JsonSave(position),
      ),
    )
    folder = self._folder / str(step)
    write_json(folder / _DIGESTS, _digests(folder))

  def restore_newest(self) -> Checkpoint | None:
    """The newest undamaged checkpoint; damaged ones are moved away with a warning."""
    while self._steps():
      step = self._steps()[-1]
      try:
        return _read(self._manager, self._folder, step)
      except Exception as error:  # whatever the damage leads to
        shelf = self._folder.parent / _DAMAGED
        shelf.mkdir(exist_ok=True)
        shutil.rmtree(shelf / str(step), ignore_errors=True)
        shutil.move(self._folder / str(step), shelf / str(step))
        warnings.warn(
          f'the checkpoint of step {step} in {self._folder} is damaged '
          f'({_brief(error)}): it is moved to {shelf.name}/, and the run continues '
          'from the one before.',
          stacklevel=2,
        )
        self._manager.close()
        self._manager = self._open()
    return None

  def _steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def close(self) -> None:
    """Releases orbax's threads."""
    self._manager.close()


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps of the checkpoints that a run has, ascending; reads none of them."""
  folder = workdir / FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def load(workdir: pathlib.Path, step: int | None = None) -> Checkpoint:
  """Reads a checkpoint of a run, None the newest undamaged one; changes nothing.

  Raises:
    UsageError: there is none.
  """
  found = steps(workdir)
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
  _quiet_orbax()
  options = ocp.CheckpointManagerOptions(read_only=True)
  for number in reversed(found) if step is None else [step]:
    with contextlib.closing(ocp.CheckpointManager(folder, options=options)) as manager:
      try:
        return _read(manager, folder, number)
      except Exception as error:  # as above
        warnings.warn(
          f'the checkpoint of step {number} in {folder} is damaged '
          f'({_brief(error)}): the one before is read.',
          stacklevel=2,
        )
  which = 'every checkpoint' if step is None else f'the checkpoint of step {step}'
  raise UsageError(
    f'{which} in {folder} is damaged: train again into another --workdir.'
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


def _read(
  manager: ocp.CheckpointManager, folder: pathlib.Path, step: int
) -> Checkpoint:
  """Verifies and reads one checkpoint."""
  _verify(folder / str(step))
  restored = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.PyTreeRestore(), position=ocp.args.JsonRestore()
    ),
  )
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(restored.state)[0]
  }
  return Checkpoint(arrays, dict(restored.position))


def _verify(folder: pathlib.Path) -> None:
  """Compares a checkpoint's files with their digests before orbax opens them.

  A run killed between orbax's last rename and ours leaves a whole checkpoint without
  digests; it is accepted.
  """
  path = folder / _DIGESTS
  if not path.exists():
    return
  written, found = json.loads(path.read_text()), _digests(folder)
  for name in written:
    if found.get(name) != written[name]:
      raise ValueError(f'{name} is {"changed" if name in found else "missing"}')


def _digests(folder: pathlib.Path) -> dict[str, str]:
  """The digest of every file of a checkpoint but that of the digests."""
  found = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file() and path.name != _DIGESTS:
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'blake2b').hexdigest()
      found[path.relative_to(folder).as_posix()] = digest
  return found


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


def _brief(error: Exception) -> str:
  lines = str(error).splitlines() or [type(error).__name__]
  return lines[0][:120]


def _quiet_orbax() -> None:
  """Silences orbax's own log lines; what matters is raised."""
  logging.getLogger('absl').setLevel(logging.CRITICAL)
