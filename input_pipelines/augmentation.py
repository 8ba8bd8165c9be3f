"""Random changes of images, as pure functions to be compiled into a training step."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from input_pipelines import batching

_STATISTICS_BATCH = 1000


def crop_flip_cutout(
  *,
  padding: int = 4,
  cutout_size: int = 16,
  cutout_probability: float = 0.5,
  cutout_fill: Sequence[float] = (0.0, 0.0, 0.0),
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The usual augmentation of CIFAR-10.

  Each image is shifted by up to `padding` pixels in both directions, black coming in
  from outside; mirrored with probability 1/2; and with the given probability a square
  is covered, whose upper left corner is anywhere from half its size outside the image,
  so that a part of it may lie outside (DeVries and Taylor 2017, arXiv:1708.04552).

  Args:
    padding: largest shift in pixels.
    cutout_size: height and width of the square; 0 for none.
    cutout_probability: probability that an image gets a square.
    cutout_fill: value of each channel inside it, rounded for integer images.

  Returns:
    `augment(key, images)` for images `(..., H, W, C)` of any number type, which it
    keeps: with one key, each image has its own draws.

  >>> augment = crop_flip_cutout()
  >>> images = jnp.full((2, 32, 32, 3), 255, jnp.uint8)
  >>> changed = augment(jax.random.key(0), images)
  >>> changed.shape, changed.dtype
  ((2, 32, 32, 3), dtype('uint8'))
  """

  def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    batch = jnp.asarray(images).reshape(-1, *images.shape[-3:])
    move_key, cover_key = jax.random.split(key)
    batch = _shift_and_mirror(move_key, batch, padding)
    if cutout_size:
      covered = _squares(cover_key, batch.shape, cutout_size, cutout_probability)
      fill = jnp.asarray(cutout_fill)
      if jnp.issubdtype(batch.dtype, jnp.integer):
        fill = jnp.round(fill)
      fill = fill.astype(batch.dtype)[None, None, None]
      batch = jnp.where(covered[..., None], fill, batch)
    return batch.reshape(images.shape)

  return augment


def channel_statistics(
  split: batching.ArraySplit,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of each channel over all images of a split.

  Args:
    split: its inputs have channels last.

  Returns:
    `(mean, std)`, in the units of the inputs; a constant channel has std 1.

  >>> split = batching.ArraySplit(np.arange(8.0).reshape(2, 1, 2, 2), np.zeros(2))
  >>> channel_statistics(split)[0]
  (3.0, 4.0)
  """
  count, total, squares = 0, 0.0, 0.0
  for batch in split.batches(_STATISTICS_BATCH).epoch(0):
    pixels = batch['inputs'].reshape(-1, batch['inputs'].shape[-1]).astype(np.float64)
    count += len(pixels)
    total = total + pixels.sum(axis=0)
    squares = squares + (pixels**2).sum(axis=0)
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0))
  return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def _shift_and_mirror(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
  """Shifts and mirrors `(n, H, W, C)` by looking up every pixel's origin once."""
  num_images, height, width, _ = images.shape
  shift_key, mirror_key = jax.random.split(key)
  shift = jax.random.randint(shift_key, (2, num_images, 1), -padding, padding + 1)
  mirror = jax.random.bernoulli(mirror_key, shape=(num_images, 1))
  columns = jnp.arange(width)[None]
  columns = jnp.where(mirror, width - 1 - columns, columns)
  rows = (jnp.arange(height)[None] + shift[0])[:, :, None]
  columns = (columns + shift[1])[:, None, :]
  image = jnp.arange(num_images)[:, None, None]
  return images.at[image, rows, columns].get(
    mode='fill', fill_value=0, wrap_negative_indices=False
  )


def _squares(
  key: jax.Array, shape: tuple[int, ...], size: int, probability: float
) -> jax.Array:
  """Returns which pixels `(n, H, W)` are covered by a square."""
  num_images, height, width, _ = shape
  chosen_key, row_key, column_key = jax.random.split(key, 3)

  def inside(key, length):
    first = jax.random.randint(key, (num_images, 1), -(size // 2), length - size // 2)
    place = jnp.arange(length)[None]
    return (place >= first) & (place < first + size)

  rows, columns = inside(row_key, height), inside(column_key, width)
  chosen = jax.random.bernoulli(chosen_key, probability, (num_images, 1, 1))
  return chosen & rows[:, :, None] & columns[:, None, :]
