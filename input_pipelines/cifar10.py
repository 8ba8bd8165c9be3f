"""CIFAR-10: 60,000 colour images of 32x32 pixels in ten classes.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import codecs
import io
import pathlib
import pickle

import numpy as np

from input_pipelines import batching, image_folder, labelled_arrays, sources, trees
from input_pipelines.errors import DataError
from input_pipelines.labelled_arrays import LabelledArrays

CLASSES = (
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
)
_PUBLISHER = 'https://www.cs.toronto.edu/~kriz'
_TRAIN_BATCHES = tuple(f'data_batch_{number}' for number in range(1, 6))
_TEST_BATCH = 'test_batch'
_PIXELS = 3 * 32 * 32

# What `manual_dir` may hold, the undamaged pixels first.
_FILES = (
  'cifar-10-binary.tar.gz',
  'cifar10.npz',
  'cifar-10-python.tar.gz',
  'cifar-10-batches-bin',
  'cifar-10-batches-py',
  'cifar10_jpeg.tar.gz',
  'cifar10',
  *(f'cifar10{ending}' for ending in image_folder.ARCHIVE_ENDINGS),
)


def load(
  *, data_dir: str = '', manual_dir: str = ''
) -> tuple[batching.ArraySplit, batching.ArraySplit, tuple[str, ...]]:
  """Loads CIFAR-10 with its own split.

  Args:
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder with the images; by default `downloads/manual` in `data_dir`.

  Returns:
    `(train, test, classes)`; inputs are uint8 of shape `(32, 32, 3)`.

  Raises:
    DataError: there is no source, or the data are damaged.
  """
  data = load_arrays(data_dir=data_dir, manual_dir=manual_dir)
  return *image_folder.splits(data, 0), data.classes


def load_arrays(*, data_dir: str = '', manual_dir: str = '') -> LabelledArrays:
  """Loads CIFAR-10 as its parts train and test.

  `manual_dir` may hold the publisher's binary or Python archive or the folder it
  unpacks to, or a folder, tar or zip `cifar10` (or `cifar10_jpeg.tar.gz`) of images in
  `train/CLASS/` and `test/CLASS/`, or a `cifar10.npz` of `labelled_arrays.save`.
  Without any the binary archive is downloaded.
  """
  source = sources.Source(
    name='cifar10',
    files=[(name,) for name in _FILES],
    url=f'{_PUBLISHER}/{_FILES[0]}',
    parse=read,
    builder='input_pipelines.labelled_arrays_builder',
  )
  return sources.load(source, data_dir=data_dir, manual_dir=manual_dir)


def read(path: pathlib.Path) -> LabelledArrays:
  """Reads and validates the images in any of their forms.

  Args:
    path: the file or folder.

  Raises:
    DataError: the data are damaged.
  """
  if path.suffix == '.npz':
    pixels = np.zeros((32, 32, 3), np.uint8)
    return labelled_arrays.load(path, [('test', 'train')], CLASSES, like=pixels)
  with trees.entries(path) as tree:
    names = {pathlib.PurePosixPath(name).name for name, _ in tree}
  if f'{_TEST_BATCH}.bin' in names:
    return _read_batches(path, '.bin', _binary)
  if _TEST_BATCH in names:
    return _read_batches(path, '', _pickled)
  if path.name.startswith('cifar-10'):
    raise DataError(
      f'{path} holds neither {_TEST_BATCH}.bin nor {_TEST_BATCH}: get it from '
      f'{_PUBLISHER} again.'
    )
  data = image_folder.read(path, classes=CLASSES)
  if 'train' not in data.parts:
    raise DataError(f'{path} has no folders train and test: CIFAR-10 has both.')
  return data


def _read_batches(path: pathlib.Path, ending: str, parse) -> LabelledArrays:
  """Reads the publisher's five training batches and the test batch."""
  wanted = {name + ending: name for name in (*_TRAIN_BATCHES, _TEST_BATCH)}
  batches = {}
  with trees.entries(path) as tree:
    for name, read in tree:
      file = pathlib.PurePosixPath(name).name
      if read and file in wanted:
        batches[wanted[file]] = parse(path, name, read())
  for file, batch in wanted.items():
    if batch not in batches:
      raise DataError(f'{path} has no {file}: get it from {_PUBLISHER} again.')

  def part(names):
    pixels, labels = zip(*(batches[name] for name in names), strict=True)
    inputs = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {'inputs': np.ascontiguousarray(inputs), 'labels': np.concatenate(labels)}

  return LabelledArrays(
    {'train': part(_TRAIN_BATCHES), 'test': part([_TEST_BATCH])}, CLASSES
  )


def _binary(
  path: pathlib.Path, name: str, content: bytes
) -> tuple[np.ndarray, np.ndarray]:
  """Parses records of a label and 3,072 pixels, a byte each."""
  if not content or len(content) % (1 + _PIXELS):
    raise _damaged(path, name, f'{len(content)} bytes are no multiple of {1 + _PIXELS}')
  records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
  return _checked(path, name, records[:, 1:], records[:, 0])


def _pickled(
  path: pathlib.Path, name: str, content: bytes
) -> tuple[np.ndarray, np.ndarray]:
  """Parses a pickled dict of `data` and `labels`."""
  try:
    batch = _ArraysOnly(io.BytesIO(content), encoding='bytes').load()
    pixels, labels = np.asarray(batch[b'data']), np.asarray(batch[b'labels'])
  # Damaged pickles raise whatever their bytes happen to mean.
  except Exception as error:
    raise _damaged(path, name, f'{type(error).__name__}: {error}') from error
  return _checked(path, name, pixels, labels)


class _ArraysOnly(pickle.Unpickler):
  """Unpickles NumPy arrays and plain values, and refuses to run anything else."""

  def find_class(self, module: str, name: str):
    """Looks up the constructors of arrays."""
    if (module, name) == ('numpy', 'ndarray'):
      return np.ndarray
    if (module, name) == ('numpy', 'dtype'):
      return np.dtype
    if (module, name) == ('_codecs', 'encode'):  # Python 3 writes bytes so.
      return codecs.encode
    if module.endswith('.multiarray') and name == '_reconstruct':
      return np._core.multiarray._reconstruct
    raise pickle.UnpicklingError(f'{module}.{name} has no place in a batch of images')


def _checked(
  path: pathlib.Path, name: str, pixels: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
    raise _damaged(path, name, f'pixels of shape {pixels.shape}, {len(labels)} labels')
  wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
  if len(wrong):
    raise _damaged(path, name, f'image {wrong[0]} has the label {labels[wrong[0]]}')
  return pixels, labels.astype(np.int64)


def _damaged(path: pathlib.Path, name: str, problem: str) -> DataError:
  return DataError(
    f'{name} in {path} is damaged ({problem}): get it from {_PUBLISHER} again.'
  )
