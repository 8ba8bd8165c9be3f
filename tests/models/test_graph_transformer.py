"""The graph transformer against its formula node by node, and padding against none."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from models import GraphTransformer

MODEL = GraphTransformer(num_classes=3, features=8, num_heads=2, num_layers=2)
pytestmark = pytest.mark.usefixtures('x64')


def random_graph(seed, n_node, n_edge):
  """A directed graph with self-loops and repeated edges, sorted by receiver."""
  rng = np.random.default_rng(seed)
  receivers = np.sort(rng.integers(0, n_node, n_edge))
  return jraph.GraphsTuple(
    nodes=rng.normal(size=(n_node, 3)),
    edges=rng.normal(size=(n_edge, 2)),
    senders=rng.integers(0, n_node, n_edge),
    receivers=receivers,
    n_node=np.array([n_node]),
    n_edge=np.array([n_edge]),
    globals=None,
  )


GRAPHS = [random_graph(i, n, e) for i, (n, e) in enumerate([(4, 9), (1, 0), (7, 20)])]


@pytest.fixture(scope='module')
def params():
  with jax.enable_x64(True):
    initial = jax.jit(MODEL.init)(jax.random.key(0), GRAPHS[0])['params']
    widened = jax.tree.map(lambda leaf: leaf.astype(np.float64), initial)
    # Normalization parameters away from 1 and 0, so that they count.
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(leaf), widened)


def normalize(x, p):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * p['scale'] + p['bias']


def dense(x, p):
  return x @ p['kernel'] + p.get('bias', 0)


def formula(params, graph):
  """Softmax over self and incoming edges, one node at a time."""
  x = dense(graph.nodes, params['Dense_0'])
  for layer in range(2):
    p = params[f'NeighbourAttention_{layer}']
    q, k, v = (
      np.einsum('nd,dhk->nhk', x, p[name]['kernel']) + p[name]['bias']
      for name in ('query', 'key', 'value')
    )
    bias = dense(graph.edges, p['edge'])
    attended = np.zeros_like(x)
    for node in range(len(x)):
      edges = np.flatnonzero(graph.receivers == node)
      others = np.append(graph.senders[edges], node)
      shift = np.append(bias[edges], np.zeros((1, 2)), axis=0)
      scores = np.einsum('hk,ehk->eh', q[node], k[others]) / 2 + shift
      weights = np.exp(scores) / np.exp(scores).sum(0)
      mixed = np.einsum('eh,ehk->hk', weights, v[others])
      attended[node] = np.einsum('hk,hkd->d', mixed, p['out']['kernel'])
      attended[node] += p['out']['bias']
    x = normalize(x + attended, params[f'LayerNorm_{2 * layer}'])
    wide = np.maximum(dense(x, params[f'Dense_{1 + 2 * layer}']), 0)
    x = x + dense(wide, params[f'Dense_{2 + 2 * layer}'])
    x = normalize(x, params[f'LayerNorm_{2 * layer + 1}'])
  return dense(x.mean(0), params['Dense_5'])


def padded():
  batch = jraph.batch_np(GRAPHS)
  return jraph.pad_with_graphs(batch, n_node=17, n_edge=36, n_graph=5)


def test_equals_its_formula(params):
  logits = MODEL.apply({'params': params}, padded())
  arrays = jax.tree.map(np.asarray, params)
  for i, graph in enumerate(GRAPHS):
    np.testing.assert_allclose(logits[i], formula(arrays, graph), rtol=1e-9, atol=1e-9)


def test_padding_changes_neither_values_nor_gradients(params):
  value = lambda p, graphs, i: MODEL.apply({'params': p}, graphs)[i].sum()
  gradient = jax.jit(jax.grad(value))
  for i, graph in enumerate(GRAPHS):
    alone = gradient(params, graph, 0)
    among = gradient(params, padded(), i)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(among), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_hessian_vector_products_are_finite_and_symmetric(params):
  value = lambda p: (MODEL.apply({'params': p}, padded())[:3] ** 2).sum()
  u, v = (
    jax.tree.map(
      lambda x, s=s: jnp.sin(s * jnp.arange(x.size).reshape(x.shape)), params
    )
    for s in (1.0, 2.0)
  )
  product = jax.jit(lambda w: jax.jvp(jax.grad(value), (params,), (w,))[1])
  dot = lambda a, b: sum(
    jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
  np.testing.assert_allclose(dot(u, product(v)), dot(v, product(u)), rtol=1e-9)


@pytest.mark.slow
def test_count_and_graphs_without_edge_features():
  graph = GRAPHS[2]._replace(
    nodes=np.ones((7, 14), np.float32), edges=np.ones((20, 3), np.float32)
  )
  params = GraphTransformer().init(jax.random.key(0), graph)
  assert sum(x.size for x in jax.tree.leaves(params)) == 68_058
  plain = graph._replace(edges=None)
  params = GraphTransformer().init(jax.random.key(0), plain)
  assert GraphTransformer().apply(params, plain).shape == (1, 2)
