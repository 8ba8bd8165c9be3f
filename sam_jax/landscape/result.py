"""Landscapes as files: npz of our own, VTK for ParaView."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from sam_jax import npz
from sam_jax.landscape import vtk


@dataclasses.dataclass(frozen=True)
class Landscape:
  """The loss on a line or on a grid through the parameters.

  Attributes:
    x: float64 (nx,), coordinates along the first direction, in its own length.
    y: float64 (ny,), along the second direction; None on a line.
    loss: float64 (nx,) on a line, (ny, nx) on a surface; may hold infinity or NaN.
    labels: what the directions are, for the axes of a figure.
    value: what ``loss`` holds: 'loss', or '|lambda_min/lambda_max|' of `eigen_ratio`.
    path: float64 (t, 2), coordinates of a trajectory on the surface; None without one.
    explained: the share of the trajectory's variance that each direction explains;
      empty without one.

  >>> import numpy as np
  >>> x = np.linspace(-1, 1, 3)
  >>> Landscape(x, x, x[:, None] ** 2 + x ** 2).loss.tolist()
  [[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]
  """

  x: np.ndarray
  y: np.ndarray | None
  loss: np.ndarray
  labels: tuple[str, ...] = ('direction 1', 'direction 2')
  value: str = 'loss'
  path: np.ndarray | None = None
  explained: tuple[float, ...] = ()

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes an npz file that `load` reads."""
    arrays = {
      'x': self.x,
      'loss': self.loss,
      'labels': np.array(self.labels),
      'value': np.array(self.value),
      'explained': np.array(self.explained, np.float64),
    }
    if self.y is not None:
      arrays['y'] = self.y
    if self.path is not None:
      arrays['path'] = self.path
    np.savez(path, **arrays)

  def save_vtk(self, path: str | os.PathLike[str]) -> None:
    """Writes a legacy ASCII VTK file, which ParaView opens.

    A surface is a structured grid, a line a polyline; z is the value. Point data are
    ``loss``, the value, and ``log_loss``, its logarithm to base 10, if any value is
    positive; the others take that of the smallest positive one. What is not finite is
    written as the largest finite value, and as 0 where nothing is finite.

    Args:
      path: the file, by custom ``*.vtk``.

    >>> import numpy as np, pathlib, tempfile
    >>> item = Landscape(np.arange(2.), None, np.array([1., 100.]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   item.save_vtk(f'{folder}/line.vtk')
    ...   print(pathlib.Path(folder, 'line.vtk').read_text().splitlines()[3:7])
    ['DATASET POLYDATA', 'POINTS 2 double', '0.0 0.0 1.0', '1.0 0.0 100.0']
    """
    title = f'{self.value} over {", ".join(self.labels)}'
    vtk.write(path, self.x, self.y, self.loss, title)


def load(path: str | os.PathLike[str]) -> Landscape:
  """Reads a landscape that `Landscape.save` wrote, of this version or an older one.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no such file.

  >>> import numpy as np, tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   Landscape(np.arange(2.), None, np.ones(2)).save(f'{folder}/line.npz')
  ...   load(f'{folder}/line.npz').loss.tolist()
  [1.0, 1.0]
  """
  # Older versions named the ratio without saying that it is absolute.
  names = {'lambda_min/lambda_max': '|lambda_min/lambda_max|'}
  with npz.read(path, ('x', 'loss', 'labels'), 'Landscape.save') as arrays:
    value = str(arrays.get('value', 'loss'))
    return Landscape(
      x=arrays['x'],
      y=arrays.get('y'),
      loss=arrays['loss'],
      labels=tuple(str(label) for label in arrays['labels']),
      value=names.get(value, value),
      path=arrays.get('path'),
      explained=tuple(float(share) for share in arrays.get('explained', ())),
    )
