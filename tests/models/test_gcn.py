"""The graph network against its formula, and padding against none."""

import jax
import jraph
import numpy as np
import pytest

from input_pipelines import GraphSplit
from models import GCN

MODEL = GCN(num_classes=3, features=(5, 6, 6, 7), hidden_features=4)
NUM_FEATURES = 3


pytestmark = pytest.mark.usefixtures('x64')


def _random_graphs(seed: int, sizes: list[tuple[int, int]]) -> jraph.GraphsTuple:
  """Directed graphs with self-loops and repeated edges, `(n_node, n_edge)` each."""
  rng = np.random.default_rng(seed)
  n_node, n_edge = np.array(sizes).T
  first = np.repeat(np.cumsum(n_node) - n_node, n_edge)
  ends = rng.integers(0, np.repeat(n_node, n_edge), size=(2, n_edge.sum())) + first
  return jraph.GraphsTuple(
    nodes=rng.normal(size=(n_node.sum(), NUM_FEATURES)),
    edges=None,
    senders=ends[0],
    receivers=ends[1],
    n_node=n_node,
    n_edge=n_edge,
    globals=None,
  )


SIZES = [(4, 9), (1, 0), (7, 3), (12, 30)]
GRAPHS = _random_graphs(0, SIZES)
LABELS = np.array([0, 2, 1, 1])


def _one(index: int) -> jraph.GraphsTuple:
  """The graph at `index` alone, without padding, its edges sorted by receiver."""
  last_node, last_edge = np.cumsum(GRAPHS.n_node), np.cumsum(GRAPHS.n_edge)
  first_node = last_node[index] - GRAPHS.n_node[index]
  edges = slice(last_edge[index] - GRAPHS.n_edge[index], last_edge[index])
  order = np.argsort(GRAPHS.receivers[edges], kind='stable')
  return GRAPHS._replace(
    nodes=GRAPHS.nodes[first_node : last_node[index]],
    senders=GRAPHS.senders[edges][order] - first_node,
    receivers=GRAPHS.receivers[edges][order] - first_node,
    n_node=GRAPHS.n_node[index : index + 1],
    n_edge=GRAPHS.n_edge[index : index + 1],
  )


@pytest.fixture(scope='module')
def variables():
  with jax.enable_x64(True):
    initial = jax.jit(MODEL.init)(jax.random.key(1), _one(0))
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), initial)


def _formula(params, graph: jraph.GraphsTuple) -> np.ndarray:
  """The network layer by layer on one graph: pooling after the convolutions."""
  x = graph.nodes
  adjacency = np.zeros((len(x), len(x)))
  np.add.at(adjacency, (graph.receivers, graph.senders), 1)
  for layer in range(4):
    conv = params[f'GraphConv_{layer}']
    x = x @ conv['own'] + adjacency @ x @ conv['neighbours'] + conv['bias']
    x = np.maximum(x, 0) if layer < 3 else x
  x = x.mean(axis=0)
  for layer in range(2):
    dense = params[f'Dense_{layer}']
    x = x @ dense['kernel'] + dense['bias']
  return x


@jax.jit
def _loss_and_gradient(variables, batch):
  """Weighted sum of the examples' cross entropies, with logits and gradient."""

  def loss(variables):
    logits = MODEL.apply(variables, batch['inputs'])
    target = jax.nn.one_hot(batch['labels'], 3)
    losses = -(target * jax.nn.log_softmax(logits)).sum(axis=1)
    return (batch['weights'] * losses).sum(), logits

  return jax.value_and_grad(loss, has_aux=True)(variables)


@pytest.fixture(scope='module')
def alone(variables):
  """Loss, logits and gradient of each graph without padding."""
  with jax.enable_x64(True):
    return [
      _loss_and_gradient(
        variables,
        {'inputs': _one(i), 'labels': LABELS[[i]], 'weights': np.ones(1)},
      )
      for i in range(len(SIZES))
    ]


@pytest.fixture(scope='module')
def padded():
  """All graphs in one padded batch."""
  batch = next(GraphSplit(GRAPHS, LABELS).batches(len(SIZES)).epoch(0))
  assert len(batch['inputs'].nodes) > GRAPHS.n_node.sum()
  assert len(batch['inputs'].senders) > GRAPHS.n_edge.sum()
  return batch


def test_each_graph_is_the_formula_in_numpy(variables, alone):
  params = jax.tree.map(np.asarray, variables['params'])
  for index, ((_, logits), _) in enumerate(alone):
    np.testing.assert_allclose(logits[0], _formula(params, _one(index)), rtol=1e-12)


def test_padding_changes_neither_values_nor_gradients(variables, alone, padded):
  (loss, logits), gradient = _loss_and_gradient(variables, padded)
  np.testing.assert_allclose(loss, sum(value for (value, _), _ in alone), rtol=1e-12)
  np.testing.assert_allclose(
    logits[: len(SIZES)],
    np.concatenate([logits for (_, logits), _ in alone]),
    rtol=1e-12,
  )
  jax.tree.map(
    lambda whole, *parts: np.testing.assert_allclose(
      whole, sum(parts), rtol=1e-11, atol=1e-13
    ),
    gradient,
    *(part for _, part in alone),
  )


def test_padding_may_hold_anything(variables, padded):
  nodes = padded['inputs'].nodes.copy()
  nodes[GRAPHS.n_node.sum() :] = 1e6
  spoiled = {**padded, 'inputs': padded['inputs']._replace(nodes=nodes)}
  (loss, _), gradient = _loss_and_gradient(variables, spoiled)
  (expected_loss, _), expected_gradient = _loss_and_gradient(variables, padded)
  np.testing.assert_array_equal(loss, expected_loss)
  jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)


def test_hessian_vector_product_is_the_derivative_of_the_gradient(variables, padded):
  def gradient(variables):
    return _loss_and_gradient(variables, padded)[1]

  @jax.jit
  def product_and_difference(vector):
    step = 1e-6
    ahead = jax.tree.map(lambda v, u: v + step * u, variables, vector)
    behind = jax.tree.map(lambda v, u: v - step * u, variables, vector)
    product = jax.jvp(gradient, (variables,), (vector,))[1]
    return product, jax.tree.map(
      lambda a, b: (a - b) / (2 * step), gradient(ahead), gradient(behind)
    )

  vector = jax.tree.map(
    lambda leaf: np.sin(np.arange(leaf.size)).reshape(leaf.shape), variables
  )
  product, difference = product_and_difference(vector)
  jax.tree.map(
    lambda p, d: np.testing.assert_allclose(p, d, rtol=1e-5, atol=1e-6),
    product,
    difference,
  )


def test_dropout_needs_a_key_and_follows_it(variables):
  graph = _one(3)

  @jax.jit
  def apply(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return MODEL.apply(variables, graph, train=True, rngs=rngs)

  np.testing.assert_array_equal(apply(0), apply(0))
  assert any((apply(0) != apply(seed)).any() for seed in range(1, 6))


def test_the_papers_network_has_92546_parameters_that_start_as_pytorchs():
  graphs = _one(0)._replace(nodes=np.zeros((4, 14), np.float32))
  params = jax.jit(GCN().init)(jax.random.key(0), graphs)['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 92_546
  for layer in params.values():
    fan_in = layer.get('kernel', layer.get('own')).shape[0]
    for leaf in jax.tree.leaves(layer):
      assert leaf.dtype == np.float32
      assert np.abs(leaf).max() <= fan_in**-0.5
      if leaf.size > 500:
        np.testing.assert_allclose(
          np.std(leaf), (3 * fan_in) ** -0.5, rtol=10 / leaf.size**0.5
        )
