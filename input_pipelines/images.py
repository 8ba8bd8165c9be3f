"""Encoded images, decoded, cut and scaled: at random for training, centrally for tests.

The random crop is that of Szegedy et al. 2014 (arXiv:1409.4842, section 6).
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from input_pipelines.errors import DataError

# A crop's share of the image's area, and its width over its height.
_AREAS = (0.08, 1.0)
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10
# The central crop's share of the shorter side: 224 of 256.
_CENTRAL = 224 / 256
_ORIENTATION = 0x0112  # of EXIF; from 5 on width and height change places

Box = tuple[float, float, float, float]


def decode(
  content: bytes, size: int, generator: np.random.Generator | None, name: str
) -> np.ndarray:
  """Decodes an image and cuts a square of it.

  With a generator it is mirrored with probability 1/2, and `random_box` of it is
  scaled; without, `central_box`. Scaling is bilinear, over all pixels that an output
  pixel covers. A JPEG that is more than twice as large as needed is decoded at a half,
  a quarter or an eighth of its size. Grey images and CMYK become RGB, and the
  orientation that a camera noted is heeded.

  Args:
    content: a file in any format that Pillow reads.
    size: height and width of the result in pixels.
    generator: makes the random choices; None for the central square.
    name: what an error calls the image.

  Returns:
    uint8 of shape `(size, size, 3)`.

  Raises:
    DataError: the content is no image, or damaged.
  """
  import PIL.Image
  import PIL.ImageOps

  try:
    with PIL.Image.open(io.BytesIO(content)) as image:
      turned = image.getexif().get(_ORIENTATION, 1) > 4
      full = image.size[::-1] if turned else image.size
      mirror, box = False, central_box(*full)
      if generator is not None:
        mirror = generator.random() < 0.5
        box = random_box(*full, generator)
      _draft(image, box, size)
      upright = eight_bits(PIL.ImageOps.exif_transpose(image)).convert('RGB')
      sides = zip(box, upright.size * 2, full * 2, strict=True)
      box = tuple(x * new / old for x, new, old in sides)
      square = upright.resize((size, size), PIL.Image.Resampling.BILINEAR, box)
      pixels = np.asarray(square)
      return pixels[:, ::-1] if mirror else pixels
  except PIL.UnidentifiedImageError as error:
    raise DataError(
      f'{name} is not an image that can be read: replace or remove it.'
    ) from error
  # Decoders raise whatever their format's faults lead them to.
  except Exception as error:
    raise DataError(
      f'{name} cannot be read as an image ({error}): replace or remove it.'
    ) from error


def random_box(width: int, height: int, generator: np.random.Generator) -> Box:
  """Chooses a part of an image of random area, shape and place.

  Area is uniform in 8 to 100 % of the image's, and the logarithm of width over height
  uniform between 3/4 and 4/3. After ten choices that do not fit into the image it is
  the largest central part of such a shape.

  Args:
    width: of the image in pixels.
    height: of the image in pixels.
    generator: makes the choices.

  Returns:
    `(left, upper, right, lower)` in pixels.

  >>> left, upper, right, lower = random_box(60, 40, np.random.default_rng(0))
  >>> 0 <= left < right <= 60, 0 <= upper < lower <= 40
  (True, True)
  """
  for _ in range(_TRIES):
    area = generator.uniform(*_AREAS) * width * height
    aspect = math.exp(generator.uniform(*map(math.log, _ASPECTS)))
    across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < across <= width and 0 < down <= height:
      left = int(generator.integers(width - across + 1))
      upper = int(generator.integers(height - down + 1))
      return left, upper, left + across, upper + down
  across = min(width, height * _ASPECTS[1])
  down = min(height, width / _ASPECTS[0])
  left, upper = (width - across) / 2, (height - down) / 2
  return left, upper, left + across, upper + down


def central_box(width: int, height: int) -> Box:
  """The central square whose side is 224/256 of the shorter side.

  Scaled to 224 pixels it is what is left of an image that is scaled to a shorter side
  of 256 pixels and cut.

  >>> central_box(512, 256)
  (144.0, 16.0, 368.0, 240.0)
  """
  side = min(width, height) * _CENTRAL
  left, upper = (width - side) / 2, (height - side) / 2
  return left, upper, left + side, upper + side


def eight_bits(image: Any) -> Any:
  """An image whose channels have 8 bits; Pillow would cut wider ones off at 255.

  Raises:
    ValueError: the image has 32 bits a pixel, whose range is not known.
  """
  import PIL.Image

  if image.mode.startswith('I;16'):
    return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.mode in ('I', 'F'):
    raise ValueError('32 bits a pixel, of no known range')
  return image


def _draft(image: Any, box: Box, size: int) -> None:
  """Lets the decoder of a JPEG skip detail that scaling would take away."""
  excess = min(box[2] - box[0], box[3] - box[1]) / size
  factor = next((factor for factor in (8, 4, 2) if factor <= excess), 1)
  if factor > 1:
    image.draft(None, tuple(side // factor for side in image.size))
