"""The loss on a surface through a network."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from measurements import eigenvalues, network
from measurements.context import Context
from measurements.measurement import (
  Figure,
  Measurement,
  above_zero,
  at_most,
  one_of,
  option,
  points,
)
from measurements.objective import cast
from sam_jax import landscape, layouts, plotting
from sam_jax.measuring.files import LANDSCAPE, LANDSCAPE_FIGURE
from training import problem as problem_lib
from training.errors import UsageError

VTK = 'landscape.vtk'
_FEWEST_CHECKPOINTS = 3
# A trajectory is drawn with this share of its extent around it.
_MARGIN = 0.25


@dataclasses.dataclass(frozen=True)
class Options:
  """The plane and its grid; maps of eigenvalue ratios lie on the same plane."""

  landscape_points: int = option(
    21, 'points a side of the loss surface; 0: none', points
  )
  landscape_extent: float = option(
    1.0,
    'the surface reaches so far each way, in units of its directions',
    above_zero,
    at_most(1000),
  )
  landscape_directions: str = option(
    'filter',
    'filter, layer or gaussian: random, normalised so; eigenvectors: of lambda_max '
    'and lambda_2; trajectory: principal components of the checkpoints kept',
    one_of('filter', 'layer', 'gaussian', 'eigenvectors', 'trajectory'),
  )
  landscape_biases: bool = option(
    False, 'random directions also move biases and normalization parameters'
  )
  vtk: bool = option(False, 'also write the surface as landscape.vtk, for ParaView')


@dataclasses.dataclass(frozen=True)
class Plane:
  """Two directions, and the path that gave them if one did."""

  directions: tuple[Any, Any]
  labels: tuple[str, str] = ('direction 1', 'direction 2')
  path: np.ndarray | None = None
  explained: tuple[float, ...] = ()


def check_plane(context: Context) -> None:
  """Refuses directions that the network cannot have."""
  kind = context.options.landscape_directions
  if context.options.landscape_biases and kind in ('eigenvectors', 'trajectory'):
    raise UsageError(
      f'--landscape_biases has no effect with --landscape_directions={kind}: they '
      'move all parameters.'
    )
  if kind == 'eigenvectors':
    top_k, size = context.options.top_k, context.operator.size
    if min(top_k, size) < 2:
      raise UsageError(
        '--landscape_directions=eigenvectors: they are those of lambda_max and '
        f'lambda_2, but --top_k={top_k} of {size} parameters; give --top_k=2 or more.'
      )
  elif kind == 'trajectory':
    found = len(network.trajectory_steps(context.network))
    if found < _FEWEST_CHECKPOINTS:
      raise UsageError(
        f'--landscape_directions=trajectory: {context.network.workdir} has {found} '
        f'checkpoints, and a plane needs {_FEWEST_CHECKPOINTS}; train with '
        '--keep_checkpoints=0 to keep them all.'
      )
  else:
    _check_layout(context, kind)


def _check_layout(context: Context, kind: str) -> None:
  layout = layouts.automatic()
  sizes = [leaf.size for leaf in jax.tree.leaves(context.params)]
  weights = jax.tree.leaves(layout.weights(context.params))
  biases = context.options.landscape_biases
  moved = sum(
    size for size, moves in zip(sizes, weights, strict=True) if moves | biases
  )
  if moved < 2:
    more = (
      'give --landscape_biases to move the others, or ' if moved < sum(sizes) else ''
    )
    raise UsageError(
      f'--landscape_directions={kind}: a plane has two directions, and of '
      f'{sum(sizes)} parameters {moved} would be moved; {more}measure without it: '
      '--landscape_points=0.'
    )
  unknown = layout.unknown(context.params)
  if kind == 'filter' and unknown:
    raise UsageError(
      f'--landscape_directions=filter: what the filters of {unknown[0]} are cannot be '
      'told from its path and shape; give --landscape_directions=layer.'
    )


def plane(context: Context) -> Plane:
  """The plane that the options name."""
  kind = context.options.landscape_directions
  if kind == 'eigenvectors':
    vectors = eigenvalues.pairs_of(context).eigenvectors[:2]
    directions = tuple(map(context.direction, vectors))
    return Plane(directions, ('eigenvector of lambda_max', 'eigenvector of lambda_2'))
  if kind == 'trajectory':
    return _trajectory(context)
  directions = landscape.random_directions(
    context.key(3),
    context.params,
    normalization='none' if kind == 'gaussian' else kind,
    include_vectors=context.options.landscape_biases,
  )
  return Plane(directions)


def grid(context: Context, chosen: Plane, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The coordinates of so many points along each direction of a plane."""
  extent = context.options.landscape_extent
  if chosen.path is None:
    return (np.linspace(-extent, extent, count),) * 2
  margin = _MARGIN * extent * np.ptp(chosen.path, axis=0).max()
  return tuple(
    np.linspace(along.min() - margin, along.max() + margin, count)
    for along in chosen.path.T
  )


def _trajectory(context: Context) -> Plane:
  dtype = context.options.dtype
  steps = [cast(params, dtype) for params in network.trajectory(context.network)]
  try:
    found = landscape.trajectory(steps)
  except ValueError as error:
    raise UsageError(
      f'--landscape_directions=trajectory: {error}; train with --keep_checkpoints=0 '
      'to keep them all.'
    ) from error
  return Plane(
    found.directions,
    ('principal component 1', 'principal component 2'),
    found.coordinates,
    tuple(float(share) for share in found.explained),
  )


def _check(context: Context) -> None:
  if context.options.landscape_points:
    check_plane(context)


def _run(context: Context) -> dict[str, Any]:
  count = context.options.landscape_points
  if not count:
    return {}
  chosen = plane(context)
  result = landscape.surface(
    context.objective.loss,
    context.params,
    chosen.directions,
    *grid(context, chosen, count),
    context.batches,
    weight=problem_lib.num_examples,
    labels=chosen.labels,
    record=context.parts.record('landscape'),
    progress=context.show_points('landscape'),
  )
  result = dataclasses.replace(result, path=chosen.path, explained=chosen.explained)
  result.save(context.folder / LANDSCAPE)
  if context.options.vtk:
    result.save_vtk(context.folder / VTK)
  return {
    'landscape': {
      'directions': context.options.landscape_directions,
      'explained_variance': list(chosen.explained),
      'loss_range': [np.nanmin(result.loss), np.nanmax(result.loss)],
    }
  }


def _contour(result: Any, *, title: str = '') -> Any:
  return plotting.landscape(result, 'contour', title=title)


def _surface(result: Any, *, title: str = '') -> Any:
  return plotting.landscape(result, 'surface', title=title)


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  needs=('eigenvalues',),
  order=110,
  switch='landscape_points',
  check=_check,
  figures=(
    Figure(LANDSCAPE_FIGURE, LANDSCAPE, landscape.load, _contour),
    Figure('landscape_surface.png', LANDSCAPE, landscape.load, _surface, single=False),
  ),
  files=(VTK,),
)
