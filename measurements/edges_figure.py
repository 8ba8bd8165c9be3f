"""The figure of the edge of stability: sharpness and edges, losses, alignments."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from training import curves

_WIDTH, _HEIGHT = 7.0, 7.5


def save(path: pathlib.Path, lines: Sequence[dict[str, Any]], title: str) -> None:
  """Draws the lines of a tracker so that a reader finds a whole picture, old or new.

  Args:
    path: of the PNG file.
    lines: as `measurements.edges` writes them.
    title: above the figure.
  """
  curves.save_whole(draw(lines, title), path)


def draw(lines: Sequence[dict[str, Any]], title: str) -> Any:
  """The figure, a `matplotlib.figure.Figure`.

  Args:
    lines: as `measurements.edges` writes them.
    title: above the figure.
  """
  from matplotlib.figure import Figure  # Slow to import.

  figure = Figure(figsize=(_WIDTH, _HEIGHT), layout='constrained')
  sharpness, losses, alignments = figure.subplots(
    3, 1, sharex=True, height_ratios=(3, 2, 2)
  )
  steps = [line['step'] for line in lines]
  plot = _Plot(lines, steps)
  adam = 'preconditioned_lambda_max' in lines[-1]
  if adam:
    name, label = 'preconditioned_lambda_max', 'sharpness as Adam sees it'
    plot(sharpness, name, label, 'C0.-')
  else:
    plot(sharpness, 'operator_norm', 'operator norm of the Hessian', 'C0.-')
  plot(sharpness, 'edge', 'edge of the base optimizer', 'k--')
  plot(sharpness, 'sam_edge', 'SAM-edge', 'C3-')
  sharpness.set(yscale='log', ylabel='eigenvalue')
  curves.label_plainly(sharpness.yaxis)
  plot(losses, 'loss', 'loss', 'C0-')
  plot(losses, 'gradient_norm', 'gradient norm', 'C1--')
  losses.set(yscale='log')
  curves.label_plainly(losses.yaxis)
  plot(alignments, 'gradient_alignment', 'clean gradient', 'C0.-')
  clean, update = (
    [line.get(f'{of}_alignment') for line in lines] for of in ('gradient', 'update')
  )
  if clean != update:
    plot(alignments, 'update_alignment', 'gradient of the update', 'C3.-')
  alignments.set(ylim=(0, 1.02), ylabel='|cos| with\ntop eigenvector', xlabel='step')
  for panel in (sharpness, losses, alignments):
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
  figure.suptitle(title)
  return figure


class _Plot:
  """Draws one quantity of the lines over the steps, where it was ever measured."""

  def __init__(self, lines: Sequence[dict[str, Any]], steps: Sequence[int]):
    self._lines, self._steps = lines, steps

  def __call__(self, axes: Any, name: str, label: str, style: str) -> None:
    values = [line.get(name) for line in self._lines]
    if any(value is not None for value in values):
      values = [float('nan') if value is None else value for value in values]
      axes.plot(self._steps, values, style, label=label, linewidth=1, markersize=3)
