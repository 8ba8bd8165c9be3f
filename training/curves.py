"""The picture of a run: `curves.png`."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from training.problem import Score

FILE_NAME = 'curves.png'
# Of pictures that are drawn again and again while a run goes.
_LIVE_DPI = 90


def save_whole(figure: Any, path: pathlib.Path) -> None:
  """Writes a figure so that a reader finds a whole picture, old or new.

  Args:
    figure: a `matplotlib.figure.Figure`.
    path: of the PNG file.
  """
  temporary = path.with_name(f'{path.stem}.tmp{path.suffix}')
  figure.savefig(temporary, dpi=_LIVE_DPI)
  os.replace(temporary, path)


def label_plainly(axis: Any) -> None:
  """Labels a logarithmic axis with plain numbers, and only so many as have room.

  Args:
    axis: of matplotlib, with a logarithmic scale.
  """
  from matplotlib.ticker import LogFormatter

  class Plain(LogFormatter):
    """0.8 instead of 8e-01, of the ticks that LogFormatter labels."""

    def __call__(self, x, pos=None):
      return f'{x:g}' if super().__call__(x, pos) else ''

  axis.set_major_formatter('{x:g}')
  axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))


def save(
  workdir: pathlib.Path,
  lines: list[dict[str, Any]],
  title: str,
  score: Score,
  loss_name: str,
) -> None:
  """Draws loss and main score by epoch from the lines of `metrics.jsonl`."""
  # Slow to import, and needed once a run.
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(9, 3.4), layout='constrained')
  axes = figure.subplots(1, 2)
  for split, colour in (('train', 'C0'), ('test', 'C1')):
    chosen = [line for line in lines if line['split'] == split]
    epochs = [line['epoch'] for line in chosen]
    style = f'{colour}.-'  # Points too: one epoch is no line.
    axes[0].plot(epochs, [line['loss'] for line in chosen], style, label=split)
    values = [score.scale * line[score.name] for line in chosen]
    axes[1].plot(epochs, values, style, label=split)
    perturbed = [line['perturbed_loss'] for line in chosen]
    if split == 'train' and any(value is not None for value in perturbed):
      axes[0].plot(epochs, perturbed, f'{colour}.--', lw=1, label='train, perturbed')
  label = f'{score.label} ({score.unit})' if score.unit else score.label
  axes[0].set(xlabel='epoch', ylabel=loss_name, yscale='log')
  axes[1].set(xlabel='epoch', ylabel=label)
  label_plainly(axes[0].yaxis)
  axes[0].legend(frameon=False)
  axes[1].legend(frameon=False)
  figure.suptitle(title)
  for panel in axes:
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
  figure.savefig(workdir / FILE_NAME, dpi=120)
