"""Data sets whose examples are equal-sized arrays, as they are prepared and read."""

import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from input_pipelines.errors import DataError

_CLASSES = 'classes'
# What NumPy lets through of damaged archives.
_BROKEN = (zipfile.BadZipFile, zlib.error)


class LabelledArrays(NamedTuple):
  """The parts of a set.

  Attributes:
    parts: by name, `inputs` of shape `(n, ...)`, int64 `labels` `(n,)` and, where a set
      has them, further arrays of n rows. All parts have the same arrays.
    classes: name of each class.
  """

  parts: Mapping[str, Mapping[str, np.ndarray]]
  classes: tuple[str, ...]


def save(path: pathlib.Path, data: LabelledArrays) -> None:
  """Writes a set as one npz file, with the arrays `PART/NAME` and `classes`."""
  arrays = {
    f'{part}/{name}': array
    for part, found in data.parts.items()
    for name, array in found.items()
  }
  np.savez_compressed(path, **arrays, **{_CLASSES: np.array(data.classes)})


def load(
  path: pathlib.Path,
  forms: Sequence[tuple[str, ...]],
  classes: tuple[str, ...],
  *,
  like: np.ndarray,
) -> LabelledArrays:
  """Reads and validates a set that `save` wrote.

  Args:
    path: the npz file.
    forms: the names of the parts it may have, in alphabetical order.
    classes: the classes it has to have.
    like: has the shape and the dtype of an example's inputs.

  Raises:
    DataError: it is damaged, or not such a set.
  """
  try:
    with path.open('rb') as file, np.load(file) as archive:
      arrays = {name: archive[name] for name in archive.files}
  except (OSError, ValueError, TypeError, EOFError, *_BROKEN) as error:
    raise _damaged(path, 'it is no complete npz file') from error
  if tuple(arrays.pop(_CLASSES, np.array([])).ravel().tolist()) != classes:
    raise _damaged(path, f'its classes are not {", ".join(classes)}')
  parts: dict[str, dict[str, np.ndarray]] = {}
  for key, array in arrays.items():
    part, _, name = key.partition('/')
    parts.setdefault(part, {})[name] = array
  if tuple(sorted(parts)) not in forms:
    wanted = ' or '.join(' and '.join(form) for form in forms)
    raise _damaged(path, f'it has the parts {", ".join(parts)}, not {wanted}')
  for part, found in parts.items():
    _check(path, part, found, like, len(classes))
    found['labels'] = found['labels'].astype(np.int64)
  return LabelledArrays(parts, classes)


def _check(
  path: pathlib.Path,
  part: str,
  arrays: Mapping[str, np.ndarray],
  like: np.ndarray,
  num_classes: int,
) -> None:
  """Checks the arrays of one part."""
  if not {'inputs', 'labels'} <= set(arrays):
    raise _damaged(path, f'{part} has no inputs and labels')
  inputs, labels = arrays['inputs'], arrays['labels']
  if inputs.shape[1:] != like.shape or inputs.dtype != like.dtype:
    raise _damaged(
      path,
      f'{part}/inputs is {inputs.dtype}{list(inputs.shape)}, an example has to be '
      f'{like.dtype}{list(like.shape)}',
    )
  if labels.ndim != 1:
    raise _damaged(path, f'{part}/labels has the shape {list(labels.shape)}, not [n]')
  lengths = {array.shape[:1] for array in arrays.values()}
  if lengths != {labels.shape} or not len(labels):
    raise _damaged(path, f'the arrays of {part} are empty or differ in length')
  if not np.isfinite(inputs).all():
    raise _damaged(path, f'{part}/inputs has a value that is not finite')
  if labels.dtype.kind not in 'iu' or labels.min() < 0 or labels.max() >= num_classes:
    raise _damaged(path, f'{part}/labels are not whole numbers below {num_classes}')


def _damaged(path: pathlib.Path, problem: str) -> DataError:
  return DataError(f'{path}: {problem}; write it again, or remove it.')
