"""Brings batches to the devices, and tells how long steps waited for them."""

from __future__ import annotations

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training.meshes import MeshParallel
from training.parallel import DataParallel
from training.problem import Batch, Batches, Split

# Batches that are made ahead of the step that takes them.
_AHEAD = 4
_GIB = 1 << 30


def fit(splits: Sequence[Split], limit_gib: float) -> bool:
  """Whether the arrays of all splits together take at most so many GiB."""
  arrays = [getattr(split, 'arrays', None) for split in splits]
  if any(found is None for found in arrays):
    return False
  return sum(x.nbytes for x in jax.tree.leaves(arrays)) <= limit_gib * _GIB


class Feed:
  """The batches of one split, on the devices.

  A resident split is copied to every device once, and a batch is made there from the
  numbers of its examples. Batches of others are made on the host, in a thread that runs
  ahead of the steps. Both give the same batches, bit for bit.

  Attributes:
    split: the split.
  """

  def __init__(
    self, split: Split, replicas: DataParallel | MeshParallel, *, resident: bool
  ):
    """Takes a split, and places its arrays on the devices if it is resident."""
    self.split = split
    self._replicas = replicas
    self._arrays = None
    if resident:
      self._arrays = replicas.copy(split.arrays)
      self._take = replicas.map(_take)

  def epoch(self, batches: Batches, epoch: int, start: int = 0) -> Iterator[Batch]:
    """Yields this process's shards of an epoch's batches, from step `start` on."""
    if self._arrays is None:
      yield from _ahead(self._placed(self._made(batches, epoch, start)))
      return
    for indices in batches.indices(epoch, start):
      yield self._take(self._arrays, self._replicas.local(indices.astype(np.int32)))

  def _made(self, batches: Batches, epoch: int, start: int) -> Iterator[Batch]:
    """This process's shards, and nothing else where batches can make them alone."""
    local = self._replicas.local
    if hasattr(batches, 'local_epoch'):
      return batches.local_epoch(epoch, start, local)
    return map(local, batches.epoch(epoch, start))

  def _placed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
      yield jax.block_until_ready(self._replicas.place(batch))


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
  """The same items, made by a thread while those before them are used."""
  end = object()
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    ordered = collections.deque(thread.submit(next, items, end) for _ in range(_AHEAD))
    try:
      while (item := ordered.popleft().result()) is not end:
        ordered.append(thread.submit(next, items, end))
        yield item
    finally:
      for future in ordered:
        future.cancel()


class Stopwatch:
  """Sums the time in which devices may have stood idle for want of a batch.

  Attributes:
    waited: seconds waited for batches.
    total: seconds of training of which they are a part.
  """

  def __init__(self, waited: float = 0.0, total: float = 0.0):
    """Goes on from what was measured before."""
    self.waited, self.total = waited, total

  def next(self, feed: Iterator[Batch], running: Any) -> Batch | None:
    """The next batch of a feed, None after the last.

    The time it takes counts, unless the step before is still being computed after it.

    Args:
      feed: the batches.
      running: results of the step before; None if there was none.
    """
    before = time.monotonic()
    batch = next(feed, None)
    if all(x.is_ready() for x in jax.tree.leaves(running)):
      self.waited += time.monotonic() - before
    return batch

  @property
  def share(self) -> float:
    """Share of the time that was waited, in [0, 1]."""
    return self.waited / self.total if self.total else 0.0


def _take(arrays: Batch, indices: jax.Array) -> Batch:
  """The batch of the examples `indices`; -1 stands for an empty slot."""
  real = indices >= 0

  def rows(array):
    found = array[jnp.maximum(indices, 0)]
    mask = jnp.reshape(real, real.shape + (1,) * (found.ndim - real.ndim))
    return jnp.where(mask, found, 0)

  return {**jax.tree.map(rows, arrays), 'weights': real.astype(jnp.float32)}


class Source:
  """The batches of one split, for programs that take the rows themselves.

  Attributes:
    split: the split.
    arrays: of a resident split on the devices, an argument of the programs; else None.
  """

  def __init__(self, split: Split, place: Callable[[Any], Any], *, resident: bool):
    """Takes a split, and places its arrays if it is resident."""
    self.split = split
    self.arrays = place(dict(split.arrays)) if resident else None

  def items(
    self, batches: Batches, epoch: int, start: int, place: Callable[[Any], Any]
  ) -> Iterator[Any]:
    """Yields, placed, what `batch` makes an epoch's batches of, from a step on."""
    if self.arrays is None:
      made = batches.epoch(epoch, start)
      yield from _ahead(jax.block_until_ready(place(batch)) for batch in made)
      return
    for indices in batches.indices(epoch, start):
      yield place(indices.astype(np.int32))

  @staticmethod
  def batch(arrays: Batch | None, item: Any) -> Batch:
    """The batch that an item stands for; pure, for the inside of a program."""
    return item if arrays is None else _take(arrays, item)
