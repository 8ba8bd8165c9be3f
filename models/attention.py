"""Attention network of the paper, for a sequence of scalars such as a heartbeat.

Its encoder is that of Vaswani et al., "Attention Is All You Need", 2017,
arXiv:1706.03762.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models.initializers import uniform

_EPSILON = 1e-12


class Attention(nn.Module):
  """Embedding, encoder layers with normalization after each sum, and a dense head.

  Every sample is embedded by one linear map, and its position along time is added as
  sinusoids. Letters of shapes: B examples, T samples, D features, H heads, F features
  of the feed-forward part, K features of a head.

  With the paper's sizes, 187 samples and 5 classes there are 19,528,109 parameters,
  19,149,312 of them in the first layer of the head. Weights and biases start uniform in
  +-1/sqrt(fan_in), as PyTorch's do.

  Attributes:
    num_classes: number of classes C.
    features: D, even and a multiple of the heads.
    num_heads: H.
    hidden_features: F.
    num_layers: number of encoder layers.
    head_features: widths of the head's dense layers.
    dropout_rate: dropout of embeddings, of both parts' results and inside the
      feed-forward part.

  >>> heartbeats = jnp.zeros((2, 50))
  >>> model = Attention(features=8, head_features=(16,))
  >>> variables = jax.jit(model.init)(jax.random.key(0), heartbeats)
  >>> jax.jit(model.apply)(variables, heartbeats).shape
  (2, 5)
  """

  num_classes: int = 5
  features: int = 200
  num_heads: int = 2
  hidden_features: int = 128
  num_layers: int = 1
  head_features: Sequence[int] = (512, 256, 128)
  dropout_rate: float = 0.1

  @nn.compact
  def __call__(self, x_BT: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits.

    Args:
      x_BT: sequences of T samples.
      train: whether dropout is on; then the rng `dropout` is needed.

    Returns:
      float32 (or wider) logits of shape `(B, C)`.

    Raises:
      ValueError: features.
    """
    if self.features % self.num_heads or self.features % 2:
      raise ValueError(
        f'features={self.features}: must be even and a multiple of '
        f'num_heads={self.num_heads}.'
      )
    x_BTD = _dense(self.features, x_BT[..., None])
    position_TD = _sinusoids(x_BT.shape[1], self.features).astype(x_BTD.dtype)
    x_BTD = _dropout(x_BTD + position_TD[None], self.dropout_rate, train)
    for _ in range(self.num_layers):
      layer = _EncoderLayer(self.num_heads, self.hidden_features, self.dropout_rate)
      x_BTD = layer(x_BTD, train=train)
    x_BTD = _layer_norm(x_BTD)
    x = x_BTD.reshape(len(x_BTD), -1)
    for width in self.head_features:
      x = nn.relu(_dense(width, x))
    # Logits of low-precision parameters keep all the digits of their sums.
    return _dense(self.num_classes, x.astype(jnp.promote_types(x.dtype, jnp.float32)))


class _EncoderLayer(nn.Module):
  """Self-attention, then a feed-forward part, each added to its inputs."""

  num_heads: int
  hidden_features: int
  dropout_rate: float

  @nn.compact
  def __call__(self, x_BTD: jax.Array, *, train: bool) -> jax.Array:
    y_BTD = _SelfAttention(self.num_heads)(x_BTD)
    y_BTD = _dropout(y_BTD, self.dropout_rate, train)
    x_BTD = _layer_norm(x_BTD + y_BTD)
    h_BTF = nn.relu(_dense(self.hidden_features, x_BTD))
    h_BTF = _dropout(h_BTF, self.dropout_rate, train)
    y_BTD = _dropout(_dense(x_BTD.shape[-1], h_BTF), self.dropout_rate, train)
    return _layer_norm(x_BTD + y_BTD)


class _SelfAttention(nn.Module):
  """Scaled dot-product attention of several heads, every sample to every sample."""

  num_heads: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    features = x_BTD.shape[-1]
    head_features = features // self.num_heads
    # Queries, keys and values of all heads in one product; in the layer they are three.
    parts = jnp.split(_dense(3 * features, x_BTD), 3 * self.num_heads, axis=-1)
    heads = []
    # Head by head: products of arrays with an axis of heads take the CPU twice as long.
    for head in range(self.num_heads):
      q_BTK, k_BTK, v_BTK = parts[head :: self.num_heads]
      scores_BTT = (q_BTK * head_features**-0.5) @ k_BTK.mT
      heads.append(jax.nn.softmax(scores_BTT) @ v_BTK)
    return _dense(features, jnp.concatenate(heads, axis=-1))


def _dense(features: int, x: jax.Array) -> jax.Array:
  init = uniform(x.shape[-1])
  return nn.Dense(features, kernel_init=init, bias_init=init)(x)


def _dropout(x: jax.Array, rate: float, train: bool) -> jax.Array:
  return nn.Dropout(rate, deterministic=not train)(x)


def _layer_norm(x: jax.Array) -> jax.Array:
  # The fast variance is a difference, which so small an epsilon does not forgive.
  return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False)(x)


def _sinusoids(length: int, features: int) -> np.ndarray:
  """Sines in the even and cosines in the odd features, of shape `(T, D)`."""
  rate = 10_000.0 ** (-np.arange(0, features, 2) / features)
  angle = np.arange(length)[:, None] * rate
  return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, features)
