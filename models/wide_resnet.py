"""Wide residual networks.

Zagoruyko and Komodakis, "Wide Residual Networks", 2016, arXiv:1605.07146, with the
order normalization, ReLU, convolution of the "B(3, 3)" block.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.convolution import Conv
from models.initializers import uniform

NORMS = ('batch', 'group', 'none')
_GROUP_WIDTHS = (16, 32, 64)
_NORM_GROUPS = 8


class WideResNet(nn.Module):
  """WRN-depth-width: a convolution, three groups of blocks, mean, dense layer.

  A group has (depth - 4) / 6 blocks of two 3x3 convolutions; the groups are 16, 32 and
  64 times `width` wide, and the second and third halve the image. With 10 classes
  WRN-22-8 has 17,158,106 parameters, WRN-28-10 36,479,194.

  Weights start as He et al.'s, those of the dense layer uniform in +-1/sqrt(fan_in).
  Without normalization the convolutions have biases, and the last of each block starts
  at zero, as in Fixup (Zhang et al. 2019, arXiv:1901.09321): a deep one would start
  with enormous logits otherwise.

  Parameters may be handed in as bfloat16: convolutions are computed in their dtype,
  statistics, means and logits in float32.

  Attributes:
    num_classes: number of classes C.
    depth: 6 n + 4.
    width: factor of the channels.
    norm: 'batch', 'group' (8 groups of channels) or 'none'.
    pixel_mean: mean of each input channel, which is subtracted from the inputs.
    pixel_std: what the inputs are divided by then.

  >>> images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
  >>> model = WideResNet(depth=10, width=1)
  >>> variables = jax.jit(model.init)(jax.random.key(0), images)
  >>> jax.jit(model.apply)(variables, images).shape
  (2, 10)
  """

  num_classes: int = 10
  depth: int = 22
  width: int = 8
  norm: str = 'batch'
  pixel_mean: Sequence[float] = (0.0, 0.0, 0.0)
  pixel_std: Sequence[float] = (1.0, 1.0, 1.0)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits.

    Args:
      images: `(B, H, W, channels)` of any number type, as the means count them.
      train: whether batch normalization uses the batch's own statistics, and updates
        the collection `batch_stats`.

    Returns:
      float32 (or wider) logits of shape `(B, C)`.

    Raises:
      ValueError: depth, width or norm.
    """
    blocks = self._blocks_per_group()
    stem = Conv(_GROUP_WIDTHS[0], use_bias=self.norm == 'none')
    x = stem(self._standardized(images))
    for group, channels in enumerate(_GROUP_WIDTHS):
      for index in range(blocks):
        stride = 2 if group and not index else 1
        x = _Block(channels * self.width, stride, self.norm)(x, train=train)
    x = nn.relu(_normalize(x, self.norm, train))
    x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
    init = uniform(x.shape[-1])
    return nn.Dense(self.num_classes, dtype=x.dtype, kernel_init=init)(x)

  def _blocks_per_group(self) -> int:
    if self.depth < 10 or self.depth % 6 != 4:
      raise ValueError(
        f'depth={self.depth}: must be 6 n + 4 with n >= 1, as 16, 22, 28 or 40.'
      )
    if self.width < 1:
      raise ValueError(f'width={self.width}: must be at least 1.')
    if self.norm not in NORMS:
      raise ValueError(f'norm={self.norm!r}: choose one of {", ".join(NORMS)}.')
    return (self.depth - 4) // 6

  def _standardized(self, images: jax.Array) -> jax.Array:
    mean = jnp.asarray(self.pixel_mean, jnp.float32)[None, None, None]
    std = jnp.asarray(self.pixel_std, jnp.float32)[None, None, None]
    return (images.astype(jnp.promote_types(images.dtype, jnp.float32)) - mean) / std


class _Block(nn.Module):
  """Two convolutions beside a shortcut, which is a 1x1 convolution where shapes change.

  Then the shortcut starts from the normalized inputs.
  """

  channels: int
  stride: int
  norm: str

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    plain = self.norm == 'none'
    shortcut = x
    x = nn.relu(_normalize(x, self.norm, train))
    if self.stride > 1 or x.shape[-1] != self.channels:
      shortcut = Conv(self.channels, size=1, stride=self.stride, use_bias=plain)(x)
    x = Conv(self.channels, stride=self.stride, use_bias=plain)(x)
    x = nn.relu(_normalize(x, self.norm, train))
    last = nn.initializers.zeros if plain else nn.initializers.he_normal()
    return shortcut + Conv(self.channels, use_bias=plain, kernel_init=last)(x)


def _normalize(x: jax.Array, norm: str, train: bool) -> jax.Array:
  if norm == 'batch':
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
  return nn.GroupNorm(_NORM_GROUPS)(x) if norm == 'group' else x
