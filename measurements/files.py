"""The files of a measurement: its results, and what a killed one need not repeat."""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sam_jax import curvature
from sam_jax.measuring.files import REPORT as REPORT
from sam_jax.measuring.files import SUMMARY as SUMMARY
from sam_jax.measuring.files import write_json
from training.errors import UsageError

FOLDER = 'hessian'
_PARTIAL, _LOCK = 'partial', '.lock'


def read(folder: pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished measurement in a folder, or None."""
  try:
    return json.loads((folder / SUMMARY).read_text())
  except (OSError, ValueError):
    return None


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder and keeps other processes out of it.

  Raises:
    UsageError: it cannot be written, or another process measures into it.
  """
  try:
    folder.mkdir(exist_ok=True, parents=True)
    lock = (folder / _LOCK).open('w')
  except OSError as error:
    raise UsageError(f'{folder} cannot be written ({error.strerror}).') from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UsageError(
        f'another process is measuring into {folder}: wait for its end.'
      ) from error
    yield
    (folder / _LOCK).unlink()


class Part(NamedTuple):
  """A finished part of a measurement.

  Attributes:
    value: Eigenpairs, or what JSON holds.
    seconds: wall time it took.
    num_matvecs: products it took.
  """

  value: Any
  seconds: float
  num_matvecs: int


class Parts:
  """The finished parts of a measurement, kept until all are.

  Attributes:
    folder: where they lie; journals and records of an unfinished part lie there too.
  """

  def __init__(self, folder: pathlib.Path, fingerprint: str, results: Iterable[str]):
    """Opens the folder; if it is that of another measurement, empties it.

    Args:
      folder: that of the measurement.
      fingerprint: what tells this measurement from others.
      results: names of the files that an older measurement may have left.
    """
    self.folder = folder / _PARTIAL
    stamp = self.folder / 'fingerprint'
    if not stamp.exists() or stamp.read_text() != fingerprint:
      shutil.rmtree(self.folder, ignore_errors=True)
      for name in (SUMMARY, REPORT, *results):
        (folder / name).unlink(missing_ok=True)
      self.folder.mkdir(parents=True)
      stamp.write_text(fingerprint)

  def load(self, name: str, like: Any) -> Part | None:
    """A part that was finished before, or None.

    Args:
      name: of the part.
      like: pytree with the structure of an eigenvector.
    """
    path = self.folder / f'{name}.json'
    if not path.exists():
      return None
    part = Part(**json.loads(path.read_text()))
    if self._arrays(name).exists():
      part = part._replace(value=curvature.load_eigenpairs(self._arrays(name), like))
    return part

  def save(self, name: str, part: Part) -> None:
    """Keeps a finished part; the products that it took are no longer needed."""
    if isinstance(part.value, curvature.Eigenpairs):
      part.value.save(self._arrays(name))
      part = part._replace(value=None)
    write_json(self.folder / f'{name}.json', part._asdict())
    for journal in self.folder.glob(f'{name}*.journal'):
      journal.unlink()

  def journal(self, name: str) -> pathlib.Path:
    """Where the products of a part are recorded."""
    return self.folder / f'{name}.journal'

  def record(self, name: str) -> pathlib.Path:
    """Where the points of a landscape are recorded."""
    return self.folder / f'{name}.record'

  def remove(self) -> None:
    """Removes everything; the summary is written."""
    shutil.rmtree(self.folder)

  def _arrays(self, name: str) -> pathlib.Path:
    return self.folder / f'{name}.npz'
