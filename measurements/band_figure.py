"""The figure of a quantity that is tracked with an error, and of its edges."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from training import curves

_WIDTH, _HEIGHT = 7.0, 4.0


class Band(NamedTuple):
  """A quantity of the lines with its standard error.

  Attributes:
    name: of its entry.
    error: name of the entry of its standard error.
    label: in the legend.
    color: of the curve.
    half_width: of its band of 95 % in standard errors: the quantile of the normal
      distribution, or of Student's t where few values make an error.
  """

  name: str
  error: str
  label: str
  color: str
  half_width: float = 1.96


class Edge(NamedTuple):
  """An edge that a quantity is compared with.

  Attributes:
    name: of its entry.
    label: in the legend.
    style: of its line.
  """

  name: str
  label: str
  style: str


def save(path: pathlib.Path, *args: Any, **keywords: Any) -> None:
  """Draws a figure so that a reader finds a whole picture, old or new.

  Args:
    path: of the PNG file.
    *args: of `draw`.
    **keywords: of `draw`.
  """
  curves.save_whole(draw(*args, **keywords), path)


def draw(
  lines: Sequence[dict[str, Any]],
  bands: Sequence[Band],
  edges: Sequence[Edge],
  *,
  ylabel: str,
  title: str,
) -> Any:
  """The figure, a `matplotlib.figure.Figure`.

  Args:
    lines: of one tracker, by step.
    bands: the quantities; what is None in a line leaves a gap.
    edges: what they are compared with.
    ylabel: name of the quantities.
    title: above the figure.
  """
  from matplotlib.figure import Figure  # Slow to import.

  figure = Figure(figsize=(_WIDTH, _HEIGHT), layout='constrained')
  axes = figure.subplots()
  steps = [line['step'] for line in lines]
  for band in bands:
    values, errors = (_column(lines, name) for name in (band.name, band.error))
    half = band.half_width * np.nan_to_num(errors)
    axes.plot(
      steps, values, f'{band.color}.-', label=band.label, linewidth=1, markersize=3
    )
    axes.fill_between(
      steps, values - half, values + half, color=band.color, alpha=0.2, linewidth=0
    )
  for edge in edges:
    values = _column(lines, edge.name)
    axes.plot(steps, values, edge.style, label=edge.label, linewidth=1)
  axes.set(yscale='log', xlabel='step', ylabel=ylabel)
  curves.label_plainly(axes.yaxis)
  axes.grid(alpha=0.3)
  axes.legend(frameon=False, fontsize=8)
  figure.suptitle(title)
  return figure


def _column(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
  return np.array([line.get(name) for line in lines], float)
