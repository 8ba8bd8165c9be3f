"""Landscapes as legacy ASCII VTK files, version 3.0 of the format."""

from __future__ import annotations

import os
import pathlib

import numpy as np


def write(
  path: str | os.PathLike[str],
  x: np.ndarray,
  y: np.ndarray | None,
  loss: np.ndarray,
  title: str,
) -> None:
  """Writes a surface as a structured grid, or without y a line as a polyline."""
  values = _finite(loss)
  count = values.size
  if y is None:
    y = np.zeros(count)
    head = ['DATASET POLYDATA']
    tail = [f'LINES 1 {count + 1}', ' '.join(map(str, [count, *range(count)]))]
  else:
    head = ['DATASET STRUCTURED_GRID', f'DIMENSIONS {len(x)} {len(y)} 1']
    x, y = (grid.ravel() for grid in np.meshgrid(x, y))
    tail = []
  points = [f'{a!r} {b!r} {c!r}' for a, b, c in np.stack([x, y, values], 1).tolist()]
  lines = ['# vtk DataFile Version 3.0', _title(title), 'ASCII', *head]
  lines += [f'POINTS {count} double', *points, *tail, f'POINT_DATA {count}']
  lines += _scalars('loss', values)
  if values.max(initial=0.0) > 0:
    smallest = values[values > 0].min()
    lines += _scalars('log_loss', np.log10(np.maximum(values, smallest)))
  pathlib.Path(path).write_text('\n'.join(lines) + '\n', encoding='ascii')


def _finite(loss: np.ndarray) -> np.ndarray:
  """The values one after the other, what is not finite as the largest that is."""
  values = np.asarray(loss, np.float64).ravel()
  finite = np.isfinite(values)
  return np.where(finite, values, values[finite].max() if finite.any() else 0.0)


def _title(title: str) -> str:
  """What the file shows, in the 255 characters that a title may have."""
  return ' '.join(title.encode('ascii', 'replace').decode().split())[:255]


def _scalars(name: str, values: np.ndarray) -> list[str]:
  lines = [f'SCALARS {name} double 1', 'LOOKUP_TABLE default']
  return lines + [repr(value) for value in values.tolist()]
