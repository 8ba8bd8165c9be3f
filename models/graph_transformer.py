"""A small graph transformer, on padded `jraph.GraphsTuple`s.

Attention over each node's neighbours, as in Dwivedi and Bresson, "A Generalization of
Transformer Networks to Graphs", 2020, arXiv:2012.09699, with layer normalization.
"""

from __future__ import annotations

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.gcn import graph_mean, incoming

if typing.TYPE_CHECKING:
  import jraph  # The networks run without it, on any tuple with its fields.


class NeighbourAttention(nn.Module):
  """Multi-head attention of each node to itself and to the senders of its edges.

  Attributes:
    features: width D, a multiple of num_heads.
    num_heads: number of heads H.
  """

  features: int
  num_heads: int

  @nn.compact
  def __call__(self, graphs: jraph.GraphsTuple, x_ND: jax.Array) -> jax.Array:
    """Returns `(N, D)`; the kind of an edge shifts its score in each head."""
    head_size = self.features // self.num_heads
    heads = lambda name: nn.DenseGeneral((self.num_heads, head_size), name=name)(x_ND)
    q_NHK, k_NHK, v_NHK = heads('query'), heads('key'), heads('value')
    score = lambda q, k: jnp.sum(q * k, axis=-1) * head_size**-0.5
    senders, receivers = graphs.senders, graphs.receivers
    score_EH = score(q_NHK[receivers], k_NHK[senders])
    if graphs.edges is not None:
      score_EH += nn.Dense(self.num_heads, use_bias=False, name='edge')(graphs.edges)
    self_NH = score(q_NHK, k_NHK)
    # The largest score of a node cancels; it only keeps the exponentials small.
    top_NH = jax.ops.segment_max(
      score_EH, receivers, len(x_ND), indices_are_sorted=True
    )
    top_NH = jax.lax.stop_gradient(jnp.maximum(top_NH, self_NH))
    weight_EH = jnp.exp(score_EH - top_NH[receivers])
    self_NH = jnp.exp(self_NH - top_NH)
    total_NH = self_NH + incoming(receivers, weight_EH, len(x_ND))
    value_EHK = weight_EH[..., None] * v_NHK[senders]
    value_NHK = self_NH[..., None] * v_NHK + incoming(receivers, value_EHK, len(x_ND))
    mixed_NHK = value_NHK / total_NH[..., None]
    return nn.DenseGeneral(self.features, axis=(-2, -1), name='out')(mixed_NHK)


class GraphTransformer(nn.Module):
  """Layers of neighbour attention and a perceptron, mean pooling, a dense head.

  Each half of a layer adds to its input, then normalizes. With 14 node features, 3
  kinds of edges and 2 classes there are 68,058 parameters.

  Attributes:
    num_classes: number of classes C.
    features: width D.
    num_heads: heads of attention.
    num_layers: number of layers.
    dropout_rate: dropout of both halves of a layer, and before the head.

  >>> import jraph
  >>> import numpy as np
  >>> graphs = jraph.GraphsTuple(  # Two joined nodes, and a third for padding.
  ...     nodes=np.ones((3, 14), np.float32), edges=np.ones((2, 3), np.float32),
  ...     globals=None, senders=np.array([1, 0]), receivers=np.array([0, 1]),
  ...     n_node=np.array([2, 1]), n_edge=np.array([2, 0]))
  >>> variables = GraphTransformer().init(jax.random.key(0), graphs)
  >>> GraphTransformer().apply(variables, graphs).shape
  (2, 2)
  """

  num_classes: int = 2
  features: int = 64
  num_heads: int = 4
  num_layers: int = 2
  dropout_rate: float = 0.1

  @nn.compact
  def __call__(self, graphs: jraph.GraphsTuple, *, train: bool = False) -> jax.Array:
    """Returns logits `(B, C)` of every graph, padding included.

    Args:
      graphs: `nodes` `(N, F)`, `edges` `(E, K)` or None, edges sorted by receiver.
      train: whether dropout is on; then the rng `dropout` is needed.
    """
    drop = nn.Dropout(self.dropout_rate, deterministic=not train)
    x_ND = nn.Dense(self.features)(graphs.nodes)
    for _ in range(self.num_layers):
      attended = NeighbourAttention(self.features, self.num_heads)(graphs, x_ND)
      x_ND = nn.LayerNorm()(x_ND + drop(attended))
      wide = nn.relu(nn.Dense(2 * self.features)(x_ND))
      x_ND = nn.LayerNorm()(x_ND + drop(nn.Dense(self.features)(wide)))
    return nn.Dense(self.num_classes)(drop(graph_mean(graphs, x_ND)))
