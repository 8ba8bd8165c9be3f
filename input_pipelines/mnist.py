"""MNIST: 70,000 grey images of handwritten digits, 28x28 pixels, in ten classes.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE, 1998.
"""

import gzip
import math
import pathlib
import zlib

import numpy as np

from input_pipelines import batching, sources
from input_pipelines.errors import DataError
from input_pipelines.labelled_arrays import LabelledArrays

CLASSES = tuple(str(digit) for digit in range(10))
# The copy that most libraries download: the publisher's own address answers no more.
_PUBLISHER = 'https://storage.googleapis.com/cvdf-datasets/mnist'
_TRAIN = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte')
_TEST = ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
_SHAPE = (28, 28)
_UNSIGNED_BYTE = 8  # the idx format's number of that type


def load(
  *, data_dir: str = '', manual_dir: str = ''
) -> tuple[batching.ArraySplit, batching.ArraySplit]:
  """Loads MNIST with its own split.

  `manual_dir` may hold the publisher's four files, train-images-idx3-ubyte.gz and so
  on, with or without the ending `.gz`. Without them they are downloaded.

  Args:
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder with the files; by default `downloads/manual` in `data_dir`.

  Returns:
    `(train, test)`, 60,000 and 10,000 images; inputs are uint8 of shape `(28, 28)`.

  Raises:
    DataError: there is no source, or the data are damaged.
  """
  data = _load('mnist', (*_TRAIN, *_TEST), data_dir, manual_dir)
  return tuple(batching.ArraySplit(**data.parts[part]) for part in ('train', 'test'))


def load_test(*, data_dir: str = '', manual_dir: str = '') -> batching.ArraySplit:
  """Loads the 10,000 test images alone, of which small experiments are made.

  Only the two files of these images are looked for, or downloaded (1.6 MB).

  Args:
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder with the files; by default `downloads/manual` in `data_dir`.

  Returns:
    Images as `load` gives them.

  Raises:
    DataError: there is no source, or the data are damaged.
  """
  data = _load('mnist_test', _TEST, data_dir, manual_dir)
  return batching.ArraySplit(**data.parts['test'])


def _load(
  name: str, files: tuple[str, ...], data_dir: str, manual_dir: str
) -> LabelledArrays:
  zipped = tuple(f'{file}.gz' for file in files)
  source = sources.Source(
    name=name,
    files=[zipped, files],
    url=f'{_PUBLISHER}/{zipped[0]}',
    parse=read,
    builder='input_pipelines.labelled_arrays_builder',
  )
  return sources.load(source, data_dir=data_dir, manual_dir=manual_dir)


def read(*paths: pathlib.Path) -> LabelledArrays:
  """Reads and validates pairs of files of images and of labels.

  Args:
    *paths: images and labels of the training set, if wanted, and of the test set.

  Raises:
    DataError: a file is damaged.
  """
  parts = {}
  for images, labels in zip(paths[::2], paths[1::2], strict=True):
    pixels, digits = _read_idx(images, 3), _read_idx(labels, 1)
    if pixels.shape[1:] != _SHAPE:
      raise _damaged(images, f'its images have the shape {pixels.shape[1:]}')
    if len(pixels) != len(digits) or not len(pixels):
      raise _damaged(labels, f'{len(digits)} labels for {len(pixels)} images')
    if digits.max() >= len(CLASSES):
      raise _damaged(labels, f'it has the label {digits.max()}')
    part = 'train' if images.name.startswith('train') else 'test'
    parts[part] = {'inputs': pixels, 'labels': digits.astype(np.int64)}
  return LabelledArrays(parts, CLASSES)


def _read_idx(path: pathlib.Path, num_axes: int) -> np.ndarray:
  """Reads an array of unsigned bytes in the idx format, compressed or not."""
  try:
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'rb') as file:
      content = file.read()
  except (OSError, EOFError, zlib.error) as error:
    raise _damaged(path, f'it cannot be read: {error}') from error
  start = 4 + 4 * num_axes
  if len(content) < start or content[:4] != bytes([0, 0, _UNSIGNED_BYTE, num_axes]):
    raise _damaged(path, f'it is no idx file of bytes with {num_axes} axes')
  shape = tuple(np.frombuffer(content[4:start], '>i4').tolist())
  if min(shape) < 0 or len(content) - start != math.prod(shape):
    raise _damaged(
      path, f'{len(content) - start} bytes do not make an array of the shape {shape}'
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _damaged(path: pathlib.Path, problem: str) -> DataError:
  return DataError(f'{path} is damaged ({problem}): get it from {_PUBLISHER} again.')
