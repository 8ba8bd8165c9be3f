"""Where the loss is convex: |lambda_min / lambda_max| on the surface."""

from __future__ import annotations

import dataclasses
from typing import Any

from measurements import landscape as surface
from measurements.context import Context
from measurements.measurement import Figure, Measurement, option, points
from sam_jax import landscape, plotting
from training import problem as problem_lib

EIGEN_RATIO = 'eigen_ratio.npz'


@dataclasses.dataclass(frozen=True)
class Options:
  """The grid."""

  eigen_ratio_points: int = option(
    0,
    'points a side of a map of |lambda_min / lambda_max| on the surface; 0: none',
    points,
  )


def _check(context: Context) -> None:
  if context.options.eigen_ratio_points:
    surface.check_plane(context)


def _run(context: Context) -> dict[str, Any]:
  count = context.options.eigen_ratio_points
  if not count:
    return {}
  chosen = surface.plane(context)
  result = landscape.eigen_ratio(
    context.objective.loss,
    context.params,
    chosen.directions,
    *surface.grid(context, chosen, count),
    context.batches,
    weight=problem_lib.num_examples,
    key=context.key(3),
    labels=chosen.labels,
    record=context.parts.record('eigen_ratio'),
    progress=context.show_points('eigen-ratio map'),
  )
  result.save(context.folder / EIGEN_RATIO)
  return {}


def _heatmap(result: Any, *, title: str = '') -> Any:
  return plotting.landscape(result, 'heatmap', title=title)


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  needs=('eigenvalues',),
  order=120,
  switch='eigen_ratio_points',
  check=_check,
  figures=(Figure('eigen_ratio.png', EIGEN_RATIO, landscape.load, _heatmap),),
)
