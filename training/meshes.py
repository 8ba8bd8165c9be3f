"""Steps over a mesh of devices, none of which has to hold the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from training import microbatches, parallel, sharing
from training.config import Config
from training.errors import UsageError
from training.parallel import DataParallel
from training.problem import Problem
from training.sharing import Sharing

DATA, FSDP = 'data', 'fsdp'
# Arrays of fewer entries are whole on every device: to split them saves nothing.
SMALL = 1024
_EXAMPLE = f'--mesh={DATA}:4,{FSDP}:2'


class MeshParallel:
  """A step on a mesh of devices, under a plain `jax.jit`.

  A batch is split over all axes of the mesh, and every array of the state over the axis
  'fsdp' by `spec`, so that moments lie as their parameters do. A step takes whole
  batches and knows nothing of this: the compiler splits its work, and what it computes
  is what one device computes, but for rounding. Batch normalization is over the whole
  batch.

  It has the methods of `training.parallel.DataParallel`.

  Attributes:
    num_replicas: 1, a single one that takes whole batches.
    axis_name: None: nothing in a step communicates by itself.
    axes: (): no leading axes of a global batch.
    mesh: the devices.
  """

  num_replicas = 1
  axis_name = None
  axes = ()

  def __init__(self, text: str):
    """Takes all devices, of all processes.

    Args:
      text: the axes and their sizes, as ``data:4,fsdp:2``.

    Raises:
      UsageError: a text of another kind, or of another number of devices.
    """
    sizes = parse(text)
    devices, wanted = jax.devices(), math.prod(sizes.values())
    if wanted != len(devices):
      raise UsageError(
        f'--mesh={text} is of {wanted} devices, and there are {len(devices)} '
        f'({devices[0].platform}): give sizes whose product is {len(devices)}.'
      )
    self.mesh = jax.make_mesh(
      tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    self._text = text
    self._whole = NamedSharding(self.mesh, PartitionSpec())

  @property
  def device_kind(self) -> str:
    """What the devices call themselves."""
    return self.mesh.devices.flat[0].device_kind

  @property
  def facts(self) -> dict[str, Any]:
    """What the summary of a run tells of its devices."""
    return {'device': self.device_kind, 'num_replicas': 1, 'mesh': self._text}

  def check(
    self, config: Config, shared: Sharing, problem: Problem, hooks: Sequence[Any] = ()
  ) -> None:
    """Checks that what a step takes at once can be split over all devices.

    Graphs that are packed into one array cannot, and are whole on every device.

    Raises:
      UsageError: a batch, a group of it or a microbatch is not a multiple of them, or
        hooks are to measure what several processes hold.
    """
    if hooks and jax.process_count() > 1:
      raise UsageError(
        f'--mesh={self._text} over {jax.process_count()} processes does not go with '
        '--measure and --track, which need the whole network in one: leave them out, '
        'and measure the checkpoints with eval_hessian.py.'
      )
    inputs = jax.tree.leaves(problem.example_inputs)
    if len({np.shape(leaf)[:1] for leaf in inputs}) > 1:
      return
    whose, rows = f'a step with --batch_size={config.batch_size}', config.batch_size
    if shared.groups:
      whose, rows = f'a group of --m_sharpness={config.m_sharpness}', config.m_sharpness
    if shared.microbatches > 1:
      whose = f'one of --grad_accum_steps={shared.microbatches} parts of {whose}'
      rows //= shared.microbatches
    if rows % self.mesh.size:
      raise UsageError(
        f'--mesh={self._text} does not divide the {rows} examples of {whose}: give a '
        f'multiple of its {self.mesh.size} devices.'
      )

  def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
    """Where an array of the state lies: a rule on its shape alone.

    Its largest dimension that the size of the axis 'fsdp' divides is split over that
    axis, the last of those that are equal. An array without one, or with few entries,
    is whole on every device.
    """
    size = self.mesh.shape.get(FSDP, 1)
    fits = [axis for axis, length in enumerate(shape) if length and length % size == 0]
    if size == 1 or not fits or math.prod(shape) < SMALL:
      return PartitionSpec()
    largest = max(fits, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[None] * largest, FSDP)

  def shardings(self, tree: Any) -> Any:
    """Where each array of a state lies."""
    return jax.tree.map(
      lambda leaf: NamedSharding(self.mesh, self.spec(np.shape(leaf))), tree
    )

  def make(self, init: Callable[..., Any], *args: Any) -> Any:
    """Calls what makes a state, each part of it on the devices that it is for."""
    out_shardings = self.shardings(jax.eval_shape(init, *args))
    return jax.jit(init, out_shardings=out_shardings)(*args)

  def spread(self, state: Any, *, restored: bool = False) -> Any:
    """Brings a state to the devices, each array to those it is for.

    Args:
      state: of the host, or of `make`.
      restored: whether it is that of the primary process, who alone reads files.
    """
    state = parallel.broadcast(state) if restored else state
    return jax.tree.map(_put, state, self.shardings(state))

  def copy(self, arrays: Any) -> Any:
    """Brings arrays to every device, whole."""
    return jax.tree.map(lambda leaf: _put(leaf, self._whole), arrays)

  def place(self, batch: Any) -> Any:
    """Brings a batch to the devices, its examples split over them."""
    sharding = self._rows(batch)
    return jax.tree.map(lambda leaf: _put(leaf, sharding), batch)

  def local(self, batch: Any) -> Any:
    """What a process needs of a global batch: all, of which `place` takes its part."""
    return batch

  def map(
    self, step: Callable[..., Any], *, donate: bool = False
  ) -> Callable[..., Any]:
    """Compiles a step for the mesh.

    Args:
      step: ``step(state, batch) -> (state, metrics)``, or any function of what is on
        the devices and a batch, or the numbers of its examples.
      donate: for a step that makes a new state: the one it is given is consumed, and
        the new one lies as it did.
    """
    lay = jax.lax.with_sharding_constraint

    def on_mesh(first, batch):
      found = step(first, lay(batch, self._rows(batch)))
      if donate:
        state, metrics = found
        return lay(state, self.shardings(state)), lay(metrics, self._whole)
      return lay(found, self._rows(found) if _is_batch(found) else self._whole)

    compiled = jax.jit(on_mesh, donate_argnums=(0,) if donate else ())
    return compiled if donate else parallel.in_turn(compiled)

  def first(self, tree: Any) -> Any:
    """The whole arrays in NumPy, keys as typed keys; all processes take part."""

    def take(leaf):
      if leaf.is_fully_replicated:
        data = leaf.addressable_shards[0].data
        return data if parallel.is_key(data) else np.asarray(data)
      if leaf.is_fully_addressable:
        return np.asarray(leaf)
      return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(take, tree)

  def variables(self, tree: Any) -> Any:
    """The whole arrays on the first device, which has to hold them."""
    return jax.device_put(tree, self.mesh.devices.flat[0])

  def _rows(self, batch: Any) -> Any:
    """Where a batch lies, or the numbers of its examples.

    The axis of the examples is the last of its weights'. It is split over the axes of
    the mesh that divide it, which may be some only for the last batch of an epoch.
    Arrays in which the examples do not stand in rows stay whole.
    """
    slots = batch['weights'] if _is_batch(batch) else batch
    axis, count = slots.ndim - 1, slots.shape[-1]
    if any(
      np.shape(leaf)[: axis + 1] != slots.shape for leaf in jax.tree.leaves(batch)
    ):
      return self._whole
    names = self.mesh.axis_names
    size = lambda some: math.prod(self.mesh.shape[name] for name in some)
    choices = [names, *((name,) for name in names), ()]
    most = max((some for some in choices if count % size(some) == 0), key=size)
    return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, most))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
  """Brings an array that every process has to the devices, without communication."""
  if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
    return leaf
  if sharding.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  if parallel.is_key(leaf):
    data = _put(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
  leaf = np.asarray(leaf)
  return jax.make_array_from_callback(leaf.shape, sharding, lambda at: leaf[at])


def _is_batch(tree: Any) -> bool:
  return isinstance(tree, dict) and 'weights' in tree


def parse(text: str) -> dict[str, int]:
  """The axes of a mesh and their sizes.

  Raises:
    UsageError: an entry that is no axis with a size, or one that is there twice.

  >>> parse('data:4,fsdp:2')
  {'data': 4, 'fsdp': 2}
  """
  sizes = {}
  for entry in text.split(','):
    name, _, size = entry.partition(':')
    if not (size.isascii() and size.isdecimal() and len(size) < 10 and int(size)):
      raise UsageError(
        f'--mesh={text}: {entry!r} is no axis with its size; give them as {_EXAMPLE}.'
      )
    if name not in (DATA, FSDP):
      raise UsageError(
        f'--mesh={text}: {name!r} is no axis of a mesh; choose {DATA} (splits the '
        f'batch), {FSDP} (splits batch and parameters) or both, as {_EXAMPLE}.'
      )
    if name in sizes:
      raise UsageError(f'--mesh={text} has {name} twice: give it once.')
    sizes[name] = int(size)
  return sizes


def of(mesh: str | None, num_devices: int = 0) -> DataParallel | MeshParallel:
  """What maps the steps of a run over devices.

  Args:
    mesh: of `MeshParallel`; None for replicas.
    num_devices: of `DataParallel`.

  Raises:
    UsageError: both are given, or one is not possible.
  """
  if mesh is None:
    return DataParallel(num_devices)
  if num_devices:
    raise UsageError(
      f'--mesh={mesh} takes all devices: leave out --devices={num_devices}.'
    )
  return MeshParallel(mesh)


def fit(
  config: Config,
  problem: Problem,
  num_devices: int = 0,
  mesh: str | None = None,
  hooks: Sequence[Any] = (),
) -> tuple[DataParallel | MeshParallel, Sharing]:
  """Finds what maps a run's steps, and who perturbs with whom; see `loop.train`.

  Raises:
    UsageError: the batches cannot be dealt out to the devices.
  """
  replicas = of(mesh, num_devices)
  shared = sharing.of(config, replicas.num_replicas)
  replicas.check(config, shared, problem, hooks)
  microbatches.check(problem, shared.microbatches)
  return replicas, shared
