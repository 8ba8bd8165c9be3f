"""Splits of a data set and their batches, on the host in NumPy.

A batch is a dict of `inputs`, `labels` and float32 `weights`; the weight is
1 for an example and 0 for padding. Batches are a pure function of
`(seed, epoch, start)`, so the position of an interrupted run is two integers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Batch = dict[str, Any]

# Index of a slot that holds no example.
_EMPTY = -1


def split_indices(
  num_examples: int, seed: int, train_fraction: float = 0.7
) -> tuple[np.ndarray, np.ndarray]:
  """Splits `range(num_examples)` at random into train and test indices.

  The train part has `floor(train_fraction * num_examples)` indices.

  Args:
    num_examples: size of the whole set.
    seed: seed of the split; independent of the order of training batches.
    train_fraction: fraction of the examples that are for training.

  Returns:
    Two int64 arrays, `(train, test)`, which together hold every index once.

  >>> train, test = split_indices(10, seed=0)
  >>> len(train), len(test), len(set(train) | set(test))
  (7, 3, 10)
  """
  # A spawn key keeps this stream apart from that of epoch 0.
  sequence = np.random.SeedSequence(seed, spawn_key=(0,))
  order = np.random.default_rng(sequence).permutation(num_examples)
  num_train = math.floor(train_fraction * num_examples)
  return order[:num_train], order[num_train:]


class Order:
  """Which examples the batches of a split hold, for any epoch and from any step on."""

  def __init__(
    self,
    num_examples: int,
    batch_size: int,
    shards: tuple[int, ...],
    seed: int | Sequence[int] | None,
  ):
    """Prepares the order.

    Args:
      num_examples: number of examples in the split.
      batch_size: examples in a global batch; the last one may be smaller.
      shards: leading axes over which a global batch is dealt out.
      seed: seed of the order; None keeps the order of the split. Of several seeds
        the orders lie side by side, along an axis before the shards.
    """
    if batch_size < 1:
      raise ValueError(f'batch_size={batch_size}: must be at least 1.')
    if any(axis < 1 for axis in shards):
      raise ValueError(f'shards={shards}: every axis must be at least 1.')
    self._num_examples = num_examples
    self._batch_size = batch_size
    self._shards = tuple(shards)
    self.seed = seed

  @property
  def steps_per_epoch(self) -> int:
    """Number of batches in an epoch, the last, smaller one included."""
    return -(-self._num_examples // self._batch_size)

  def indices(self, epoch: int, start: int = 0) -> list[np.ndarray]:
    """Returns which examples the batches of `epoch` hold, from step `start` on.

    An int64 array of shape `(*shards, slots)` a batch, -1 for an empty slot; with
    several seeds `(seeds, *shards, slots)`.
    """
    size = self._batch_size
    firsts = range(start * size, self._num_examples, size)
    if not isinstance(self.seed, Sequence):
      order = self._order(self.seed, epoch)
      return [self._deal(order[first : first + size]) for first in firsts]
    orders = [self._order(seed, epoch) for seed in self.seed]
    return [
      np.stack([self._deal(order[first : first + size]) for order in orders])
      for first in firsts
    ]

  def _order(self, seed: int | None, epoch: int) -> np.ndarray:
    if seed is None:
      return np.arange(self._num_examples)
    return np.random.default_rng([seed, epoch]).permutation(self._num_examples)

  def _deal(self, indices: np.ndarray) -> np.ndarray:
    """Deals indices out contiguously to the shards, filling up with -1."""
    num_shards = math.prod(self._shards)
    slots = -(-len(indices) // num_shards)
    dealt = np.full(num_shards * slots, _EMPTY, np.int64)
    dealt[: len(indices)] = indices
    return dealt.reshape(*self._shards, slots)


class Batches(Order):
  """The batches of a split, for any epoch and from any step on."""

  def __init__(
    self,
    num_examples: int,
    batch_size: int,
    shards: tuple[int, ...],
    seed: int | Sequence[int] | None,
    collate: Callable[[np.ndarray], Batch],
  ):
    """Prepares batches.

    Args:
      num_examples: number of examples in the split.
      batch_size: examples in a global batch; the last one may be smaller.
      shards: leading axes over which a global batch is dealt out.
      seed: seed of the order; None keeps the order of the split. Of several seeds
        the batches lie side by side, along an axis before the shards.
      collate: makes a batch of an index array of shape `(*shards, slots)`, in
        which -1 stands for an empty slot.
    """
    super().__init__(num_examples, batch_size, shards, seed)
    self._collate = collate

  def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
    """Yields the batches of `epoch`, beginning at step `start` of it."""
    return map(self._collate, self.indices(epoch, start))


class ArraySplit:
  """Examples that are the rows of one array.

  >>> split = ArraySplit(np.arange(5.0)[:, None], np.arange(5))
  >>> batches = split.batches(2)
  >>> [batch['labels'].tolist() for batch in batches.epoch(0)]
  [[0, 1], [2, 3], [4]]
  """

  def __init__(self, inputs: np.ndarray, labels: np.ndarray):
    """Takes inputs of shape `(n, ...)` and labels of shape `(n, ...)`.

    Labels of integers become int32, others float32.
    """
    if len(inputs) != len(labels):
      raise ValueError(f'{len(inputs)} inputs have {len(labels)} labels.')
    self._inputs = inputs
    whole = np.issubdtype(np.asarray(labels).dtype, np.integer)
    self._labels = np.asarray(labels, np.int32 if whole else np.float32)

  @property
  def num_examples(self) -> int:
    """Number of examples."""
    return len(self._labels)

  @property
  def arrays(self) -> Batch:
    """All `inputs` and `labels`, of which batches are rows."""
    return {'inputs': self._inputs, 'labels': self._labels}

  def batches(
    self,
    batch_size: int,
    *,
    shards: tuple[int, ...] = (),
    seed: int | Sequence[int] | None = None,
  ) -> Batches:
    """Returns the split's batches.

    Args:
      batch_size: examples in a global batch.
      shards: leading axes of every leaf, `(replicas,)` or `(replicas, groups)`.
      seed: seed of each epoch's permutation; None keeps the order. Several seeds make
        batches side by side, along a leading axis of every leaf.

    Returns:
      Batches whose leaves have shape `(*shards, slots, ...)`.
    """
    return Batches(self.num_examples, batch_size, shards, seed, self._collate)

  def _collate(self, indices: np.ndarray) -> Batch:
    real = indices != _EMPTY
    inputs, labels = self._inputs[indices], self._labels[indices]
    inputs[~real], labels[~real] = 0, 0
    return {
      'inputs': inputs,
      'labels': labels,
      'weights': real.astype(np.float32),
    }


class GraphSplit:
  """Examples that are graphs, batched into padded graph tuples.

  A batch is padded to budgets of nodes, edges and graphs that come from a ladder,
  so that few shapes have to be compiled; a batch that needs more takes a higher
  level, so no graph is ever dropped or cut. Inside a batch edges are sorted by
  receiver. Padding nodes and edges belong to the first padding graph, which
  follows the real graphs; padding edges join its first node to itself.
  """

  def __init__(
    self,
    graphs: Any,
    labels: np.ndarray,
    *,
    indices: np.ndarray | None = None,
    node_growth: float = 1.06,
    edge_growth: float = 1.25,
  ):
    """Takes graphs and says which of them are the split's.

    Args:
      graphs: one unpadded `jraph.GraphsTuple` of NumPy arrays that holds n graphs
        one after the other, as `jraph.batch_np` makes it; `edges` may be None.
      labels: integer labels of shape `(n,)`.
      indices: which graphs belong to the split, in its order; by default all.
      node_growth: ratio of neighbouring levels of the node ladder.
      edge_growth: ratio of neighbouring edge levels at one node level.
    """
    if len(graphs.n_node) != len(labels):
      raise ValueError(f'{len(graphs.n_node)} graphs have {len(labels)} labels.')
    # A graph's edges stay together, because its nodes are contiguous.
    order = np.argsort(graphs.receivers, kind='stable')
    n_node = np.asarray(graphs.n_node, np.int64)
    n_edge = np.asarray(graphs.n_edge, np.int64)
    first_node, first_edge = _exclusive_sum(n_node), _exclusive_sum(n_edge)
    offsets = np.repeat(first_node, n_edge)
    self._senders = graphs.senders[order] - offsets
    self._receivers = graphs.receivers[order] - offsets
    self._nodes = graphs.nodes
    self._edges = None if graphs.edges is None else graphs.edges[order]
    indices = np.arange(len(labels)) if indices is None else indices
    self._n_node, self._n_edge = n_node[indices], n_edge[indices]
    self._first_node, self._first_edge = first_node[indices], first_edge[indices]
    self._labels = np.asarray(labels, np.int32)[indices]
    self._tuple = graphs._replace
    self._node_growth = node_growth
    self._edge_growth = edge_growth
    # A little more than the average, so that most batches fit the lowest level.
    # Of all graphs, so that the parts of one set share their shapes.
    edges_per_node = n_edge.sum() / max(n_node.sum(), 1)
    self._edges_per_node = max(1.04 * edges_per_node, 1.0)

  @property
  def num_examples(self) -> int:
    """Number of graphs."""
    return len(self._labels)

  def batches(
    self,
    batch_size: int,
    *,
    shards: tuple[int, ...] = (),
    seed: int | Sequence[int] | None = None,
  ) -> Batches:
    """Returns the split's batches.

    Args:
      batch_size: graphs in a global batch.
      shards: leading axes of every leaf, `(replicas,)` or `(replicas, groups)`.
      seed: seed of each epoch's permutation; None keeps the order. Several seeds make
        batches side by side, along a leading axis, all padded to the same budgets.

    Returns:
      Batches whose `inputs` are `jraph.GraphsTuple`s; a shard has `slots + 1`
      graphs, the last of them padding, and labels and weights of that length.
    """
    return Batches(self.num_examples, batch_size, shards, seed, self._collate)

  def budget(self, num_nodes: int, num_edges: int) -> tuple[int, int]:
    """Returns the node and edge budget of the lowest level that fits.

    Args:
      num_nodes: nodes to hold; the budget has at least one more, for padding.
      num_edges: edges to hold.
    """
    node_budget = _ladder_level(num_nodes + 1, self._node_growth)
    edge_budget = math.ceil(node_budget * self._edges_per_node)
    while edge_budget < num_edges:
      edge_budget = math.ceil(edge_budget * self._edge_growth)
    return node_budget, edge_budget

  def _collate(self, indices: np.ndarray) -> Batch:
    *shards, slots = indices.shape
    rows = [row[row != _EMPTY] for row in indices.reshape(-1, slots)]
    node_budget, edge_budget = self.budget(
      max(self._n_node[row].sum() for row in rows),
      max(self._n_edge[row].sum() for row in rows),
    )
    packed = [self._pack(row, node_budget, edge_budget, slots + 1) for row in rows]
    arrays = {
      name: np.stack([shard[name] for shard in packed]).reshape(
        *shards, *packed[0][name].shape
      )
      for name in packed[0]
    }
    labels, weights = arrays.pop('labels'), arrays.pop('weights')
    inputs = self._tuple(**{'edges': None, 'globals': None, **arrays})
    return {'inputs': inputs, 'labels': labels, 'weights': weights}

  def _pack(
    self, row: np.ndarray, node_budget: int, edge_budget: int, num_graphs: int
  ) -> dict[str, np.ndarray]:
    """Packs the graphs of one shard into arrays of the budgets' lengths."""
    n_node, n_edge = self._n_node[row], self._n_edge[row]
    num_nodes, num_edges = n_node.sum(), n_edge.sum()
    nodes = _ranges(self._first_node[row], n_node)
    edges = _ranges(self._first_edge[row], n_edge)
    offsets = np.repeat(_exclusive_sum(n_node), n_edge)
    padding = np.zeros(num_graphs - len(row), np.int64)
    padding_nodes, padding_edges = padding.copy(), padding.copy()
    padding_nodes[0] = node_budget - num_nodes
    padding_edges[0] = edge_budget - num_edges
    arrays = {
      'nodes': _fill(self._nodes[nodes], node_budget),
      'senders': _fill(self._senders[edges] + offsets, edge_budget, num_nodes),
      'receivers': _fill(self._receivers[edges] + offsets, edge_budget, num_nodes),
      'n_node': np.concatenate([n_node, padding_nodes]),
      'n_edge': np.concatenate([n_edge, padding_edges]),
      'labels': _fill(self._labels[row], num_graphs),
      'weights': _fill(np.ones(len(row), np.float32), num_graphs),
    }
    for name in ('senders', 'receivers', 'n_node', 'n_edge'):
      arrays[name] = arrays[name].astype(np.int32)
    if self._edges is not None:
      arrays['edges'] = _fill(self._edges[edges], edge_budget)
    return arrays


def _ladder_level(size: int, growth: float) -> int:
  """Returns the lowest level of a geometric ladder that is at least `size`."""
  exponent = math.ceil(math.log(max(size, 8)) / math.log(growth))
  # Rounding of the logarithm may put the level one step off, either way.
  levels = (math.ceil(growth ** (exponent + step)) for step in (-1, 0, 1))
  return next(level for level in levels if level >= size)


def _exclusive_sum(counts: np.ndarray) -> np.ndarray:
  return np.cumsum(counts) - counts


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Concatenates `range(start, start + length)` of all pairs."""
  return np.repeat(starts - _exclusive_sum(lengths), lengths) + np.arange(lengths.sum())


def _fill(array: np.ndarray, length: int, value: int = 0) -> np.ndarray:
  """Appends rows of `value` up to `length`."""
  filled = np.full((length, *array.shape[1:]), value, array.dtype)
  filled[: len(array)] = array
  return filled
