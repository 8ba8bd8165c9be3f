"""The files of a folder, a tar or a zip archive, read without extracting anything."""

import contextlib
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

from input_pipelines.errors import DataError

# Name inside the tree, and what reads the file's content; None for a folder.
Entry = tuple[str, Callable[[], bytes] | None]

# What file managers leave behind.
_HIDDEN = ('.', '__MACOSX', 'Thumbs.db', 'desktop.ini')


@contextlib.contextmanager
def entries(path: pathlib.Path) -> Iterator[Iterator[Entry]]:
  """Gives all files and folders of a tree but hidden ones, to be read in their order.

  Args:
    path: a folder, or a tar (compressed or not) or zip file.

  Raises:
    DataError: inside the `with` block too, where the tree cannot be read.

  >>> with entries(pathlib.Path(__file__).parent) as tree:
  ...   names = [name for name, read in tree if read]
  >>> 'trees.py' in names
  True
  """
  try:
    yield (entry for entry in _walk(path) if not _is_hidden(entry[0]))
  except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
    reason = str(error).partition(':')[0]  # Not what each of tar's readers says.
    raise DataError(
      f'{path} is not a complete archive ({reason}): get it again.'
    ) from error
  except (OSError, RuntimeError) as error:
    reason = getattr(error, 'strerror', None) or error
    where = getattr(error, 'filename', None) or path
    raise DataError(
      f'{where} cannot be read ({reason}): make it readable, or a complete archive.'
    ) from error


def _is_hidden(name: str) -> bool:
  return any(part.startswith(_HIDDEN) for part in name.split('/'))


def _walk(path: pathlib.Path) -> Iterator[Entry]:
  if path.is_dir():
    for below in sorted(path.rglob('*')):
      read = None if below.is_dir() else _reader(_read_regular, below)
      yield below.relative_to(path).as_posix(), read
  elif path.suffix == '.zip' or zipfile.is_zipfile(path):
    yield from _walk_zip(path)
  else:
    yield from _walk_tar(path)


def _walk_zip(path: pathlib.Path) -> Iterator[Entry]:
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():
      read = None if member.is_dir() else _reader(archive.read, member)
      yield member.filename.rstrip('/'), read


def _walk_tar(path: pathlib.Path) -> Iterator[Entry]:
  with tarfile.open(path) as archive:
    for member in archive:
      if member.isfile() or member.isdir():
        name = member.name.removeprefix('./')
        file = None if member.isdir() else archive.extractfile(member)
        yield name, file and file.read


def _read_regular(path: pathlib.Path) -> bytes:
  """A file's content; a pipe would wait for ever, a device never end."""
  if path.exists() and not path.is_file():
    raise DataError(f'{path} is a pipe or a device, not a file: remove it.')
  return path.read_bytes()


def _reader(read: Callable[..., bytes], member: object) -> Callable[[], bytes]:
  return lambda: read(member)
