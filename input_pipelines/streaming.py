"""Splits whose examples are read when their batch is made, by threads or processes.

In memory is what names the examples, and the few batches that are ahead of the steps.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from input_pipelines import batching
from input_pipelines.batching import Batch
from input_pipelines.errors import DataError

# Examples that a thread reads at once, and a process hands over at once.
_PIECE = 16
# Threads that read, in this process or in each of the others, and pieces made ahead.
_THREADS, _AHEAD = 16, 32
_THREADS_OF_A_WORKER, _AHEAD_OF_A_WORKER = 4, 8


class Examples(Protocol):
  """Examples that are read one by one, in any order, by several threads at once.

  It is sent to worker processes by pickle.

  Attributes:
    shape: of the inputs of an example.
    dtype: their type.
  """

  shape: tuple[int, ...]
  dtype: type

  def __len__(self) -> int: ...

  def load(
    self, index: int, generator: np.random.Generator | None
  ) -> tuple[np.ndarray, int]:
    """Inputs and label of an example.

    Args:
      index: which one.
      generator: makes the random choices of its augmentation; None for none.
    """


class StreamedSplit:
  """Examples that are read again for every batch.

  What a training example looks like is a function of seed, epoch and the example's
  number alone: a run that is resumed, or that has other numbers of workers, devices or
  processes, sees the same inputs. Batches without a seed are not augmented.
  """

  def __init__(self, examples: Examples, *, num_workers: int = 0):
    """Takes examples.

    Args:
      examples: what is read.
      num_workers: processes that read; 0 for threads of this one.

    Raises:
      DataError: grain is not installed.
    """
    self._examples, self._reader = examples, _Reader(num_workers)

  @property
  def num_examples(self) -> int:
    """Number of examples."""
    return len(self._examples)

  def batches(
    self,
    batch_size: int,
    *,
    shards: tuple[int, ...] = (),
    seed: int | None = None,
  ) -> StreamedBatches:
    """Returns the split's batches.

    Args:
      batch_size: examples in a global batch.
      shards: leading axes of every leaf, `(replicas,)` or `(replicas, groups)`.
      seed: seed of each epoch's permutation and of augmentation; None keeps the order,
        and the examples as they are for testing.
    """
    return StreamedBatches(self._examples, self._reader, batch_size, shards, seed)


class StreamedBatches:
  """The batches of a `StreamedSplit`, for any epoch and from any step on."""

  def __init__(
    self,
    examples: Examples,
    reader: _Reader,
    batch_size: int,
    shards: tuple[int, ...],
    seed: int | None,
  ):
    """Prepares batches, see `StreamedSplit.batches`."""
    self._examples, self._reader = examples, reader
    self._order = batching.Order(len(examples), batch_size, shards, seed)
    self._shards = shards

  @property
  def steps_per_epoch(self) -> int:
    """Number of batches in an epoch, the last, smaller one included."""
    return self._order.steps_per_epoch

  def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
    """Yields the batches of `epoch`, beginning at step `start` of it."""
    return self.local_epoch(epoch, start, lambda array: array)

  def local_epoch(
    self, epoch: int, start: int, local: Callable[[np.ndarray], np.ndarray]
  ) -> Iterator[Batch]:
    """Yields one process's shards of the batches, and reads nothing else.

    Args:
      epoch: which one.
      start: first step of it.
      local: takes the process's part of an array with the axes of the shards.

    Returns:
      Batches with the axes of that part.
    """
    numbers = np.arange(math.prod(self._shards)).reshape(self._shards)
    part = _Part(self._order, np.asarray(local(numbers)))
    loaded = self._reader.read(self._examples, part, epoch, start)
    try:
      for indices in part.indices(epoch, start):
        yield self._collate(indices, loaded)
    finally:
      loaded.close()

  def _collate(self, indices: np.ndarray, loaded: Iterator[_Piece]) -> Batch:
    """The batch of an array of indices, whose examples come next in pieces."""
    real, shape = indices >= 0, self._examples.shape
    inputs = np.zeros((indices.size, *shape), self._examples.dtype)
    labels = np.zeros(indices.size, np.int32)
    rows, filled = np.flatnonzero(real), 0
    while filled < len(rows):
      piece = next(loaded)
      found = np.frombuffer(piece.labels, labels.dtype)
      there = rows[filled : filled + len(found)]
      inputs[there] = np.frombuffer(piece.inputs, inputs.dtype).reshape(-1, *shape)
      labels[there] = found
      filled += len(found)
    return {
      'inputs': inputs.reshape(*indices.shape, *shape),
      'labels': labels.reshape(indices.shape),
      'weights': real.astype(np.float32),
    }


class _Part(NamedTuple):
  """The shards of a split's batches that one process reads.

  Attributes:
    order: of the whole split.
    shards: numbers of the shards, of the process's own axes.
  """

  order: batching.Order
  shards: np.ndarray

  def indices(self, epoch: int, start: int = 0) -> list[np.ndarray]:
    """Which examples they hold, -1 for an empty slot."""
    return [
      indices.reshape(-1, indices.shape[-1])[self.shards]
      for indices in self.order.indices(epoch, start)
    ]

  def equals(self, other: _Part) -> bool:
    """Whether the other part has the same examples in the same order."""
    same = vars(self.order) == vars(other.order)
    return same and np.array_equal(self.shards, other.shards)


class _Piece(NamedTuple):
  """Some examples of a batch, or what is wrong with one of them.

  They are bytes, because arrays would go through shared memory, of which parts are left
  behind where a stream is closed early. A fault is a value, because grain adds lines of
  its own to what an exception says.
  """

  inputs: bytes = b''
  labels: bytes = b''
  fault: str = ''


class _Pieces:
  """The examples of all epochs in pieces, as random access for grain.

  No piece has examples of two batches, and every epoch has as many.
  """

  _EPOCHS = 1 << 31  # More than any run has.

  def __init__(self, examples: Examples, part: _Part, first: int = 0):
    """Takes the examples and begins with some piece."""
    self._examples, self._part, self._first = examples, part, first
    self._lengths = [int((x >= 0).sum()) for x in part.indices(0)]
    self._count = self.before(len(self._lengths))
    self._order_of = functools.lru_cache(2)(self._order)
    self._lock = threading.Lock()

  def __reduce__(self) -> Any:
    return _Pieces, (self._examples, self._part, self._first)

  def before(self, step: int) -> int:
    """Number of pieces of an epoch before a step."""
    return sum(-(-length // _PIECE) for length in self._lengths[:step])

  def number(self, epoch: int, step: int) -> int:
    """The first piece of a step."""
    return epoch * self._count + self.before(step)

  def same(self, piece: int, other: int) -> bool:
    """Whether two pieces have the same examples: without a seed, in every epoch."""
    seeded = self._part.order.seed is not None
    return piece == other if seeded else (piece - other) % self._count == 0

  def __len__(self) -> int:
    return self._count * self._EPOCHS

  def __getitem__(self, piece: int) -> _Piece:
    epoch, piece = divmod(piece + self._first, self._count)
    with self._lock:  # Or every thread would make the order of a new epoch.
      order, bounds = self._order_of(epoch)
    indices = order[bounds[piece] : bounds[piece + 1]].tolist()
    load = self._examples.load
    try:
      pairs = [load(index, self._generator(epoch, index)) for index in indices]
    except DataError as error:
      return _Piece(fault=str(error))
    inputs, labels = zip(*pairs, strict=True)
    stacked = np.stack(inputs, dtype=self._examples.dtype, casting='safe')
    return _Piece(stacked.tobytes(), np.array(labels, np.int32).tobytes())

  def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples of an epoch in their order, and where in it pieces begin and end."""
    order = np.concatenate([x[x >= 0] for x in self._part.indices(epoch)])
    ends = np.cumsum(self._lengths)
    firsts = [
      np.arange(end - length, end, _PIECE)
      for end, length in zip(ends, self._lengths, strict=True)
    ]
    return order, np.append(np.concatenate(firsts), len(order))

  def _generator(self, epoch: int, index: int) -> np.random.Generator | None:
    if self._part.order.seed is None:
      return None
    # A spawn key keeps this stream apart from that of the epoch's order.
    sequence = np.random.SeedSequence(
      [self._part.order.seed, epoch], spawn_key=(index,)
    )
    return np.random.Generator(np.random.PCG64(sequence))


class _Reader:
  """Threads or worker processes that make pieces ahead, kept from epoch to epoch.

  Workers take seconds to start, so that those that read an epoch to its end go on with
  the next one.
  """

  def __init__(self, num_workers: int):
    """Checks that grain is installed.

    Raises:
      DataError: it is not.
    """
    self._num_workers = num_workers
    self._idle = []  # One stream, or none.
    # Threads and processes end with the split, and before the interpreter does.
    weakref.finalize(self, _close, self._idle)
    _grain()

  def read(
    self, examples: Examples, part: _Part, epoch: int, start: int
  ) -> Iterator[_Piece]:
    """Yields the pieces from a step of an epoch on, without end.

    Raises:
      DataError: an example cannot be read.
    """
    pieces = _Pieces(examples, part)
    number = pieces.number(epoch, start)
    stream = self._take(part, pieces, number)
    if stream is None:
      iterator = self._start(_Pieces(examples, part, number))
      stream = _Stream(part, iterator, number)
    try:
      while True:
        piece = next(stream.iterator)
        stream.position += 1
        if piece.fault:
          raise DataError(piece.fault)
        yield piece
    except GeneratorExit:
      _close(self._idle)
      self._idle.append(stream)
      raise
    except BaseException:
      stream.iterator.close()
      raise

  def _take(self, part: _Part, pieces: _Pieces, number: int) -> _Stream | None:
    """The stream that stands ready at a piece, if one does."""
    for stream in self._idle:
      if part.equals(stream.part) and pieces.same(stream.position, number):
        return self._idle.pop()
    return None

  def _start(self, pieces: _Pieces) -> Iterator[_Piece]:
    grain = _grain()
    workers = self._num_workers
    threads = _THREADS_OF_A_WORKER if workers else _THREADS
    ahead = _AHEAD_OF_A_WORKER if workers else _AHEAD
    dataset = grain.MapDataset.source(pieces).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
    if workers:
      dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, 2))
    return iter(dataset)


class _Stream:
  """An iterator over pieces that stands before one of them."""

  def __init__(self, part: _Part, iterator: Iterator[_Piece], position: int):
    self.part, self.iterator, self.position = part, iterator, position


def _close(streams: list[_Stream]) -> None:
  """Ends the threads or processes of streams."""
  while streams:
    streams.pop().iterator.close()


def _grain() -> types.ModuleType:
  """The package that reads ahead."""
  try:
    return importlib.import_module('grain.python')
  except ModuleNotFoundError as error:
    raise DataError(
      f'streaming images needs the package {error.name}: install it with pip install '
      f'{error.name.partition(".")[0]}.'
    ) from error
