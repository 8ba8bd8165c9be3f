"""Where a data set comes from: prepared, the user's own file, or its publisher."""

import contextlib
import hashlib
import importlib
import os
import pathlib
import re
import shutil
import socket
import tempfile
import threading
import types
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from input_pipelines import bars
from input_pipelines.errors import DataError

_VERSION = '1.0.0'

# Seconds for a first connection to a publisher, and for each answer after it.
_CONNECT_SECONDS = 0.8
_ANSWER_SECONDS = 30.0


class Source(NamedTuple):
  """The sources of one data set.

  Attributes:
    name: the set's name, that of its prepared folder too.
    files: what `manual_dir` may hold, in order of preference: each a tuple of the
      files or folders that make up the set together.
    url: the publisher's address of the first file of the first of `files`, beside which
      its others lie; '' where there is none.
    parse: reads and validates the files, `parse(*paths) -> data`.
    builder: name of the module `KIND_builder`, whose sets lie in the folder KIND, with
      `prepare(data_dir, name, data, sha256) -> folder`, `read(folder) -> data` and
      `digest(folder) -> sha256`.
  """

  name: str
  files: Sequence[tuple[str, ...]]
  url: str
  parse: Callable[..., Any]
  builder: str


def load(source: Source, *, data_dir: str = '', manual_dir: str = '') -> Any:
  """Loads a data set from the first source that has it.

  In order: the set prepared in `data_dir`; the publisher's files in `manual_dir`; a
  download. Files in `manual_dir` that differ from those the prepared set was made from
  take its place, once they have been found to be whole. An npz file is read as it is,
  and so is every file where tensorflow-datasets or array_record is not installed: then
  nothing is prepared, and a download is kept in `manual_dir`.

  Args:
    source: what to look for.
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder with the files; by default `downloads/manual` in `data_dir`.

  Returns:
    The data, as `source.builder` reads them, or `source.parse`.

  Raises:
    DataError: there is no source, the data are damaged, or they are there only as a
      prepared set and the packages that read it are not installed.
  """
  root, manual = _folders(data_dir, manual_dir)
  builder = _Builder(source.builder)
  prepared = root / source.builder.rpartition('.')[2].removesuffix('_builder')
  prepared = prepared / source.name / _VERSION
  paths = _present(source, manual)
  if paths and paths[0].suffix == '.npz':
    return source.parse(*paths)
  if not paths and not prepared.exists():
    with _download(source, root, manual) as found:
      if builder.usable():
        return _prepare(source, found, _digest(found), builder, prepared)
      return _keep(source, found, manual)
  if paths:
    if not builder.usable():
      return source.parse(*paths)
    digest = _digest(paths)
    if _prepared_digest(builder, prepared) != digest:
      return _prepare(source, paths, digest, builder, prepared)
  return _read(builder, prepared)


def own(
  path: pathlib.Path, files: Sequence[tuple[str, ...]], parse: Callable[..., Any]
) -> Source:
  """The source of a user's own labelled arrays, which lie where they say.

  Args:
    path: the folder or file. Its place is part of the name of the prepared set, so that
      two of one name do not take each other's.
    files: the forms, as paths below `path` ('' for itself).
    parse: reads and validates the files, `parse(*paths) -> LabelledArrays`.

  Raises:
    DataError: there is no such path.
  """
  path = path.expanduser().absolute()
  if not path.exists():
    raise DataError(f'dataset={path}: there is no such folder or file.')
  place = hashlib.sha256(str(path).encode()).hexdigest()[:12]
  word = re.sub(r'\W', '_', path.name, flags=re.ASCII)
  return Source(
    name=f'own_{word}_{place}',
    files=[tuple(str(path / file) for file in form) for form in files],
    url='',
    parse=parse,
    builder='input_pipelines.labelled_arrays_builder',
  )


def _folders(data_dir: str, manual_dir: str) -> tuple[pathlib.Path, pathlib.Path]:
  """Applies TFDS's own defaults, without importing it."""
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  root = pathlib.Path(data_dir or default).expanduser()
  if manual_dir:
    return root, pathlib.Path(manual_dir).expanduser()
  return root, root / 'downloads' / 'manual'


def _present(source: Source, manual_dir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of the first form that `manual_dir` has, else nothing."""
  for form in source.files:
    paths = [manual_dir / file for file in form]
    there = [path.exists() for path in paths]
    for path in paths:  # A pipe would wait for ever, a device never end.
      if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f'{path} is a pipe or a device, not a file: remove it.')
    if all(there):
      return paths
    if any(there):
      missing = paths[there.index(False)]
      raise DataError(
        f'{missing} is missing beside {paths[there.index(True)].name}: put it there, '
        'they make up the set together.'
      )
  return []


def _digest(paths: Sequence[pathlib.Path]) -> str:
  """Returns a digest of files' contents, and of folders' names, sizes and times.

  Raises:
    DataError: a file cannot be read.
  """
  digests = []
  for path in paths:
    try:
      digests.append(_tree_digest(path) if path.is_dir() else _file_digest(path))
    except OSError as error:
      raise DataError(
        f'{error.filename or path} cannot be read ({error.strerror}): make it a '
        'readable file, or remove it.'
      ) from error
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256(' '.join(digests).encode()).hexdigest()


def _file_digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _tree_digest(folder: pathlib.Path) -> str:
  digest = hashlib.sha256()
  for path in sorted(folder.rglob('*')):
    status = path.stat()
    line = f'{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n'
    digest.update(line.encode())
  return digest.hexdigest()


class _Builder:
  """A builder module, imported when it is needed: TFDS is slow to import."""

  def __init__(self, name: str):
    self._name = name

  def usable(self) -> bool:
    """Tells whether the packages are installed that write and read prepared sets."""
    try:
      importlib.import_module(self._name)
    except ModuleNotFoundError:
      return False
    return True

  def __call__(self) -> types.ModuleType:
    try:
      return importlib.import_module(self._name)
    except ModuleNotFoundError as error:
      raise DataError(
        f'reading a prepared data set needs the package {error.name}: install the '
        'requirements with pip install -r requirements.txt, or put the files of the '
        'set into the folder that --manual_dir names.'
      ) from error


def _keep(
  source: Source, paths: Sequence[pathlib.Path], manual_dir: pathlib.Path
) -> Any:
  """Reads a download and, once it has proved whole, keeps it in `manual_dir`."""
  data = source.parse(*paths)
  try:
    manual_dir.mkdir(parents=True, exist_ok=True)
    for path in paths:
      shutil.move(path, manual_dir / path.name)
  except OSError as error:
    raise DataError(
      f'{manual_dir} cannot be written ({error.strerror}): give another folder with '
      '--manual_dir.'
    ) from error
  return data


def _prepared_digest(builder: _Builder, prepared: pathlib.Path) -> str | None:
  """Returns the digest a prepared set was made from, None if there is no set."""
  if not prepared.exists():
    return None
  try:
    return builder().digest(prepared)
  except (OSError, ValueError, KeyError):
    return None  # Damaged; files at hand take its place.


def _read(builder: _Builder, prepared: pathlib.Path) -> Any:
  """Reads a prepared set."""
  module = builder()
  try:
    return module.read(prepared)
  # What TFDS and array_record raise on damaged files is not documented.
  except Exception as error:
    raise DataError(
      f'the prepared set in {prepared} cannot be read ({type(error).__name__}): '
      'delete that folder, and it is made again.'
    ) from error


def _prepare(
  source: Source,
  paths: Sequence[pathlib.Path],
  digest: str,
  builder: _Builder,
  prepared: pathlib.Path,
) -> Any:
  """Validates files, prepares the set from them, and reads the set.

  The set is written to a folder beside its place and then renamed, so what is
  prepared already stays until the new one is complete.
  """
  data = source.parse(*paths)
  module = builder()
  try:
    prepared.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prepared.parent, prefix='.new-') as new:
      written = module.prepare(pathlib.Path(new), source.name, data, digest)
      if prepared.exists():
        prepared.rename(pathlib.Path(new) / 'old')
      written.rename(prepared)
  except OSError as error:
    raise DataError(
      f'{prepared} cannot be written ({error.strerror}): give another folder with '
      '--data_dir.'
    ) from error
  return _read(builder, prepared)


@contextlib.contextmanager
def _download(
  source: Source, data_dir: pathlib.Path, manual_dir: pathlib.Path
) -> Iterator[list[pathlib.Path]]:
  """Downloads the first form of a set to temporary files."""
  forms = ' or '.join(' + '.join(form) for form in source.files)
  folder = f'{manual_dir}{"" if manual_dir.is_dir() else ", which is no folder"}'
  absent = f'{forms} is not in {folder}, there is no prepared set in {data_dir}'
  if not source.url:
    raise DataError(f'{absent}: put it there or set --manual_dir to its folder.')
  urls = [urllib.parse.urljoin(source.url, file) for file in source.files[0]]
  urls[0] = source.url
  wanted = ' and '.join(urls)
  advice = f'download {wanted} to {manual_dir}/ or set --manual_dir to its folder.'
  if not _answers(source.url):
    raise DataError(f'{absent}, and its publisher cannot be reached: {advice}')
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder) / file for file in source.files[0]]
    for url, path in zip(urls, paths, strict=True):
      _fetch(url, path, source.name, advice)
    yield paths


def _fetch(url: str, path: pathlib.Path, name: str, advice: str) -> None:
  """Downloads one file."""
  try:
    with (
      urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as response,
      bars.reading(response, _length(response), path.name) as visible,
      path.open('wb') as file,
    ):
      shutil.copyfileobj(visible, file)
  except urllib.error.HTTPError as error:
    raise DataError(
      f'the publisher has no {url} (HTTP {error.code}): check the spelling of '
      f'{name!r}, or {advice}'
    ) from error
  except OSError as error:
    raise DataError(f'the download of {url} failed ({error}): {advice}') from error


def _length(response: Any) -> int | None:
  """Returns how many bytes an answer has, None if the publisher does not say."""
  return int(response.headers.get('Content-Length', 0)) or None


def _answers(url: str) -> bool:
  """Tells in under a second whether a publisher, or the proxy, is there."""
  target = urllib.parse.urlsplit(url)
  proxy = urllib.request.getproxies().get(target.scheme)
  if proxy and not urllib.request.proxy_bypass(target.hostname):
    target = urllib.parse.urlsplit(proxy if '//' in proxy else f'//{proxy}')
  answered = threading.Event()

  def connect() -> None:
    with contextlib.suppress(OSError):
      address = target.hostname, target.port or 443
      socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
      answered.set()

  # A thread, because looking up the host's name obeys no timeout.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(_CONNECT_SECONDS)
  return answered.is_set()
