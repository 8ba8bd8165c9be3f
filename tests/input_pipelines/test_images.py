"""Decoding and cutting, against images whose pixels tell where they were."""

import io

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from input_pipelines import DataError, images


def _encoded(pixels, form='PNG', **options):
  image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def _places(width, height):
  """Red tells the column, green the row, in 256ths of the image."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[..., 0] = 255 * (np.arange(width) + 0.5)[None] / width
  pixels[..., 1] = 255 * (np.arange(height) + 0.5)[:, None] / height
  return pixels


def _shares(pixels):
  """First and last column and row of a result, as shares of the image."""
  rows, columns = pixels[..., 1].mean(1), pixels[..., 0].mean(0)
  return columns[0] / 255, columns[-1] / 255, rows[0] / 255, rows[-1] / 255


@pytest.mark.parametrize('form', ['PNG', 'JPEG'])
def test_the_central_square_is_224_of_256(form):
  content = _encoded(_places(160, 128), form)
  found = images.decode(content, 28, None, 'x')
  assert found.shape == (28, 28, 3) and found.dtype == np.uint8
  # The square has 112 of the 128 rows, a pixel of the result is four.
  expected = [(160 - 112) / 2 + 2, (160 + 112) / 2 - 2, 8 + 2, 120 - 2]
  np.testing.assert_allclose(
    _shares(found), np.array(expected) / (160, 160, 128, 128), atol=0.012
  )


def test_a_random_part_is_cut_and_mirrored():
  content = _encoded(_places(200, 100))
  mirrored, areas = 0, []
  for seed in range(60):
    found = images.decode(content, 16, np.random.default_rng(seed), 'x')
    again = images.decode(content, 16, np.random.default_rng(seed), 'x')
    np.testing.assert_array_equal(found, again)
    generator = np.random.default_rng(seed)
    mirror = generator.random() < 0.5
    left, upper, right, lower = images.random_box(200, 100, generator)
    across, down = (right - left) / 16, (lower - upper) / 16
    expected = left + across / 2, right - across / 2, upper + down / 2, lower - down / 2
    expected = np.array(expected) / (200, 200, 100, 100)
    if mirror:
      expected[:2] = expected[1::-1]
    np.testing.assert_allclose(_shares(found), expected, atol=0.02)
    mirrored += mirror
    areas.append((right - left) * (lower - upper) / 20_000)
  assert 15 < mirrored < 45
  assert min(areas) > 0.07 and max(areas) > 0.4


def test_boxes_are_those_of_rejection():
  """Against shares and shapes drawn in one array, of which those that fit are kept."""
  generator = np.random.default_rng(0)
  width, height = 400, 300
  found = [images.random_box(width, height, generator) for _ in range(3000)]
  left, upper, right, lower = np.transpose(found)
  assert (left >= 0).all() and (upper >= 0).all()
  assert (right <= width).all() and (lower <= height).all()
  areas = generator.uniform(0.08, 1, 100_000) * width * height
  shapes = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), len(areas)))
  across, down = np.sqrt(areas * shapes), np.sqrt(areas / shapes)
  fits = (across <= width) & (down <= height)
  sides = right - left, lower - upper
  for ours, theirs in (
    (sides[0] * sides[1], areas[fits]),
    (sides[0] / sides[1], shapes[fits]),
  ):
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
  free = sides[0] < width - 20
  places = left[free] / (width - sides[0][free])
  assert stats.kstest(places, 'uniform').pvalue > 1e-3


def test_what_never_fits_is_cut_centrally():
  generator = np.random.default_rng(0)
  assert images.random_box(4000, 30, generator) == (1980, 0, 2020, 30)
  assert images.random_box(30, 4000, generator) == (0, 1980, 30, 2020)
  assert images.random_box(1, 1, generator) == (0, 0, 1, 1)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same():
  places = _places(801, 643)
  fast = images.decode(_encoded(places, 'JPEG', quality=95), 32, None, 'x')
  exact = images.decode(_encoded(places), 32, None, 'x')
  difference = np.abs(fast.astype(int) - exact)
  assert difference.max() <= 6 and difference.mean() < 1.5
  for seed in range(20):
    pair = [
      images.decode(content, 24, np.random.default_rng(seed), 'x').astype(int)
      for content in (_encoded(places, 'JPEG', quality=95), _encoded(places))
    ]
    assert np.abs(pair[0] - pair[1]).mean() < 1.5


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_grey_images_and_cmyk_become_rgb(mode):
  image = PIL.Image.fromarray(_places(40, 40)).convert(mode)
  found = images.decode(_encoded(image, 'JPEG', quality=95), 16, None, 'x')
  expected = images.decode(_encoded(image.convert('RGB')), 16, None, 'x')
  assert found.shape == (16, 16, 3)
  assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize('mode', ['RGBA', 'P', '1', 'I;16'])
def test_other_kinds_of_pixels(mode):
  image = PIL.Image.fromarray(_places(40, 40))
  if mode == 'I;16':
    image = PIL.Image.fromarray(np.full((40, 40), 200 << 8, np.uint16))
  else:
    image = image.convert(mode)
  found = images.decode(_encoded(image), 16, np.random.default_rng(0), 'x')
  assert found.shape == (16, 16, 3)
  assert mode != 'I;16' or (found == 200).all()


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_the_cameras_orientation_is_heeded(orientation):
  turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
  upright = _places(90, 60)
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  stored = np.ascontiguousarray(np.rot90(upright, turns))
  content = _encoded(stored, 'JPEG', quality=95, exif=exif)
  for seed in (None, 0, 1):
    pair = [
      images.decode(
        x, 12, None if seed is None else np.random.default_rng(seed), 'x'
      ).astype(int)
      for x in (content, _encoded(upright))
    ]
    assert np.abs(pair[0] - pair[1]).mean() < 3


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'no image', 'n01/a.JPEG is not an image that can be read'),
    (b'', 'n01/a.JPEG is not an image'),
    (_encoded(_places(90, 90), 'JPEG')[:900], 'n01/a.JPEG cannot be read as an image'),
  ],
)
def test_a_damaged_image_is_named(content, words):
  for generator in (None, np.random.default_rng(0)):
    with pytest.raises(DataError, match=f'{words}.*: replace or remove it') as caught:
      images.decode(content, 16, generator, 'n01/a.JPEG')
    assert str(caught.value).count('\n') == 0
