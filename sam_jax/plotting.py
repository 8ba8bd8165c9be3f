"""Figures of result objects. Needs matplotlib, which is imported when one is drawn.

Every figure is a `matplotlib.figure.Figure` of its own: save it with ``savefig``. No
global state is touched and no display is needed. All can be read without colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from sam_jax.curvature import density as density_lib
from sam_jax.landscape import Landscape

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Kind = Literal['contour', 'surface', 'heatmap']
_STYLES = ('-', '--', '-.', ':')
_COLORS = ('#1f4e79', '#c05a00', '#2f7d4f', '#7a3b8f', '#8c8c8c')
_NUM_LEVELS = 12


def spectral_density(
  result: density_lib.SpectralDensity | Mapping[str, density_lib.SpectralDensity],
  *,
  title: str = '',
) -> Figure:
  """The density of eigenvalues on a log scale, its band and the outliers.

  Args:
    result: a density, or several by name: then side by side, with shared axes.
    title: above the figure.

  Returns:
    The figure.
  """
  panels = result if isinstance(result, Mapping) else {'': result}
  figure = _figure(1 + 4.6 * len(panels), 3.6)
  axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
  # One eigenvalue alone makes a bump of this height.
  floor = min(0.4 / (d.size * d.sigma) for d in panels.values())
  for index, (ax, (name, density)) in enumerate(zip(axes, panels.items(), strict=True)):
    color = _COLORS[index % len(_COLORS)]
    ax.fill_between(
      density.grid,
      density.lower,
      density.upper,
      color=color,
      alpha=0.3,
      linewidth=0,
      label='95 % band over probes',
    )
    ax.plot(density.grid, density.density, color=color, linewidth=1.3)
    ax.plot(
      density.outliers,
      np.full(len(density.outliers), 0.35 * floor),
      'v',
      color='black',
      markersize=5,
      clip_on=False,
      label=f'{len(density.outliers)} converged eigenvalues',
    )
    ax.axvline(0, color='0.6', linewidth=0.6, linestyle=':')
    ax.set_yscale('log')
    ax.set_xlabel('eigenvalue')
    ax.set_title(name)
    ax.legend(fontsize=8, frameon=False)
  top = max(d.density.max() for d in panels.values())
  axes[0].set_ylim(0.3 * floor, 3 * top)
  axes[0].set_ylabel('density')
  figure.suptitle(title)
  return figure


def landscape(
  result: Landscape | Mapping[str, Landscape],
  kind: Kind = 'contour',
  *,
  title: str = '',
) -> Figure:
  """The loss along one or two directions.

  Args:
    result: a landscape, or several by name: surfaces stand side by side with shared
      axes and levels, lines in one picture.
    kind: how surfaces are drawn: 'contour', 'surface' (in perspective) or 'heatmap'.
    title: above the figure.

  Returns:
    The figure.

  Raises:
    ValueError: an unknown kind, or lines mixed with surfaces.
  """
  panels = result if isinstance(result, Mapping) else {'': result}
  lines = [item.y is None for item in panels.values()]
  if any(lines) and not all(lines):
    raise ValueError('result mixes lines and surfaces: draw them apart')
  if kind not in _PAINTERS:
    raise ValueError(f'kind={kind!r}: give one of {sorted(_PAINTERS)}')
  figure = _lines(panels) if all(lines) else _surfaces(panels, kind)
  figure.suptitle(title)
  return figure


def _figure(width: float, height: float) -> Figure:
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), dpi=150, layout='constrained')


def _lines(panels: Mapping[str, Landscape]) -> Figure:
  figure = _figure(5.6, 3.6)
  ax = figure.subplots()
  for index, (name, item) in enumerate(panels.items()):
    ax.plot(
      item.x,
      item.loss,
      label=name,
      color=_COLORS[index % len(_COLORS)],
      linestyle=_STYLES[index % len(_STYLES)],
    )
  ax.set_xlabel(item.labels[0])
  ax.set_ylabel('loss')
  if len(panels) > 1:
    ax.legend(frameon=False)
  return figure


def _surfaces(panels: Mapping[str, Landscape], kind: Kind) -> Figure:
  perspective = {'projection': '3d'} if kind == 'surface' else {}
  width = 4.4 if kind == 'surface' else 4.0
  figure = _figure(1.6 + width * len(panels), 4.2)
  levels = _levels(panels)
  axes = []
  for index, (name, item) in enumerate(panels.items()):
    shared = {} if perspective or not axes else {'sharex': axes[0], 'sharey': axes[0]}
    ax = figure.add_subplot(1, len(panels), index + 1, **perspective, **shared)
    drawn = _PAINTERS[kind](ax, item, levels)
    ax.set_title(name)
    ax.set_xlabel(item.labels[0])
    ax.set_ylabel(item.labels[1])
    axes.append(ax)
  ticks = {} if perspective else {'ticks': levels[::2]}
  figure.colorbar(
    drawn,
    ax=axes,
    label='loss',
    shrink=0.75,
    format='%.3g',
    pad=0.1 if perspective else 0.02,
    **ticks,
  )
  return figure


def _levels(panels: Mapping[str, Landscape]) -> np.ndarray:
  """Loss levels that all panels share, closer together towards the minimum."""
  losses = np.concatenate([item.loss.ravel() for item in panels.values()])
  losses = losses[np.isfinite(losses)]
  low, high = (losses.min(), np.quantile(losses, 0.97)) if losses.size else (0, 1)
  if not high > low:
    high = low + max(abs(low), 1.0) * 1e-3
  return low + (high - low) * np.linspace(0, 1, _NUM_LEVELS) ** 1.8


def _paint_contour(ax: Axes, item: Landscape, levels: np.ndarray):
  from matplotlib.colors import BoundaryNorm

  norm = BoundaryNorm(levels, 256, extend='max')
  loss = _shown(item, np.inf)
  filled = ax.contourf(
    item.x, item.y, loss, levels, cmap='viridis', norm=norm, extend='max', alpha=0.75
  )
  if item.loss.size > 1 and np.isfinite(loss).any():
    drawn = ax.contour(item.x, item.y, loss, levels[1:], colors='black', linewidths=0.6)
    ax.clabel(drawn, fontsize=7, fmt='%.3g')
  ax.plot(0, 0, '+', color='black', markersize=9)
  ax.set_aspect('equal', adjustable='box')
  ax.locator_params(nbins=5)
  return filled


def _paint_heatmap(ax: Axes, item: Landscape, levels: np.ndarray):
  from matplotlib.colors import BoundaryNorm

  norm = BoundaryNorm(levels, 256, extend='max')
  mesh = ax.pcolormesh(item.x, item.y, _shown(item, np.inf), norm=norm, cmap='viridis')
  ax.plot(0, 0, '+', color='white', markersize=9)
  ax.set_aspect('equal', adjustable='box')
  ax.locator_params(nbins=5)
  return mesh


def _paint_surface(ax: Axes, item: Landscape, levels: np.ndarray):
  x, y = np.meshgrid(item.x, item.y)
  drawn = ax.plot_surface(
    x,
    y,
    _shown(item, levels[-1]),
    cmap='viridis',
    vmin=levels[0],
    vmax=levels[-1],
    edgecolor='black',
    linewidth=0.2,
    rcount=60,
    ccount=60,
    antialiased=True,
  )
  ax.set_zlim(levels[0], levels[-1])
  ax.set_zlabel('loss')
  ax.locator_params(nbins=5)
  ax.view_init(elev=35, azim=-60)
  return drawn


def _shown(item: Landscape, cap: float) -> np.ndarray:
  """The loss cut off at a cap; what is not finite is drawn as very high."""
  largest = np.nan_to_num(item.loss[np.isfinite(item.loss)].max(initial=0.0))
  cap = min(cap, 2 * abs(largest) + 1)
  return np.minimum(np.nan_to_num(item.loss, nan=cap, posinf=cap), cap)


_PAINTERS = {
  'contour': _paint_contour,
  'surface': _paint_surface,
  'heatmap': _paint_heatmap,
}
