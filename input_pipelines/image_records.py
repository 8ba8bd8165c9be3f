"""Images in array_record shards, as tensorflow-datasets writes them.

A prepared set is a folder with files ``NAME-SPLIT.array_record-00003-of-00128`` and
``label.labels.txt``, which has the name of a class a line. A record is a
``tf.train.Example`` with the features ``image``, an encoded image, and ``label``, an
int64: https://www.tensorflow.org/tutorials/load_data/tfrecord. Groups of one record
(``group_size:1``, which tensorflow-datasets sets) make reading at random cheap.
"""

from __future__ import annotations

import bisect
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from input_pipelines.errors import DataError

LABELS = 'label.labels.txt'
_SHARD = re.compile(r'(?:.+-)?(\w+)\.array_record-(\d{5})-of-(\d{5})')


class ImageRecords:
  """The records of one split of a prepared set, over all its shards.

  Attributes:
    classes: their names.
  """

  def __init__(self, folder: pathlib.Path, splits: Sequence[str]):
    """Opens every shard once, and counts its records.

    Args:
      folder: of the prepared set.
      splits: names that the split may have.

    Raises:
      DataError: array_record is not installed, there is no such split, a shard is
        missing, truncated or without records, or the class names are missing.
    """
    self.classes = _class_names(folder)
    self._paths = _shards(folder, splits)
    self._source, counts = _source(self._paths)
    self._ends = list(itertools.accumulate(counts))

  def __len__(self) -> int:
    """Number of records."""
    return len(self._source)

  def read(self, index: int) -> tuple[bytes, int]:
    """The encoded image and the label of a record.

    Raises:
      DataError: the record is damaged, or its label is none of the classes.
    """
    try:
      record = self._source[index]
    except RuntimeError as error:
      raise DataError(
        f'{self.name(index)} cannot be read ({_short(error)}): get the shard again.'
      ) from error
    try:
      features = parse_example(record)
      content, label = features['image'][0], features['label'][0]
    except (KeyError, IndexError, ValueError) as error:
      raise DataError(
        f'{self.name(index)} is no tf.train.Example with the features image and label: '
        'prepare the set with tensorflow-datasets.'
      ) from error
    if not 0 <= label < len(self.classes):
      raise DataError(
        f'{self.name(index)} has the label {label}, and there are '
        f'{len(self.classes)} classes in {LABELS}: prepare the set again.'
      )
    return content, label

  def name(self, index: int) -> str:
    """What an error calls a record."""
    shard = bisect.bisect_right(self._ends, index)
    first = self._ends[shard - 1] if shard else 0
    return f'record {index - first} of {self._paths[shard]}'


def has_shards(folder: pathlib.Path) -> bool:
  """Whether a folder holds the shards of a prepared set."""
  return any(_SHARD.fullmatch(path.name) for path in folder.glob('*.array_record-*'))


def parse_example(record: bytes) -> dict[str, list[Any]]:
  """The values of a ``tf.train.Example`` by feature.

  Args:
    record: the encoded protocol buffer.

  Returns:
    Lists of bytes or ints; those of floats are left out.

  Raises:
    ValueError, IndexError: it is none.

  >>> parse_example(b'\\n\\r\\n\\x0b\\n\\x02ab\\x12\\x05\\x1a\\x03\\n\\x01\\x07')
  {'ab': [7]}
  """
  found = {}
  for features in _fields(record, 1):
    for entry in _fields(features, 1):
      (key,), (feature,) = _fields(entry, 1), _fields(entry, 2)
      values = [x for values in _fields(feature, 1) for x in _fields(values, 1)]
      for integers in _fields(feature, 3):
        for packed in _fields(integers, 1):
          values += [packed] if isinstance(packed, int) else _varints(packed)
      found[key.decode()] = values
  return found


def _fields(message: bytes, number: int) -> list[Any]:
  """The values of one field of an encoded message: bytes, or ints."""
  found, place = [], 0
  while place < len(message):
    tag, place = _varint(message, place)
    if tag & 7 == 0:
      value, place = _varint(message, place)
      value = _signed(value)
    elif tag & 7 == 2:
      length, place = _varint(message, place)
      if place + length > len(message):
        raise ValueError('the message is cut off')
      value, place = message[place : place + length], place + length
    elif tag & 7 in (1, 5):
      size = 8 if tag & 7 == 1 else 4
      value, place = message[place : place + size], place + size
    else:
      raise ValueError(f'there is no wire type {tag & 7}')
    if tag >> 3 == number:
      found.append(value)
  return found


def _varint(message: bytes, place: int) -> tuple[int, int]:
  """The number that begins at a place, and the place behind it."""
  value = shift = 0
  while True:
    byte = message[place]
    value |= (byte & 127) << shift
    place, shift = place + 1, shift + 7
    if byte < 128:
      return value, place
    if shift > 63:
      raise ValueError('the number is too long')


def _varints(message: bytes) -> list[int]:
  values, place = [], 0
  while place < len(message):
    value, place = _varint(message, place)
    values.append(_signed(value))
  return values


def _signed(value: int) -> int:
  return value - (1 << 64) if value >> 63 else value


def _shards(folder: pathlib.Path, splits: Sequence[str]) -> list[pathlib.Path]:
  """The shards of a split, all of them."""
  found = {}
  for path in folder.glob('*.array_record-*'):
    match = _SHARD.fullmatch(path.name)
    if match and match[1] in splits:
      found[int(match[2])] = path, int(match[3])
  if not found:
    raise DataError(
      f'{folder} has no shards of the split {" or ".join(splits)}: prepare it with '
      'tensorflow-datasets.'
    )
  (_, count), *_ = found.values()
  if absent := sorted(set(range(count)) - set(found)):
    raise DataError(
      f'{folder} lacks {len(absent)} of the {count} shards of the split '
      f'{splits[0]}, the first of them number {absent[0]}: get them too.'
    )
  return [path for _, (path, _) in sorted(found.items())]


def _source(paths: Sequence[pathlib.Path]) -> tuple[Any, list[int]]:
  """Random access to the records of shards, and how many each has."""
  try:
    from array_record.python import array_record_data_source, array_record_module
  except ModuleNotFoundError as error:
    raise DataError(
      f'reading array_record shards needs the package {error.name}: install it with '
      'pip install array_record, or give a tree of image files.'
    ) from error
  shards = []
  for path in paths:
    try:
      reader = array_record_module.ArrayRecordReader(str(path))
      count = reader.num_records()
      reason = '' if reader.ok() else 'its end is missing'
      reader.close()
    except RuntimeError as error:
      reason = _short(error)
    if reason:
      raise DataError(
        f'{path} is truncated or damaged ({reason}): get the shard again.'
      )
    shards.append(_Whole(str(path), count))
  counts = [shard.take for shard in shards]
  if not sum(counts):
    raise DataError(f'{paths[0].parent} has no records: get the shards again.')
  return array_record_data_source.ArrayRecordDataSource(shards), counts


class _Whole:
  """All records of a shard, so that it need not be opened to be counted."""

  skip = 0

  def __init__(self, filename: str, count: int):
    self.filename = filename
    self.take = self.examples_in_shard = count


def _class_names(folder: pathlib.Path) -> tuple[str, ...]:
  path = folder / LABELS
  try:
    names = path.read_text().split('\n')
  except OSError as error:
    raise DataError(
      f'{path} cannot be read ({error.strerror}): it has to hold the name of a class a '
      'line, as tensorflow-datasets writes it.'
    ) from error
  return tuple(name for name in names if name)


def _short(error: BaseException) -> str:
  return str(error).partition(';')[0]
