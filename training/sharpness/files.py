"""The files of a measurement: its results, and what a killed one need not repeat."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sam_jax import curvature
from training.config import write_json
from training.errors import UsageError

FOLDER = 'hessian'
SUMMARY, SPECTRUM = 'summary.json', 'spectrum.npz'
LANDSCAPE, EIGEN_RATIO, LINE = 'landscape.npz', 'eigen_ratio.npz', 'line.npz'
DENSITY_FIGURE, LANDSCAPE_FIGURE = 'spectral_density.png', 'landscape.png'
EIGEN_RATIO_FIGURE, LINE_FIGURE = 'eigen_ratio.png', 'line.png'
LANDSCAPE_VTK = 'landscape.vtk'
FIGURES = (DENSITY_FIGURE, LANDSCAPE_FIGURE, EIGEN_RATIO_FIGURE, LINE_FIGURE)
_RESULTS = (
  *FIGURES,
  SUMMARY,
  SPECTRUM,
  LANDSCAPE,
  EIGEN_RATIO,
  LINE,
  LANDSCAPE_VTK,
  'report.html',
)
_PARTIAL, _LOCK = 'partial', '.lock'
_DENSITY = [field.name for field in dataclasses.fields(curvature.SpectralDensity)]


def read(folder: pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished measurement in a folder, or None."""
  try:
    return json.loads((folder / SUMMARY).read_text())
  except (OSError, ValueError):
    return None


def save_spectrum(
  path: pathlib.Path, density: curvature.SpectralDensity, **more: np.ndarray
) -> None:
  """Writes a spectral density, with more arrays beside it."""
  np.savez(path, **more, **dataclasses.asdict(density))


def read_density(path: pathlib.Path) -> curvature.SpectralDensity:
  """The spectral density that `save_spectrum` wrote."""
  with np.load(path) as arrays:
    values = {name: arrays[name] for name in _DENSITY}
  return curvature.SpectralDensity(
    **{name: value if value.ndim else value.item() for name, value in values.items()}
  )


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder, empties it of older results, and keeps other processes out.

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
    for name in _RESULTS:
      (folder / name).unlink(missing_ok=True)
    yield
    (folder / _LOCK).unlink()


class Part(NamedTuple):
  """A finished part of a measurement.

  Attributes:
    value: Eigenpairs, a SpectralDensity, or what JSON holds.
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

  def __init__(self, folder: pathlib.Path, fingerprint: str, like: Any):
    """Opens the folder, emptied if it is that of another measurement.

    Args:
      folder: that of the measurement.
      fingerprint: what tells this measurement from others.
      like: pytree with the structure of an eigenvector.
    """
    self.folder = folder / _PARTIAL
    self._like = like
    stamp = self.folder / 'fingerprint'
    if not stamp.exists() or stamp.read_text() != fingerprint:
      shutil.rmtree(self.folder, ignore_errors=True)
      self.folder.mkdir(parents=True)
      stamp.write_text(fingerprint)

  def load(self, name: str) -> Part | None:
    """A part that was finished before, or None."""
    path = self.folder / f'{name}.json'
    if not path.exists():
      return None
    entry = json.loads(path.read_text())
    kind, value = entry.pop('kind'), entry.pop('value')
    if kind == 'eigenpairs':
      value = curvature.load_eigenpairs(self._arrays(name), self._like)
    elif kind == 'density':
      value = read_density(self._arrays(name))
    return Part(value, **entry)

  def save(self, name: str, part: Part) -> None:
    """Keeps a finished part; the products that it took are no longer needed."""
    kind, value = 'plain', part.value
    if isinstance(value, curvature.Eigenpairs):
      value.save(self._arrays(name))
      kind, value = 'eigenpairs', None
    elif isinstance(value, curvature.SpectralDensity):
      save_spectrum(self._arrays(name), value)
      kind, value = 'density', None
    write_json(
      self.folder / f'{name}.json',
      {**part._asdict(), 'kind': kind, 'value': value},
    )
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
