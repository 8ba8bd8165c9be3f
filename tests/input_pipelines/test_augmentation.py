"""Augmentation against a NumPy search for what was drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipelines import ArraySplit, augmentation

SIZE = 12
# Every pixel differs from every other, and none is black.
IMAGE = np.arange(1, SIZE * SIZE * 3 + 1, dtype=np.int32).reshape(SIZE, SIZE, 3)
NUM_IMAGES = 600
FILL = (-1.0, -2.0, -3.4)


def _candidates(padding):
  """Every image that shifts and mirroring can make, by what makes it."""
  padded = np.pad(IMAGE, ((padding, padding), (padding, padding), (0, 0)))
  shifts = range(2 * padding + 1)
  return {
    (row, column, mirror): padded[row : row + SIZE, column : column + SIZE][:, ::mirror]
    for row in shifts
    for column in shifts
    for mirror in (1, -1)
  }


@pytest.fixture(scope='module')
def moved():
  augment = augmentation.crop_flip_cutout(padding=2, cutout_size=0)
  images = jnp.broadcast_to(IMAGE, (NUM_IMAGES, *IMAGE.shape))
  return np.asarray(jax.jit(augment)(jax.random.key(0), images))


def test_every_image_is_a_shift_and_all_are_drawn_alike(moved):
  candidates = {image.tobytes(): made for made, image in _candidates(2).items()}
  drawn = np.array([candidates[image.tobytes()] for image in moved])
  for column, values in ((0, range(5)), (1, range(5)), (2, (-1, 1))):
    counts = [(drawn[:, column] == value).sum() for value in values]
    expected = NUM_IMAGES / len(values)
    # Chi-squared, at a level of about 1e-4.
    assert sum((count - expected) ** 2 / expected for count in counts) < 24
  assert abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.15


def test_squares_lie_where_they_should():
  size = 4
  augment = augmentation.crop_flip_cutout(
    padding=0, cutout_size=size, cutout_probability=0.3, cutout_fill=FILL
  )
  images = jnp.broadcast_to(IMAGE, (NUM_IMAGES, *IMAGE.shape))
  changed = np.asarray(jax.jit(augment)(jax.random.key(1), images))
  covered = changed[..., 0] < 0
  np.testing.assert_array_equal(
    changed[covered], np.tile([-1, -2, -3], (covered.sum(), 1))
  )
  kept = np.where(covered[..., None], 0, changed).reshape(NUM_IMAGES, -1)
  images = np.stack([IMAGE, IMAGE[:, ::-1]])[:, None]
  plain = np.where(covered[..., None], 0, images).reshape(2, NUM_IMAGES, -1)
  assert (plain == kept).all(axis=2).any(axis=0).all()
  rows = covered.any(axis=2).sum(axis=1)
  columns = covered.any(axis=1).sum(axis=1)
  np.testing.assert_array_equal(covered.sum(axis=(1, 2)), rows * columns)
  some = rows > 0
  assert abs(some.mean() - 0.3) < 0.075
  assert rows[some].min() >= size // 2 and rows.max() == size
  # Of the first corners from -2 to 9, those that leave the square whole are 0 to 8.
  assert abs((rows[some] == size).mean() - 9 / 12) < 0.13


def test_images_keep_their_type_and_leading_axes():
  augment = jax.jit(augmentation.crop_flip_cutout(cutout_fill=(125.3, 122.9, 113.9)))
  images = np.full((2, 3, 32, 32, 3), 200, np.uint8)
  changed = augment(jax.random.key(0), images)
  assert changed.shape == images.shape and changed.dtype == np.uint8
  flat = augment(jax.random.key(0), images.reshape(6, 32, 32, 3))
  np.testing.assert_array_equal(changed.reshape(flat.shape), flat)
  pixels = {tuple(pixel) for pixel in np.unique(flat.reshape(-1, 3), axis=0).tolist()}
  assert pixels <= {(200, 200, 200), (0, 0, 0), (125, 123, 114)}


def test_equal_keys_give_equal_images_and_other_keys_others():
  augment = jax.jit(augmentation.crop_flip_cutout())
  images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
  first, again, other = (augment(jax.random.key(seed), images) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_channel_statistics():
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (1500, 4, 4, 3)).astype(np.uint8)
  images[..., 2] = 7
  split = ArraySplit(images, np.zeros(1500))
  mean, std = augmentation.channel_statistics(split)
  np.testing.assert_allclose(mean, images.mean((0, 1, 2)))
  np.testing.assert_allclose(std[:2], images.std((0, 1, 2))[:2])
  assert std[2] == 1
