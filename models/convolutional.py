"""A small convolutional network without batch statistics."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.convolution import Conv


class ConvNet(nn.Module):
  """Blocks of convolution, ReLU, layer normalization and max-pooling, and a dense head.

  A block convolves 3x3 with a bias, normalizes each pixel over its channels, and halves
  the image by the largest of 2x2 pixels. There are no batch statistics, so the loss
  over the whole training set is a function of the parameters alone. Weights start from
  Glorot's normal distribution, biases at 0.

  Attributes:
    features: channels of each block.
    num_classes: number of classes C.
    smooth: GELU in place of ReLU, and the mean of 2x2 pixels in place of the largest,
      so that the network can be differentiated any number of times.

  >>> model = ConvNet(features=(4, 8))
  >>> images = jnp.zeros((2, 8, 8, 3))
  >>> variables = model.init(jax.random.key(0), images)
  >>> model.apply(variables, images).shape
  (2, 10)
  """

  features: Sequence[int] = (16, 32)
  num_classes: int = 10
  smooth: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits.

    Args:
      images: `(B, H, W, channels)`; H and W are halved by each block, rounded down.
      train: has no effect, because no layer behaves differently in training.

    Returns:
      `(B, C)`.

    Raises:
      ValueError: the images are too small for so many blocks.
    """
    del train
    if min(images.shape[1:3]) < 2 ** len(self.features):
      raise ValueError(
        f'features={tuple(self.features)}: each block halves the image, and '
        f'{images.shape[1]}x{images.shape[2]} pixels cannot be halved '
        f'{len(self.features)} times; leave out a block.'
      )
    x, init = images, nn.initializers.glorot_normal()
    activation = nn.gelu if self.smooth else nn.relu
    for width in self.features:
      conv = Conv(width, use_bias=True, kernel_init=init)
      # The fast variance is a difference, which loses digits where pixels are alike.
      x = nn.LayerNorm(use_fast_variance=False)(activation(conv(x)))
      x = nn.avg_pool(x, (2, 2), (2, 2)) if self.smooth else _largest_of_four(x)
    return nn.Dense(self.num_classes, kernel_init=init)(x.reshape(len(x), -1))


def _largest_of_four(x: jax.Array) -> jax.Array:
  """The maximum over blocks of 2x2 pixels; a last odd row or column is left out."""
  count, height, width, channels = x.shape
  height, width = height // 2, width // 2
  x = x[:, : 2 * height, : 2 * width]
  x = x.reshape(count, height, 2, width, 2, channels)
  # The derivative of `max` over axes divides by the number of entries that equal the
  # maximum, and that is 0 where a compiler computes the same entry in two ways.
  x = jnp.maximum(x[:, :, 0], x[:, :, 1])
  return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
