"""Graph network of the paper, on padded `jraph.GraphsTuple`s.

Its layer is that of Morris et al., "Weisfeiler and Leman Go Neural: Higher-order
Graph Neural Networks", 2019, arXiv:1810.02244.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.initializers import uniform

if typing.TYPE_CHECKING:
  import jraph  # The networks run without it, on any tuple with its fields.


def _dense(x: jax.Array, features: int) -> jax.Array:
  init = uniform(x.shape[-1])
  return nn.Dense(features, kernel_init=init, bias_init=init)(x)


def incoming(receivers: jax.Array, x: jax.Array, num_nodes: int) -> jax.Array:
  """Sums over each node's incoming edges the rows of `x`, one an edge."""
  return jax.ops.segment_sum(x, receivers, num_nodes, indices_are_sorted=True)


def graph_mean(graphs: jraph.GraphsTuple, x: jax.Array) -> jax.Array:
  """Means over the nodes of each graph, 0 for a graph without nodes."""
  num_graphs = len(graphs.n_node)
  graph = jnp.repeat(jnp.arange(num_graphs), graphs.n_node, total_repeat_length=len(x))
  sums = jax.ops.segment_sum(x, graph, num_graphs, indices_are_sorted=True)
  return sums / jnp.maximum(graphs.n_node, 1)[:, None].astype(x.dtype)


class GraphConv(nn.Module):
  """Graph convolution, x'_i = W_1 x_i + W_2 sum_{j -> i} x_j + b.

  Attributes:
    features: output width.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, neighbours: jax.Array) -> jax.Array:
    """Returns `(n, features)`.

    Args:
      x: `(n, F)`, own features of each node (or their mean over each graph).
      neighbours: `(n, F)`, sums over each node's neighbours (or their mean).
    """
    fan_in = x.shape[-1]
    shape = (fan_in, self.features)
    own = self.param('own', uniform(fan_in), shape)
    other = self.param('neighbours', uniform(fan_in), shape)
    bias = self.param('bias', uniform(fan_in), (self.features,))
    # One product of twice the depth is faster than two and their sum.
    inputs = jnp.concatenate([x, neighbours], axis=1)
    return inputs @ jnp.concatenate([own, other]) + bias[None]


class GCN(nn.Module):
  """Graph convolutions, mean pooling, and two dense layers.

  ReLU follows every convolution but the last. The last one and the mean over a
  graph's nodes are both linear, so they are exchanged: the means of the nodes'
  features and of their neighbours' sums are taken first and the products are left
  for one row a graph. The result is the same, without two of the largest products.

  With the paper's widths, 14 features and 2 classes there are 92,546 parameters.
  The paper's 125,442 count a fifth convolution, which is declared there but never
  called. Weights start as PyTorch's do, uniform in +-1/sqrt(fan_in), biases too.

  Attributes:
    num_classes: number of classes C.
    features: width of each convolution.
    hidden_features: width of the first dense layer.
    dropout_rate: dropout before each dense layer.

  >>> import jraph
  >>> import numpy as np
  >>> graphs = jraph.GraphsTuple(  # Two joined nodes, and a third for padding.
  ...     nodes=np.ones((3, 14), np.float32), edges=None, globals=None,
  ...     senders=np.array([1, 0]), receivers=np.array([0, 1]),
  ...     n_node=np.array([2, 1]), n_edge=np.array([2, 0]))
  >>> variables = GCN().init(jax.random.key(0), graphs)
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  92546
  >>> GCN().apply(variables, graphs).shape
  (2, 2)
  """

  num_classes: int = 2
  features: Sequence[int] = (64, 128, 128, 128)
  hidden_features: int = 64
  dropout_rate: float = 0.8

  @nn.compact
  def __call__(self, graphs: jraph.GraphsTuple, *, train: bool = False) -> jax.Array:
    """Returns logits of every graph, padding included.

    Args:
      graphs: `nodes` `(N, F)`, edges sorted by receiver, `n_node` `(B,)`.
      train: whether dropout is on; then the rng `dropout` is needed.

    Returns:
      Logits of shape `(B, C)`.
    """
    x = graphs.nodes
    for width in self.features[:-1]:
      neighbours = incoming(graphs.receivers, x[graphs.senders], len(x))
      x = nn.relu(GraphConv(width)(x, neighbours))
    # A node is summed once for each edge that leaves it.
    out_degree = jax.ops.segment_sum(
      jnp.ones_like(graphs.senders, x.dtype), graphs.senders, len(x)
    )
    neighbours = graph_mean(graphs, out_degree[:, None] * x)
    x = GraphConv(self.features[-1])(graph_mean(graphs, x), neighbours)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    x = _dense(x, self.hidden_features)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    return _dense(x, self.num_classes)
