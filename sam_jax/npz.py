"""Reading of npz files that this package wrote."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def read(
  path: str | os.PathLike[str], names: tuple[str, ...], writer: str
) -> Iterator[np.lib.npyio.NpzFile]:
  """The arrays of an npz file.

  Args:
    path: the file.
    names: of arrays that it must hold.
    writer: what writes such files, for the error.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is of another kind, damaged, or lacks one of the arrays.
  """
  with open(path, 'rb') as file:
    try:
      arrays = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
      raise _foreign(path, writer) from error
    found = arrays.files if isinstance(arrays, np.lib.npyio.NpzFile) else ()
    if not set(names) <= set(found):
      raise _foreign(path, writer)
    yield arrays


def _foreign(path: str | os.PathLike[str], writer: str) -> ValueError:
  return ValueError(
    f'{os.fspath(path)} is damaged, or no file that {writer} wrote: give one of those'
  )
