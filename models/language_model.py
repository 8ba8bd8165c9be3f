"""A causal transformer that predicts the next token of a text.

The encoder's parts are those of Vaswani et al., "Attention Is All You Need", 2017,
arXiv:1706.03762, normalized before each part instead of after it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_EMBEDDING = nn.initializers.truncated_normal(0.02)


class LanguageModel(nn.Module):
  """Embeddings, pre-normalized layers of causal attention and of a dense part, a head.

  A position sees itself and those before it. Positions have learnt embeddings, and the
  head does not share the tokens'. Letters of shapes: B examples, T positions, D
  features, H heads, K features of a head, V tokens.

  Attributes:
    vocabulary: V.
    features: D.
    num_layers: layers.
    num_heads: H.
    head_features: K; H K need not be D.
    widening: hidden features of the dense part are this times D; GELU follows.

  >>> tokens = jnp.zeros((2, 5), int)
  >>> model = LanguageModel(features=8, num_layers=1, num_heads=2, head_features=4)
  >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
  >>> jax.jit(model.apply)(variables, tokens).shape
  (2, 5, 128)
  """

  vocabulary: int = 128
  features: int = 128
  num_layers: int = 6
  num_heads: int = 8
  head_features: int = 32
  widening: int = 4

  @nn.compact
  def __call__(
    self, tokens_BT: jax.Array, *, train: bool = False, head: bool = True
  ) -> jax.Array:
    """Returns logits.

    Args:
      tokens_BT: int tokens below V.
      train: has no effect, because no layer behaves differently in training.
      head: False returns what the head takes, without applying it.

    Returns:
      `(B, T, V)`, at each position those of the next token; `(B, T, D)` without head.
    """
    del train
    shape = (tokens_BT.shape[1], self.features)
    x_BTD = nn.Embed(self.vocabulary, self.features, embedding_init=_EMBEDDING)(
      tokens_BT
    )
    x_BTD = x_BTD + self.param('positions', _EMBEDDING, shape)[None]
    # Variances of 2 / layers keep the sum over the layers from growing with them.
    init = nn.initializers.variance_scaling(
      2 / self.num_layers, 'fan_in', 'truncated_normal'
    )
    for _ in range(self.num_layers):
      attention = _CausalAttention(self.num_heads, self.head_features, init)
      x_BTD = x_BTD + attention(_layer_norm(x_BTD))
      h_BTF = nn.Dense(self.widening * self.features, kernel_init=init)(
        _layer_norm(x_BTD)
      )
      x_BTD = x_BTD + nn.Dense(self.features, kernel_init=init)(nn.gelu(h_BTF))
    x_BTD = _layer_norm(x_BTD)
    return nn.Dense(self.vocabulary)(x_BTD) if head else x_BTD

  def token_losses(
    self, params: Any, tokens_BT: jax.Array, labels_BT: jax.Array, *, chunk: int
  ) -> jax.Array:
    """The cross-entropy of every position, with few logits in memory at a time.

    The head and the softmax of `chunk` positions are computed at once, and again when
    a gradient or a Hessian-vector product needs them (`jax.checkpoint`). With a large
    vocabulary the logits of a whole batch are most of the memory of a gradient.

    Args:
      params: of `init`.
      tokens_BT: int tokens below V.
      labels_BT: int, the next tokens.
      chunk: positions whose logits are held at once, at least 1.

    Returns:
      `(B, T)`, in nats; gradients and products of them are those of the whole logits
      but for rounding.

    >>> tokens = jnp.zeros((2, 5), int)
    >>> model = LanguageModel(features=8, num_layers=1, num_heads=2, head_features=4)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)['params']
    >>> model.token_losses(params, tokens, tokens, chunk=4).shape
    (2, 5)
    """
    if chunk < 1:
      raise ValueError(f'chunk={chunk}: must be at least 1')
    head = params[f'Dense_{2 * self.num_layers}']
    x_BTD = self.apply({'params': params}, tokens_BT, head=False)

    @jax.checkpoint
    def losses(x_D, label):
      # Vectorized by `lax.map`, a chunk at a time.
      logits_V = x_D @ head['kernel'] + head['bias']
      return jax.nn.logsumexp(logits_V) - logits_V[label]

    flat = x_BTD.reshape(-1, x_BTD.shape[-1]), labels_BT.ravel()
    found = jax.lax.map(lambda pair: losses(*pair), flat, batch_size=chunk)
    return found.reshape(labels_BT.shape)


class _CausalAttention(nn.Module):
  """Self-attention of several heads to this position and those before it."""

  num_heads: int
  head_features: int
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    length, width = x_BTD.shape[1], self.num_heads * self.head_features
    dense = lambda features, x: nn.Dense(features, kernel_init=self.kernel_init)(x)
    q, k, v = (
      dense(width, x_BTD).reshape(*x_BTD.shape[:2], self.num_heads, -1)
      for _ in range(3)
    )
    scores_BHTS = jnp.einsum('bthk,bshk->bhts', q * self.head_features**-0.5, k)
    seen_TS = np.tril(np.ones((length, length), bool))
    scores_BHTS = jnp.where(seen_TS[None, None], scores_BHTS, -jnp.inf)
    y_BTHK = jnp.einsum('bhts,bshk->bthk', jax.nn.softmax(scores_BHTS), v)
    return dense(x_BTD.shape[-1], y_BTHK.reshape(*x_BTD.shape[:2], width))


def _layer_norm(x: jax.Array) -> jax.Array:
  # The fast variance is a difference, which loses digits.
  return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)(x)
