"""Maps a step over replicas, one a device; `training.meshes` over a mesh."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from training import peers, rendezvous
from training.errors import UsageError

AXIS = 'batch'
# Seconds to wait for the other processes of a run.
_PATIENCE = 300
_TEXT_BYTES = 1 << 16
# Fields of a configuration that may differ between hosts.
_OF_A_HOST = ('manual_dir', 'data_dir', 'data_workers')


class DataParallel:
  """The replicas of a step, one a device.

  Several are mapped by `jax.pmap`, with `AXIS` as the first axis of every array. A
  single one takes whole batches under a plain `jax.jit`, with no axis at all.

  Attributes:
    num_replicas: replicas over all processes.
    axis_name: the axis over which they communicate; None for a single one.
  """

  def __init__(self, num_devices: int = 0):
    """Takes the first num_devices devices of this process; 0 takes all."""
    devices = jax.local_devices()
    if num_devices > len(devices):
      raise UsageError(
        f'--devices={num_devices}: this process has {len(devices)} '
        f'{devices[0].platform} device(s); give at most that, or 0 for all.'
      )
    if num_devices < 0:
      raise UsageError(f'--devices={num_devices}: must not be negative.')
    self._devices = devices[: num_devices or len(devices)]
    self._num_local = len(self._devices)
    self.num_replicas = self._num_local * jax.process_count()
    if self.num_replicas != jax.device_count() and jax.process_count() > 1:
      raise UsageError(
        f'--devices={num_devices}: of several processes each takes all its devices, '
        f'and equally many; this one takes {self._num_local} of {len(devices)}, and '
        f'all {jax.process_count()} have {jax.device_count()}.'
      )
    self.axis_name = AXIS if self.num_replicas > 1 else None
    self._sharding = jax.sharding.SingleDeviceSharding(self._devices[0])
    if self.axis_name:
      mesh = jax.sharding.Mesh(np.array(self._devices), (AXIS,))
      spec = jax.sharding.PartitionSpec(AXIS)
      self._sharding = jax.sharding.NamedSharding(mesh, spec)

  @property
  def axes(self) -> tuple[int, ...]:
    """Leading axes of a global batch."""
    return (self.num_replicas,) if self.axis_name else ()

  @property
  def device_kind(self) -> str:
    """What the devices call themselves."""
    return self._devices[0].device_kind

  @property
  def facts(self) -> dict[str, Any]:
    """What the summary of a run tells of its devices."""
    return {'device': self.device_kind, 'num_replicas': self.num_replicas}

  def check(self, config: Any, shared: Any, problem: Any, hooks: Any = ()) -> None:
    """Checks nothing: what does not fit replicas, `sharing.of` refuses."""

  def make(self, init: Callable[..., Any], *args: Any) -> Any:
    """Calls what makes a state, on one device."""
    return jax.jit(init)(*args)

  def spread(self, state: Any, *, restored: bool = False) -> Any:
    """Brings the primary process's state to the devices, a copy to each."""
    del restored
    return self.place(self.replicate(broadcast(state)))

  def copy(self, arrays: Any) -> Any:
    """Brings arrays to every device, whole."""
    return self.place(self.replicate(arrays))

  def map(
    self, step: Callable[..., Any], *, donate: bool = False
  ) -> Callable[..., Any]:
    """Maps a step of one replica; with donate its first argument is consumed."""
    donated = (0,) if donate else ()
    if not self.axis_name:
      return jax.jit(step, donate_argnums=donated)
    mapped = jax.pmap(
      step,
      axis_name=AXIS,
      devices=self._devices if jax.process_count() == 1 else None,
      donate_argnums=donated,
    )
    return mapped if donate else in_turn(mapped)

  def replicate(self, tree: Any) -> Any:
    """Gives every leaf the axis of the replicas, one copy each, where there is one."""

    def stack(leaf):
      if is_key(leaf):
        data = stack(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
      leaf = np.asarray(leaf)
      if not self.axis_name:
        return leaf
      return np.broadcast_to(leaf, (self._num_local, *leaf.shape))

    return jax.tree.map(stack, tree)

  def place(self, tree: Any) -> Any:
    """Moves arrays, with their axis of local replicas, to the devices."""
    return jax.device_put(tree, self._sharding)

  def first(self, tree: Any) -> Any:
    """The first local replica of a mapped result, in NumPy (keys as typed keys)."""

    def take(leaf):
      data = leaf.addressable_shards[0].data
      data = data if is_key(leaf) else np.asarray(data)
      return data[0] if self.axis_name else data

    return jax.tree.map(take, tree)

  def variables(self, tree: Any) -> Any:
    """The first local replica of a mapped result, on its device."""
    if not self.axis_name:
      return tree
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], tree)

  def local(self, batch: Any) -> Any:
    """The shards of a global batch that belong to this process."""
    if jax.process_count() == 1:
      return batch
    start = jax.process_index() * self._num_local
    return jax.tree.map(lambda leaf: leaf[start : start + self._num_local], batch)


def initialize(
  coordinator: str = '', num_processes: int = 1, process_id: int = 0
) -> None:
  """Joins the processes of a multi-host run, before anything else touches a device.

  Args:
    coordinator: host:port of process 0, 'cluster' to read the cluster's own environment
      (Slurm, Open MPI, Kubernetes, Cloud TPU), or '' for a single process.
    num_processes: number of processes.
    process_id: this process, in [0, num_processes).

  Raises:
    UsageError: the processes cannot be joined, or the first one does not answer.
  """
  if not coordinator and (num_processes > 1 or process_id > 0):
    raise UsageError(
      f'--num_processes={num_processes} --process_id={process_id}: several processes '
      "need --coordinator, host:port of the first or 'cluster'."
    )
  if num_processes < 1:
    raise UsageError(f'--num_processes={num_processes}: must be at least 1.')
  if coordinator != 'cluster' and not 0 <= process_id < num_processes:
    raise UsageError(
      f'--process_id={process_id}: must be at least 0 and below '
      f'--num_processes={num_processes}.'
    )
  if coordinator not in ('', 'cluster') and ':' not in coordinator:
    raise UsageError(
      f"--coordinator={coordinator}: give host:port of the first process, or 'cluster'."
    )
  if not coordinator:
    return
  port = coordinator.rpartition(':')[2]
  if coordinator != 'cluster' and not (port.isdecimal() and 0 < int(port) < 1 << 16):
    raise UsageError(f'--coordinator={coordinator}: {port!r} is no port (1 to 65535).')
  try:
    if coordinator == 'cluster':
      _join_cluster()
    else:
      _join_processes(coordinator, num_processes, process_id)
  except UsageError:
    raise
  except (ValueError, RuntimeError) as error:
    if coordinator == 'cluster' and 'coordinator_address' in str(error):
      raise UsageError(
        '--coordinator=cluster: JAX finds no cluster (Slurm, Open MPI, Kubernetes or '
        'Cloud TPU) around this process; give host:port of the first process.'
      ) from error
    raise UsageError(
      f'--coordinator={coordinator} --num_processes={num_processes} '
      f'--process_id={process_id}: cannot join the other processes ({error}).'
    ) from error


def _join_processes(coordinator: str, num_processes: int, process_id: int) -> None:
  """Waits for the others; then JAX is told of each other's ends of a tunnel."""
  host, _, port = coordinator.rpartition(':')
  host = host.strip('[]')
  if process_id == 0:
    _say(
      f'waiting up to {_PATIENCE} s for the {num_processes - 1} other process(es) of '
      f'--num_processes={num_processes} to come to {coordinator}'
    )
    gate = rendezvous.Gate(int(port), num_processes)
    lines = gate.lines(_PATIENCE)
    service = rendezvous.free_port()
    gate.tunnel(service)
  else:
    _say(f'waiting up to {_PATIENCE} s for --coordinator={coordinator} to answer')
    line = rendezvous.visit(
      [host], int(port), process_id, num_processes, patience=_PATIENCE
    )
    lines, service = {0: line}, rendezvous.entrance(host, int(port))
  jax.config.update('jax_enable_preemption_service', False)  # `peers.agree` does it.
  peers.watch(process_id, lines)
  address = f'127.0.0.1:{service}'
  jax.distributed.initialize(
    address,
    num_processes,
    process_id,
    initialization_timeout=_PATIENCE,
    coordinator_bind_address=address,
  )
  _check_devices()


def _join_cluster() -> None:
  """Lets JAX ask the cluster; then the others are told where process 0 listens."""
  _say(f'waiting up to {_PATIENCE} s for the processes of the cluster')
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(initialization_timeout=_PATIENCE)
  _check_devices()
  count, process = jax.process_count(), jax.process_index()
  gate = rendezvous.Gate(0, count) if process == 0 else None
  place = broadcast_json([rendezvous.addresses(), gate.port] if gate else None)
  if gate:
    lines = gate.lines(_PATIENCE)
    gate.tunnel(0)
  else:
    lines = {0: rendezvous.visit(*place, process, count, patience=_PATIENCE)}
  peers.watch(process, lines)


def _say(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
  """On the CPU, waits for each call's result before the next call can be made.

  Calls that do not depend on each other run at the same time. Several of them take all
  the threads in which CPU devices wait for each other, and none comes to its end.
  """
  if jax.default_backend() != 'cpu':
    return function
  return lambda *args: jax.block_until_ready(function(*args))


def is_primary() -> bool:
  """Whether this process is the one that writes files and prints."""
  return jax.process_index() == 0


def broadcast(tree: Any) -> Any:
  """The primary process's arrays, bit for bit, on every process.

  Of those of the other processes only shapes and types are read.
  """
  if jax.process_count() == 1:
    return tree

  def send(leaf):
    if is_key(leaf):
      data = jax.random.key_data
      data = data(leaf) if is_primary() else jax.eval_shape(data, leaf)
      return jax.random.wrap_key_data(send(data), impl=jax.random.key_impl(leaf))
    if is_primary():
      leaf = np.asarray(leaf, order='C')
    else:
      leaf = np.zeros(np.shape(leaf), leaf.dtype)
    # As bytes: a broadcast of float64 would round it to float32.
    raw = multihost_utils.broadcast_one_to_all(np.frombuffer(leaf.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(raw).tobytes(), leaf.dtype).reshape(leaf.shape)

  return jax.tree.map(send, tree)


def broadcast_json(value: Any) -> Any:
  """The primary process's JSON value on every process."""
  text = json.dumps(value).encode()
  if jax.process_count() == 1:
    return value
  padded = np.zeros(_TEXT_BYTES, np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  received = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
  return json.loads(received.rstrip(b'\0'))


def _check_devices() -> None:
  """Refuses processes with different numbers of devices, which nothing can serve.

  Raises:
    UsageError: names the numbers, in all processes alike.
  """
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    told = ', '.join(f'{count} in process {i}' for i, count in sorted(counts.items()))
    raise UsageError(
      f'the processes have different numbers of devices ({told}): start all with '
      'equally many.'
    )


def check_same(configs: Mapping[str, Any], **flags: Any) -> None:
  """Checks that all processes are to train the same.

  Args:
    configs: the configurations of all runs by their folder.
    **flags: what else has to be the same, as the mesh.

  Raises:
    UsageError: this process's differ from the primary one's.
  """
  fields = {
    name: {**dataclasses.asdict(config), **flags} for name, config in configs.items()
  }
  for values in fields.values():
    for name in _OF_A_HOST:
      values.pop(name, None)
  text = json.dumps(fields)
  mine = {
    'first': next(iter(json.loads(text).values())),
    'all': hashlib.sha256(text.encode()).hexdigest(),
  }
  wanted = broadcast_json(mine)
  if mine == wanted:
    return
  first, theirs = mine['first'], wanted['first']
  differing = [
    f'{name} is {first[name]!r} here and {theirs.get(name)!r} in process 0'
    for name in first
    if first[name] != theirs.get(name)
  ]
  raise UsageError(
    f'--process_id={jax.process_index()} was started with other flags: '
    f'{"; ".join(differing) or "the runs of its sweep are others"}. Give all processes '
    'the same.'
  )


def agree_to_stop(step: int, requested: bool) -> bool:
  """Whether all processes stop after this step; several agree on one step."""
  del step  # All call this equally often.
  if jax.process_count() == 1:
    return requested
  if not peers.watched():  # Joined by the caller's own means.
    return bool(multihost_utils.process_allgather(np.array(requested)).any())
  return peers.agree(requested)


def is_key(leaf: Any) -> bool:
  """Whether an array is one of typed keys."""
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
