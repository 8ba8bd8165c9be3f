"""Images in class folders, named by their number and read when they are wanted."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from input_pipelines.errors import DataError


class ImageFiles:
  """The files of a folder with one folder of images a class.

  Files are in the order of their classes, and of their names within a class. In memory
  a file takes the bytes of its name and eight more. Hidden files are left out.

  >>> import tempfile
  >>> folder = pathlib.Path(tempfile.mkdtemp())
  >>> for name in ('cat', 'dog'):
  ...   (folder / name).mkdir()
  ...   _ = (folder / name / '1.jpg').write_bytes(name.encode())
  >>> files = ImageFiles(folder)
  >>> files.classes, len(files), files.read(1)
  (('cat', 'dog'), 2, (b'dog', 1))
  """

  def __init__(self, folder: pathlib.Path, classes: Sequence[str] | None = None):
    """Lists the files.

    Args:
      folder: has a folder of images for each class.
      classes: those there have to be; by default the ones there are, of which there
        have to be two, in alphabetical order.

    Raises:
      DataError: a folder that cannot be read, a class without images, another class
        than those of `classes`, or what is neither a file nor a class.
    """
    self._folder = folder
    self.classes = tuple(classes or _classes(folder))
    if classes is not None:
      _compare(folder, _classes(folder), classes)
    names, counts = [], []
    for label in self.classes:
      found = _files(folder / label)
      counts.append(len(found))
      names.append(b''.join(found))
      names.append(np.array([len(name) for name in found], np.int64))
    self._names = b''.join(names[::2])
    self._ends = np.cumsum(np.concatenate(names[1::2]))
    self._first = np.cumsum([0, *counts])

  def __len__(self) -> int:
    """Number of images."""
    return len(self._ends)

  def read(self, index: int) -> tuple[bytes, int]:
    """The content and the label of a file.

    Raises:
      DataError: the file is gone, or cannot be read.
    """
    path = self._path(index)
    try:
      content = path.read_bytes()
    except OSError as error:
      raise DataError(
        f'{path} cannot be read ({error.strerror}): make it a readable image, or '
        'remove it and start anew.'
      ) from error
    return content, self._label(index)

  def name(self, index: int) -> str:
    """What an error calls a file: its path."""
    return str(self._path(index))

  def _path(self, index: int) -> pathlib.Path:
    start = self._ends[index - 1] if index else 0
    name = os.fsdecode(self._names[start : self._ends[index]])
    return self._folder / self.classes[self._label(index)] / name

  def _label(self, index: int) -> int:
    return int(np.searchsorted(self._first, index, side='right')) - 1


def _classes(folder: pathlib.Path) -> list[str]:
  """The class folders in a folder."""
  entries = _entries(folder)
  classes = sorted(entry.name for entry in entries if entry.is_dir())
  for entry in entries:
    if not entry.is_dir():
      raise DataError(
        f'{entry.path} lies beside the class folders: move it into one of them, or '
        'remove it.'
      )
  if len(classes) < 2:
    raise DataError(
      f'{folder} has {len(classes)} class folders: two or more are needed, each with '
      'the images of a class.'
    )
  return classes


def _compare(folder: pathlib.Path, found: list[str], wanted: Sequence[str]) -> None:
  """Checks that the classes found are those wanted."""
  for names, others, fault in (
    (found, wanted, 'has the class folder {}, which the training images have not'),
    (wanted, found, 'has no class folder {}, which the training images have'),
  ):
    if missing := sorted(set(names) - set(others)):
      raise DataError(
        f'{folder} {fault.format(missing[0])} ({len(missing)} such in all): add, '
        'rename or remove class folders, so that both have the same.'
      )


def _files(folder: pathlib.Path) -> list[bytes]:
  """The names of the files in a class folder, encoded as the system does."""
  entries = _entries(folder)
  for entry in entries:  # A pipe would wait for ever, a device never end.
    if not entry.is_file():
      raise DataError(f'{entry.path} is no file: remove it from the class folder.')
  if not entries:
    raise DataError(
      f'{folder} has no images: put some there, or remove the class everywhere.'
    )
  return sorted(os.fsencode(entry.name) for entry in entries)


def _entries(folder: pathlib.Path) -> list[os.DirEntry]:
  """What lies in a folder and is not hidden."""
  try:
    with os.scandir(folder) as entries:
      return [entry for entry in entries if not entry.name.startswith('.')]
  except OSError as error:
    raise DataError(
      f'{folder} cannot be read ({error.strerror}): it has to be a folder with the '
      'images of a class, or with a folder for each class.'
    ) from error
