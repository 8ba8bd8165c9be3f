"""Residual networks for large images.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, with
the stride in the 3x3 convolution of a bottleneck ("v1.5") and the scale of each block's
last normalization zero at first (Goyal et al. 2017, arXiv:1706.02677).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.convolution import Conv

# Blocks of the four groups, and whether they are bottlenecks, by depth.
DEPTHS = {
  10: ((1, 1, 1, 1), False),
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
}
_WIDENING = 4  # of a bottleneck's outputs


class ResNet(nn.Module):
  """ResNet-depth: a convolution, max-pooling, four groups of blocks, mean, dense layer.

  The groups are 1, 2, 4 and 8 times `width` wide, in bottlenecks four times that, and
  each but the first halves the image. With 1000 classes ResNet-50 has 25,557,032
  parameters, ResNet-18 11,689,512.

  Convolutions start as He et al.'s, the dense layer normal with deviation .01.
  Parameters may be handed in as bfloat16: convolutions are computed in their dtype,
  statistics, means and logits in float32.

  Attributes:
    num_classes: number of classes C.
    depth: 10, 18, 34 (blocks of two 3x3 convolutions), 50, 101 or 152 (bottlenecks).
    width: channels of the first group.
    pixel_mean: mean of each input channel, which is subtracted from the inputs.
    pixel_std: what the inputs are divided by then.

  >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
  >>> model = ResNet(num_classes=10, depth=10, width=4)
  >>> variables = jax.jit(model.init)(jax.random.key(0), images)
  >>> jax.jit(model.apply)(variables, images).shape
  (2, 10)
  """

  num_classes: int = 1000
  depth: int = 50
  width: int = 64
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
      ValueError: depth or width.
    """
    if self.depth not in DEPTHS:
      raise ValueError(
        f'depth={self.depth}: must be one of {", ".join(map(str, DEPTHS))}.'
      )
    if self.width < 1:
      raise ValueError(f'width={self.width}: must be at least 1.')
    counts, bottleneck = DEPTHS[self.depth]
    block = _Bottleneck if bottleneck else _Block
    x = Conv(self.width, size=7, stride=2)(self._standardized(images))
    x = nn.relu(_norm(x, train))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for group, count in enumerate(counts):
      for index in range(count):
        stride = 2 if group and not index else 1
        x = block(self.width << group, stride)(x, train=train)
    x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
    init = nn.initializers.normal(0.01)
    return nn.Dense(self.num_classes, dtype=x.dtype, kernel_init=init)(x)

  def _standardized(self, images: jax.Array) -> jax.Array:
    mean = jnp.asarray(self.pixel_mean, jnp.float32)[None, None, None]
    std = jnp.asarray(self.pixel_std, jnp.float32)[None, None, None]
    return (images.astype(jnp.promote_types(images.dtype, jnp.float32)) - mean) / std


class _Block(nn.Module):
  """Two 3x3 convolutions beside a shortcut."""

  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    y = nn.relu(_norm(Conv(self.channels, stride=self.stride)(x), train))
    y = _norm(Conv(self.channels)(y), train, nn.initializers.zeros)
    return nn.relu(y + _shortcut(x, self.channels, self.stride, train))


class _Bottleneck(nn.Module):
  """A 1x1, a 3x3 and a 1x1 convolution beside a shortcut."""

  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    y = nn.relu(_norm(Conv(self.channels, size=1)(x), train))
    y = nn.relu(_norm(Conv(self.channels, stride=self.stride)(y), train))
    channels = _WIDENING * self.channels
    y = _norm(Conv(channels, size=1)(y), train, nn.initializers.zeros)
    return nn.relu(y + _shortcut(x, channels, self.stride, train))


def _shortcut(x: jax.Array, channels: int, stride: int, train: bool) -> jax.Array:
  """The inputs, through a normalized 1x1 convolution where shapes change."""
  if stride == 1 and x.shape[-1] == channels:
    return x
  return _norm(Conv(channels, size=1, stride=stride)(x), train)


def _norm(x: jax.Array, train: bool, scale_init=nn.initializers.ones) -> jax.Array:
  norm = nn.BatchNorm(
    use_running_average=not train, momentum=0.9, epsilon=1e-5, scale_init=scale_init
  )
  return norm(x)
