"""Figures of result objects. Needs matplotlib, which is imported when one is drawn.

Every figure is a `matplotlib.figure.Figure` of its own: save it with ``savefig``. No
global state is touched and no display is needed. All can be read without colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from sam_jax.curvature import density as density_lib
from sam_jax.landscape import EIGEN_RATIO, Landscape

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Kind = Literal['contour', 'surface', 'heatmap']
_STYLES = ('-', '--', '-.', ':')
_COLORS = ('#1f4e79', '#c05a00', '#2f7d4f', '#7a3b8f', '#8c8c8c')
_MOST_LEVELS = 12
# Above this ratio of the highest to the lowest loss, levels grow by factors.
_FEW_TO_MANY = 10.0
# Mantissas of such levels; the first set that gives few enough is taken.
_MANTISSAS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,))
# Least distance between two labels of contours, and to the frame, in widths of a panel.
_CROWDED, _FRAME = 0.13, 0.07


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
  """The loss, or what else a landscape holds, along one or two directions.

  A trajectory on a surface is drawn over it, its start as a square and its end as a
  star; the axes tell how much of its variance they explain. The levels of a surface are
  round numbers: equal steps of 1, 2 or 5 times a power of ten, or factors if the loss
  spans more than a factor of 10, except in perspective. Surfaces are clipped above
  their 0.97 quantile, and the label of the colour bar says so. A loss that is not
  finite is drawn as very high. Maps of eigenvalue ratios run from 0 to the largest
  ratio, or to 1 if that is more; where a ratio is not known they are left free.

  Args:
    result: a landscape, or several by name: surfaces stand side by side with shared
      axes and levels, lines in one picture.
    kind: how surfaces are drawn: 'contour', 'surface' (in perspective) or 'heatmap'.
    title: above the figure.

  Returns:
    The figure.

  Raises:
    ValueError: an unknown kind, or lines mixed with surfaces, or values of two sorts.

  >>> import numpy as np
  >>> from sam_jax.landscape import EIGEN_RATIO, Landscape
  >>> x = np.linspace(-1, 1, 5)
  >>> figure = landscape(Landscape(x, x, x[:, None] ** 2 + x ** 2), 'heatmap')
  >>> [ax.get_xlabel() for ax in figure.axes]
  ['direction 1', '']
  """
  panels = result if isinstance(result, Mapping) else {'': result}
  lines = [item.y is None for item in panels.values()]
  if any(lines) and not all(lines):
    raise ValueError('result mixes lines and surfaces: draw them apart')
  values = {item.value for item in panels.values()}
  if len(values) > 1:
    raise ValueError(f'result mixes {sorted(values)}: draw them apart')
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
  ax.set_ylabel(_value_label(item))
  if len(panels) > 1:
    ax.legend(frameon=False)
  return figure


def _surfaces(panels: Mapping[str, Landscape], kind: Kind) -> Figure:
  perspective = {'projection': '3d'} if kind == 'surface' else {}
  width = 4.4 if kind == 'surface' else 4.0
  figure = _figure(1.6 + width * len(panels), _height_of(panels, kind))
  levels = _levels(panels, by_factors=kind != 'surface')
  top = float(levels[-1])
  clipped = any(_exceeds(item, top) for item in panels.values())
  axes = []
  for index, (name, item) in enumerate(panels.items()):
    shared = {} if perspective or not axes else {'sharex': axes[0], 'sharey': axes[0]}
    ax = figure.add_subplot(1, len(panels), index + 1, **perspective, **shared)
    drawn = _PAINTERS[kind](ax, item, levels, 'max' if clipped else 'neither')
    ax.set_title(name)
    style = {'labelpad': 6, 'fontsize': 9} if perspective else {}
    ax.set_xlabel(_axis_label(item, 0, kind), **style)
    ax.set_ylabel(_axis_label(item, 1, kind), **style)
    axes.append(ax)
  ticks = {} if perspective else {'ticks': levels[:: 1 if len(levels) < 10 else 2]}
  note = f' (clipped at {_number(top)})' if clipped else ''
  figure.colorbar(
    drawn,
    ax=axes,
    label=f'{_value_label(item)}{note}',
    shrink=0.75,
    format=lambda value, _: _number(value),
    pad=0.1 if perspective else 0.02,
    **ticks,
  )
  return figure


def _exceeds(item: Landscape, top: float) -> bool:
  """Whether a landscape has values that are drawn lower than they are."""
  # Rounding of the level itself is no clipping.
  above = item.loss > top + 1e-9 * abs(top)
  undefined = np.isnan(item.loss) & (item.value == 'loss')
  return bool((above | undefined).any())


def _number(value: float) -> str:
  """A round number without the dust of its binary form."""
  return f'{value:.10g}'


def _height_of(panels: Mapping[str, Landscape], kind: Kind) -> float:
  """Height of a figure in inches: flat pictures have equal units on both axes."""
  if kind == 'surface':
    return 4.4
  aspects = [np.ptp(i.y) / np.ptp(i.x) for i in panels.values() if np.ptp(i.x) > 0]
  return float(np.clip(1.2 + 3.0 * max(aspects, default=1.0), 2.6, 6.0))


def _value_label(item: Landscape) -> str:
  return _VALUE_LABELS.get(item.value, item.value)


def _axis_label(item: Landscape, index: int, kind: Kind) -> str:
  label = item.labels[index]
  if not item.explained:
    return label
  share = f'{100 * item.explained[index]:.1f} %'
  # Slanted labels have room for one line.
  long = f'{label}\n({share} of the variance)'
  return f'{label} ({share})' if kind == 'surface' else long


def _levels(panels: Mapping[str, Landscape], *, by_factors: bool) -> np.ndarray:
  """Round levels that all panels share, up to the 0.97 quantile of their values."""
  values = np.concatenate([item.loss.ravel() for item in panels.values()])
  values = values[np.isfinite(values)]
  (sort,) = {item.value for item in panels.values()}
  if not values.size:
    return _even_levels(0.0, 1.0)
  if sort == EIGEN_RATIO:
    return _even_levels(0.0, max(min(values.max(), 1.0), 1e-6))
  low, high = float(values.min()), float(np.quantile(values, 0.97))
  if by_factors and low > 0 and high > _FEW_TO_MANY * low:
    return _growing_levels(low, high)
  if not high > low:
    high = low + max(abs(low), 1.0) * 1e-3
  return _even_levels(low, high)


def _even_levels(low: float, high: float) -> np.ndarray:
  """Multiples of 1, 2 or 5 times a power of ten, from one below to one above."""
  from matplotlib.ticker import MaxNLocator

  return MaxNLocator(_MOST_LEVELS, steps=[1, 2, 5, 10]).tick_values(low, high)


def _growing_levels(low: float, high: float) -> np.ndarray:
  """Round numbers closer together at the minimum, from one below to one above."""
  powers = np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 1)
  # Negative integer powers of ten are not exact, quotients of positive ones are.
  tens = [10.0**n if n >= 0 else 1 / 10.0**-n for n in powers]
  for mantissas in _MANTISSAS:
    found = np.outer(tens, mantissas).ravel()
    first = np.searchsorted(found, low, 'right') - 1
    last = np.searchsorted(found, high)
    found = found[first : last + 1]
    if len(found) <= _MOST_LEVELS:
      break
  return found[:: -(-len(found) // _MOST_LEVELS)]


def _paint_contour(ax: Axes, item: Landscape, levels: np.ndarray, extend: str):
  values = _shown(item, np.inf)
  filled = ax.contourf(
    item.x,
    item.y,
    values,
    levels,
    cmap='viridis',
    norm=_norm(levels, extend),
    extend=extend,
    alpha=0.75,
  )
  if item.loss.size > 1 and np.isfinite(item.loss).any():
    drawn = ax.contour(
      item.x, item.y, values, levels[1:], colors='black', linewidths=0.6
    )
    _label_contours(ax, drawn)
  _mark(ax, item, 'black')
  return filled


def _label_contours(ax: Axes, drawn) -> None:
  """Numbers on the lines, over a trajectory, apart from one another and the frame."""
  from matplotlib.patheffects import withStroke

  halo = withStroke(linewidth=2, foreground='white', alpha=0.6)
  places = _label_places(ax, drawn.allsegs)
  if not places:  # To matplotlib no places means to choose them itself.
    return
  for text in ax.clabel(drawn, fontsize=7, fmt=_number, manual=places, zorder=12):
    text.set_path_effects([halo])


def _label_places(ax: Axes, segments) -> list[tuple[float, float]]:
  """A point on the lines of each level that has room, as far from others as it goes.

  Args:
    ax: the axes, whose limits hold all lines.
    segments: for each level its lines, each (n, 2) in data coordinates.
  """
  corner = np.array([ax.get_xlim()[0], ax.get_ylim()[0]])
  sides = np.ptp([ax.get_xlim(), ax.get_ylim()], axis=1)
  found = []
  taken = [np.array([0.5, 0.0])]
  for lines in segments:
    lines = [(line - corner) / sides for line in lines if len(line) > 1]
    # Lines shorter than a label would vanish under it.
    long = [x for x in lines if np.linalg.norm(np.diff(x, axis=0), axis=1).sum() > 0.15]
    points = np.concatenate([np.empty((0, 2)), *long])
    points = points[((points > _FRAME) & (points < 1 - _FRAME)).all(1)]
    if not len(points):
      continue
    room = np.linalg.norm(points[:, None] - np.array(taken), axis=2).min(1)
    best = points[room.argmax()]
    if room.max() >= _CROWDED:
      taken.append(best)
      found.append(tuple(corner + sides * best))
  return found


def _paint_heatmap(ax: Axes, item: Landscape, levels: np.ndarray, extend: str):
  mesh = ax.pcolormesh(
    item.x, item.y, _shown(item, np.inf), norm=_norm(levels, extend), cmap='viridis'
  )
  _mark(ax, item, 'white')
  ax.patch.set(facecolor='0.9', hatch='xx', edgecolor='0.6')
  return mesh


def _norm(levels: np.ndarray, extend: str):
  from matplotlib.colors import BoundaryNorm

  return BoundaryNorm(levels, 256, extend=extend)


def _mark(ax: Axes, item: Landscape, color: str) -> None:
  """The centre or the trajectory of a flat picture, and its frame."""
  limits = ax.get_xlim(), ax.get_ylim()
  if item.path is None:
    ax.plot(0, 0, '+', color=color, markersize=9)
  else:
    _draw_path(ax, item.path.T)
  ax.set_xlim(limits[0])
  ax.set_ylim(limits[1])
  ax.set_aspect('equal', adjustable='box')
  ax.locator_params(nbins=5)


def _draw_path(ax: Axes, coordinates: np.ndarray) -> None:
  """A trajectory, (2 or 3, t), black on white so that it shows on any colour."""
  ax.plot(*coordinates, color='white', linewidth=3, zorder=10)
  ax.plot(*coordinates, 'o-', color='black', linewidth=1, markersize=2.5, zorder=11)
  for marker, size, end in (
    ('s', 7, coordinates[:, :1]),
    ('*', 12, coordinates[:, -1:]),
  ):
    ax.plot(
      *end,
      marker,
      markersize=size,
      markerfacecolor='white',
      markeredgecolor='black',
      zorder=12,
    )


def _paint_surface(ax: Axes, item: Landscape, levels: np.ndarray, extend: str):
  del extend  # Its height shows where it is cut off.
  x, y = np.meshgrid(item.x, item.y)
  values = _shown(item, levels[-1])
  drawn = ax.plot_surface(
    x,
    y,
    values,
    cmap='viridis',
    vmin=levels[0],
    vmax=levels[-1],
    edgecolor='black',
    linewidth=0.2,
    rcount=60,
    ccount=60,
    antialiased=True,
  )
  if item.path is not None:
    ax.computed_zorder = False
    heights = [_height(item, values, *point) for point in item.path]
    _draw_path(ax, np.column_stack([item.path, heights]).T)
  ax.set_zlim(levels[0], levels[-1])
  ax.set_zlabel(_value_label(item))
  ax.locator_params(nbins=5)
  ax.view_init(elev=35, azim=-60)
  # Room for the labels of the axes, which the layout does not see.
  ax.set_box_aspect(None, zoom=0.8 if item.explained else 0.9)
  return drawn


def _height(item: Landscape, values: np.ndarray, x: float, y: float) -> float:
  """What a surface shows at a point, between its own points bilinear."""
  across = [np.interp(x, item.x, row, np.nan, np.nan) for row in values]
  return float(np.interp(y, item.y, across, np.nan, np.nan))


def _shown(item: Landscape, cap: float) -> np.ndarray:
  """The values cut off at a cap; a loss that is not finite is drawn as very high."""
  largest = np.nan_to_num(item.loss[np.isfinite(item.loss)].max(initial=0.0))
  cap = min(cap, 2 * abs(largest) + 1)
  undefined = cap if item.value == 'loss' else np.nan
  return np.minimum(np.nan_to_num(item.loss, nan=undefined, posinf=cap), cap)


_VALUE_LABELS = {EIGEN_RATIO: r'$|\lambda_{min} \,/\, \lambda_{max}|$'}
_PAINTERS = {
  'contour': _paint_contour,
  'surface': _paint_surface,
  'heatmap': _paint_heatmap,
}
