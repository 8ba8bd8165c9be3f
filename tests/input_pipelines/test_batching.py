"""Batches: every example once, whatever the sizes, and exact positions."""

import jax
import jraph
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_pipelines import ArraySplit, GraphSplit, split_indices

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 50))
SHARDS = st.sampled_from([(), (1,), (3,), (2, 2), (8,)])


def _array_split(num_examples: int) -> ArraySplit:
  numbers = np.arange(num_examples)
  return ArraySplit(numbers[:, None].astype(np.float32) + 1, numbers)


def _graph_split(num_examples: int, **kwargs) -> GraphSplit:
  """Graphs whose nodes, edges and label say which graph they are."""
  rng = np.random.default_rng(num_examples)
  n_node = rng.integers(1, 9, num_examples)
  n_edge = rng.integers(0, 12, num_examples)
  first = np.repeat(np.cumsum(n_node) - n_node, n_edge)
  ends = first + rng.integers(0, np.repeat(n_node, n_edge), (2, n_edge.sum()))
  numbers = np.arange(num_examples)
  graphs = jraph.GraphsTuple(
    nodes=np.repeat(numbers, n_node)[:, None] + 1.0,
    edges=np.stack([np.repeat(numbers, n_edge) + 1.0, *(ends - first)], axis=1),
    senders=ends[0],
    receivers=ends[1],
    n_node=n_node,
    n_edge=n_edge,
    globals=None,
  )
  return GraphSplit(graphs, numbers, **kwargs)


def _seen(batches, epoch: int, start: int = 0) -> list[int]:
  """Labels of an epoch's examples, shard after shard."""
  return [
    label
    for batch in batches.epoch(epoch, start)
    for label in batch['labels'][batch['weights'] > 0].tolist()
  ]


@given(sizes=SIZES, shards=SHARDS, epoch=st.integers(0, 3))
def test_an_epoch_of_arrays_is_a_permutation(sizes, shards, epoch):
  num_examples, batch_size = sizes
  split = _array_split(num_examples)
  batches = split.batches(batch_size, shards=shards, seed=7)
  expected = np.random.default_rng([7, epoch]).permutation(num_examples)
  assert _seen(batches, epoch) == expected.tolist()
  everything = list(batches.epoch(epoch))
  assert len(everything) == batches.steps_per_epoch == -(-num_examples // batch_size)
  assert sum(batch['weights'].sum() for batch in everything) == num_examples
  for batch in everything:
    assert batch['weights'].shape[:-1] == shards
    np.testing.assert_array_equal(
      batch['inputs'][..., 0], (batch['labels'] + 1) * batch['weights']
    )


@given(sizes=SIZES, shards=SHARDS)
def test_an_epoch_of_graphs_is_a_permutation(sizes, shards):
  num_examples, batch_size = sizes
  batches = _graph_split(num_examples).batches(batch_size, shards=shards, seed=7)
  expected = np.random.default_rng([7, 2]).permutation(num_examples)
  assert _seen(batches, 2) == expected.tolist()
  total = sum(batch['weights'].sum() for batch in batches.epoch(2))
  assert total == num_examples


@given(sizes=SIZES, shards=SHARDS)
def test_graphs_stay_whole_and_edges_sorted(sizes, shards):
  num_examples, batch_size = sizes
  split = _graph_split(num_examples)
  for batch in split.batches(batch_size, shards=shards, seed=0).epoch(0):
    assert all(leaf.shape[: len(shards)] == shards for leaf in jax.tree.leaves(batch))
    flat = jax.tree.map(
      lambda leaf, s=shards: leaf.reshape(-1, *leaf.shape[len(s) :]), batch
    )
    for index in range(len(flat['labels'])):
      _check_shard(jax.tree.map(lambda leaf, i=index: leaf[i], flat))


def _check_shard(batch):
  graphs, labels, real = batch['inputs'], batch['labels'], batch['weights'] > 0
  assert graphs.n_node.sum() == len(graphs.nodes)
  assert graphs.n_edge.sum() == len(graphs.senders)
  assert not real[-1]
  assert (np.diff(graphs.receivers) >= 0).all()
  graph_of_node = np.repeat(np.arange(len(labels)), graphs.n_node)
  graph_of_edge = np.repeat(np.arange(len(labels)), graphs.n_edge)
  np.testing.assert_array_equal(graph_of_node[graphs.senders], graph_of_edge)
  np.testing.assert_array_equal(graph_of_node[graphs.receivers], graph_of_edge)
  name = np.where(real, labels + 1, 0)
  np.testing.assert_array_equal(graphs.nodes[:, 0], name[graph_of_node])
  np.testing.assert_array_equal(graphs.edges[:, 0], name[graph_of_edge])
  # Edge features carry the ends inside the graph, so they moved with their edge.
  first_node = (np.cumsum(graphs.n_node) - graphs.n_node)[graph_of_edge]
  inside = real[graph_of_edge]
  for column, ends in ((1, graphs.senders), (2, graphs.receivers)):
    np.testing.assert_array_equal(
      graphs.edges[inside, column], (ends - first_node)[inside]
    )


@given(sizes=SIZES, start=st.integers(0, 60))
def test_resuming_gives_the_tail(sizes, start):
  num_examples, batch_size = sizes
  for split in (_array_split(num_examples), _graph_split(num_examples)):
    batches = split.batches(batch_size, shards=(2,), seed=3)
    tail = list(batches.epoch(1))[start:]
    resumed = list(split.batches(batch_size, shards=(2,), seed=3).epoch(1, start))
    assert len(tail) == len(resumed)
    jax.tree.map(np.testing.assert_array_equal, tail, resumed)


def test_graphs_share_few_tight_budgets():
  rng = np.random.default_rng(0)
  n_node = rng.integers(4, 120, 3000)
  n_edge = 2 * n_node + rng.integers(-2, 4, 3000)
  # Budgets depend on the counts alone; a graph's edges may all be self-loops.
  ends = np.repeat(np.cumsum(n_node) - n_node, n_edge)
  graphs = jraph.GraphsTuple(
    nodes=np.zeros((n_node.sum(), 1), np.float32),
    edges=None,
    senders=ends,
    receivers=ends,
    n_node=n_node,
    n_edge=n_edge,
    globals=None,
  )
  split = GraphSplit(graphs, np.zeros(3000))
  shapes, waste = set(), []
  for epoch in range(3):
    for batch in split.batches(100, seed=0).epoch(epoch):
      inputs = batch['inputs']
      real_nodes = inputs.n_node[:-1].sum()
      shapes.add((len(inputs.nodes), len(inputs.senders)))
      waste.append(len(inputs.nodes) / real_nodes)
  assert max(waste) < 1.08
  assert len(shapes) <= 8


def test_a_batch_beyond_the_usual_budget_takes_a_higher_level():
  split = _graph_split(5)
  nodes, edges = split.budget(10, 0)
  assert 11 <= nodes <= 12
  many_nodes, many_edges = split.budget(10, 10 * edges)
  assert many_nodes == nodes
  assert many_edges >= 10 * edges
  assert split.budget(10_000, 0)[0] > 10_000


def test_parts_of_a_set_hold_their_own_graphs_and_share_budgets():
  train = _graph_split(20, indices=np.array([4, 9, 1]))
  assert train.num_examples == 3
  assert _seen(train.batches(2), 0) == [4, 9, 1]
  assert train.budget(30, 40) == _graph_split(20).budget(30, 40)


def test_without_a_seed_every_epoch_is_in_order():
  batches = _array_split(5).batches(2)
  assert _seen(batches, 0) == _seen(batches, 9) == [0, 1, 2, 3, 4]


def test_the_split_is_disjoint_whole_and_seeded():
  train, test = split_indices(4337, seed=0)
  assert (len(train), len(test)) == (3035, 1302)
  assert sorted([*train, *test]) == list(range(4337))
  assert (split_indices(4337, seed=0)[0] == train).all()
  assert (split_indices(4337, seed=1)[0] != train).any()


@pytest.mark.parametrize(
  ('arguments', 'name'),
  [
    ({'batch_size': 0}, 'batch_size=0'),
    ({'batch_size': 2, 'shards': (2, 0)}, r'shards=\(2, 0\)'),
  ],
)
def test_impossible_sizes_are_refused(arguments, name):
  with pytest.raises(ValueError, match=name):
    _array_split(4).batches(**arguments)


def test_a_label_is_needed_for_every_example():
  with pytest.raises(ValueError, match='4 inputs have 3 labels'):
    ArraySplit(np.zeros((4, 2)), np.zeros(3))
  with pytest.raises(ValueError, match='graphs have 3 labels'):
    GraphSplit(jraph.GraphsTuple(*[np.zeros(4)] * 7), np.zeros(3))


@pytest.mark.parametrize('make', [_array_split, _graph_split])
@pytest.mark.parametrize('shards', [(), (2,)])
def test_batches_of_several_seeds_lie_side_by_side(make, shards):
  """Each has the examples of its own seed in their order; graphs share a budget."""
  split, seeds = make(22), (5, 0, 5)
  together = split.batches(8, shards=shards, seed=seeds)
  each = [split.batches(8, shards=shards, seed=seed) for seed in seeds]
  assert together.steps_per_epoch == 3
  for epoch, start in ((0, 0), (2, 1)):
    stacked = list(together.epoch(epoch, start))
    assert len(stacked) == 3 - start
    for batch, *alone in zip(
      stacked, *(one.epoch(epoch, start) for one in each), strict=True
    ):
      for index, own in enumerate(alone):
        ours = jax.tree.map(lambda leaf, i=index: leaf[i], batch)
        for name in ('labels', 'weights'):
          np.testing.assert_array_equal(ours[name], own[name])
        if make is _array_split:
          np.testing.assert_array_equal(ours['inputs'], own['inputs'])
        else:  # The last graph is padding, and longer in a larger budget.
          nodes = lambda graphs: graphs.nodes[graphs.nodes > 0]
          np.testing.assert_array_equal(nodes(ours['inputs']), nodes(own['inputs']))
