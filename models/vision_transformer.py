"""A transformer that sees an image as a sequence of patches.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition
at Scale", 2020, arXiv:2010.11929.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

POOLS = ('token', 'mean')
_EPSILON = 1e-6


class VisionTransformer(nn.Module):
  """ViT: embedded patches and positions, pre-normalized layers, a linear head.

  Letters of shapes: B images, T tokens, D width, H heads, K features of a head, F
  features of a layer's dense part. At 224 x 224 pixels and 1000 classes ViT-S/16, whose
  sizes are the default, has 22,050,664 parameters; ViT-B/16, with width 768 and 12
  heads, 86,567,656.

  Dense kernels start Glorot uniform, positions and the class token normal with
  deviation .02 and zero; the head starts at zero, so that all classes are as likely.
  Parameters may be handed in as bfloat16: products are computed in their dtype, the
  statistics of normalization, softmax and logits in float32.

  Attributes:
    num_classes: number of classes C.
    patch: height and width of a patch in pixels, a divisor of the image's.
    width: D, a multiple of the heads.
    depth: number of layers.
    num_heads: H.
    mlp_width: F; 0 for four times the width.
    representation: features of a dense layer with tanh before the head; 0 for none.
    pool: what the head reads: 'token', the first of the tokens, which stands for no
      patch, or 'mean', the mean over the patches, without such a token.
    dropout_rate: dropout of embeddings, and of both parts of a layer.
    pixel_mean: mean of each input channel, which is subtracted from the inputs.
    pixel_std: what the inputs are divided by then.

  >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
  >>> model = VisionTransformer(num_classes=10, patch=8, width=16, depth=1, num_heads=2)
  >>> variables = jax.jit(model.init)(jax.random.key(0), images)
  >>> jax.jit(model.apply)(variables, images).shape
  (2, 10)
  """

  num_classes: int = 1000
  patch: int = 16
  width: int = 384
  depth: int = 12
  num_heads: int = 6
  mlp_width: int = 0
  representation: int = 0
  pool: str = 'token'
  dropout_rate: float = 0.0
  pixel_mean: Sequence[float] = (0.0, 0.0, 0.0)
  pixel_std: Sequence[float] = (1.0, 1.0, 1.0)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits.

    Args:
      images: `(B, H, W, channels)` of any number type, as the means count them.
      train: whether dropout is on; then the rng `dropout` is needed.

    Returns:
      float32 (or wider) logits of shape `(B, C)`.

    Raises:
      ValueError: patch, width or pool.
    """
    self._check(images.shape)
    x_BTD = _Patches(self.patch, self.width)(self._standardized(images))
    if self.pool == 'token':
      token = self.param('token', nn.initializers.zeros, (1, 1, self.width))
      token = jnp.broadcast_to(token, (len(x_BTD), 1, self.width))
      x_BTD = jnp.concatenate([token.astype(x_BTD.dtype), x_BTD], axis=1)
    init = nn.initializers.normal(0.02)
    position_TD = self.param('positions', init, x_BTD.shape[1:])
    x_BTD = _dropout(x_BTD + position_TD[None], self.dropout_rate, train)
    for _ in range(self.depth):
      layer = _Layer(self.num_heads, self._mlp_width, self.dropout_rate)
      x_BTD = layer(x_BTD, train=train)
    x_BTD = _layer_norm(x_BTD)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    x = x_BTD[:, 0] if self.pool == 'token' else jnp.mean(x_BTD, axis=1, dtype=wide)
    if self.representation:
      x = nn.tanh(_dense(self.representation, x))
    # Logits of low-precision parameters keep all the digits of their sums.
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(x.astype(wide))

  @property
  def _mlp_width(self) -> int:
    return self.mlp_width or 4 * self.width

  def _check(self, shape: tuple[int, ...]) -> None:
    if self.patch < 1 or shape[1] % self.patch or shape[2] % self.patch:
      raise ValueError(
        f'patch={self.patch}: must divide the {shape[1]} x {shape[2]} pixels.'
      )
    if self.num_heads < 1 or self.width < 1 or self.width % self.num_heads:
      raise ValueError(
        f'width={self.width}: must be a multiple of num_heads={self.num_heads}.'
      )
    if self.pool not in POOLS:
      raise ValueError(f'pool={self.pool!r}: choose one of {", ".join(POOLS)}.')

  def _standardized(self, images: jax.Array) -> jax.Array:
    mean = jnp.asarray(self.pixel_mean, jnp.float32)[None, None, None]
    std = jnp.asarray(self.pixel_std, jnp.float32)[None, None, None]
    return (images.astype(jnp.promote_types(images.dtype, jnp.float32)) - mean) / std


class _Patches(nn.Module):
  """Each patch through one linear map: a convolution whose windows do not overlap."""

  size: int
  width: int

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    batch, height, width, channels = images.shape
    rows, columns = height // self.size, width // self.size
    x = images.reshape(batch, rows, self.size, columns, self.size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    init = nn.initializers.lecun_normal()
    kernel = self.param('kernel', init, (x.shape[-1], self.width))
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    return x.astype(kernel.dtype) @ kernel + bias[None, None]


class _Layer(nn.Module):
  """Self-attention, then two dense layers, each of normalized inputs and added."""

  num_heads: int
  mlp_width: int
  dropout_rate: float

  @nn.compact
  def __call__(self, x_BTD: jax.Array, *, train: bool) -> jax.Array:
    y_BTD = _SelfAttention(self.num_heads)(_layer_norm(x_BTD))
    x_BTD = x_BTD + _dropout(y_BTD, self.dropout_rate, train)
    h_BTF = nn.gelu(_dense(self.mlp_width, _layer_norm(x_BTD)))
    h_BTF = _dropout(h_BTF, self.dropout_rate, train)
    y_BTD = _dense(x_BTD.shape[-1], h_BTF)
    return x_BTD + _dropout(y_BTD, self.dropout_rate, train)


class _SelfAttention(nn.Module):
  """Scaled dot-product attention of several heads, every token to every token."""

  num_heads: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    shape = (*x_BTD.shape[:2], self.num_heads, -1)
    q, k, v = (_dense(x_BTD.shape[-1], x_BTD).reshape(shape) for _ in range(3))
    scores_BHTS = jnp.einsum('bthk,bshk->bhts', q * q.shape[-1] ** -0.5, k)
    wide = jnp.promote_types(scores_BHTS.dtype, jnp.float32)
    shares_BHTS = jax.nn.softmax(scores_BHTS.astype(wide)).astype(v.dtype)
    y_BTHK = jnp.einsum('bhts,bshk->bthk', shares_BHTS, v)
    return _dense(x_BTD.shape[-1], y_BTHK.reshape(x_BTD.shape))


def _dense(features: int, x: jax.Array) -> jax.Array:
  return nn.Dense(features, kernel_init=nn.initializers.xavier_uniform())(x)


def _dropout(x: jax.Array, rate: float, train: bool) -> jax.Array:
  return nn.Dropout(rate, deterministic=not train)(x)


def _layer_norm(x: jax.Array) -> jax.Array:
  # The fast variance is a difference, which so small an epsilon does not forgive.
  return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False)(x)
