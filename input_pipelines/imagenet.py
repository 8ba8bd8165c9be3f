"""ImageNet, or a tree like it, streamed: decoded and augmented for every batch.

Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge",
arXiv:1409.0575: 1,281,167 training and 50,000 validation images of 1,000 classes, which
are to be had from image-net.org after registration. Two forms are read:

- class folders, ``train/n01440764/n01440764_10026.JPEG`` and ``val/n01440764/...``;
- array_record shards, as tensorflow-datasets prepares them
  (``imagenet2012-train.array_record-00000-of-01024``, see `image_records`).
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from input_pipelines import images
from input_pipelines.errors import DataError
from input_pipelines.image_files import ImageFiles
from input_pipelines.image_records import ImageRecords, has_shards
from input_pipelines.streaming import StreamedSplit

NAME = 'imagenet2012'
_TRAIN, _TEST = ('train',), ('validation', 'val', 'test')
# Of the red, green and blue of ImageNet's training images, from 0 to 255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def load(
  dataset: str = '',
  *,
  data_dir: str = '',
  manual_dir: str = '',
  size: int = 224,
  num_workers: int = 0,
) -> tuple[StreamedSplit, StreamedSplit, tuple[str, ...]]:
  """Finds the images and lists them; none is read before a batch asks for it.

  Args:
    dataset: path of a tree of class folders or of a folder with shards; unset, the
      newest `imagenet2012/*` in `data_dir`, else `imagenet2012` in `manual_dir`.
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: by default `downloads/manual` in `data_dir`.
    size: height and width of what is cut out, in pixels.
    num_workers: processes that read; 0 for threads of this one.

  Returns:
    `(train, test, classes)`; inputs are uint8 of shape `(size, size, 3)`. Training
    images are cut at random and mirrored where batches have a seed, see
    `images.decode`.

  Raises:
    DataError: there are no images, a class is without any, or train and test have
      other classes; a shard is truncated; grain or array_record is not installed.
  """
  folder = _folder(dataset, data_dir, manual_dir)
  if has_shards(folder):
    train, test = (ImageRecords(folder, names) for names in (_TRAIN, _TEST))
  else:
    train = ImageFiles(_part(folder, _TRAIN))
    test = ImageFiles(_part(folder, _TEST), train.classes)
  splits = (
    StreamedSplit(_Squares(part, size), num_workers=num_workers)
    for part in (train, test)
  )
  return *splits, train.classes


class _Squares:
  """The images of a source as squares of one size."""

  dtype = np.uint8

  def __init__(self, source: Any, size: int):
    self._source = source
    self.shape = (size, size, 3)

  def __len__(self) -> int:
    return len(self._source)

  def load(
    self, index: int, generator: np.random.Generator | None
  ) -> tuple[np.ndarray, int]:
    """The pixels and the label of an image."""
    content, label = self._source.read(index)
    name = self._source.name(index)
    return images.decode(content, self.shape[0], generator, name), label


def _folder(dataset: str, data_dir: str, manual_dir: str) -> pathlib.Path:
  """The folder that holds the images.

  Raises:
    DataError: there is none.
  """
  if dataset:
    folder = pathlib.Path(dataset).expanduser()
    if not folder.is_dir():
      raise DataError(
        f'dataset={dataset}: there is no such folder; give that with the folders train '
        'and val, or with the array_record shards.'
      )
    return folder
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  root = pathlib.Path(data_dir or default).expanduser()
  manual = pathlib.Path(manual_dir).expanduser() if manual_dir else None
  manual = (manual or root / 'downloads' / 'manual') / NAME
  prepared = [path for path in (root / NAME).glob('*') if has_shards(path)]
  if prepared:
    return max(prepared, key=_version)
  if not manual.is_dir():
    raise DataError(
      f'{manual} is no folder and {root / NAME} has no array_record shards: get '
      'ImageNet from https://image-net.org, and name its folder with train/CLASS/IMAGE '
      'and val/CLASS/IMAGE, or with the shards, by --dataset=DIR.'
    )
  return manual


def _version(folder: pathlib.Path) -> tuple[int, ...]:
  """5.1.0 as numbers, so that 5.10.0 is newer."""
  return tuple(int(part) for part in folder.name.split('.') if part.isdecimal())


def _part(folder: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path:
  """The folder of the training or of the test images."""
  for name in names:
    if (folder / name).is_dir():
      return folder / name
  raise DataError(
    f'{folder} has no folder {" or ".join(names)}: put the class folders of the '
    f'{"training" if names == _TRAIN else "validation"} images there, or give another '
    'folder with --dataset.'
  )
