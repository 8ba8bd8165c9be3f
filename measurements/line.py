"""The loss on the way to another network, and past both."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from measurements import network
from measurements.context import Context
from measurements.measurement import Figure, Measurement, option
from measurements.objective import cast
from sam_jax import landscape, plotting
from training import config as config_lib
from training import problem as problem_lib
from training.errors import UsageError

LINE = 'line.npz'
_POINTS = 51


@dataclasses.dataclass(frozen=True)
class Options:
  """Where to."""

  landscape_towards: str = option(
    '', 'also the loss on the line to the network of this other workdir'
  )


def _check(context: Context) -> None:
  if context.options.landscape_towards:
    _other(context)


def _other(context: Context) -> network.Network:
  """The newest network of the other run, which must be of the same model."""
  workdir = pathlib.Path(context.options.landscape_towards)
  if workdir.resolve() == context.network.workdir.resolve():
    raise UsageError(
      f'--landscape_towards={workdir} is the network itself: give another run.'
    )
  try:
    config = config_lib.load(workdir)
    found = network.restore(workdir, config, context.network.problem)
  except UsageError as error:
    raise UsageError(f'--landscape_towards={workdir}: {error}') from error
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params)):
    raise UsageError(
      f'--landscape_towards={workdir}: its parameters hold NaN or infinity.'
    )
  return found


def _run(context: Context) -> dict[str, Any]:
  if not context.options.landscape_towards:
    return {}
  other = _other(context)
  params = cast(other.params, context.options.dtype)
  result = landscape.line(
    context.objective.loss,
    context.params,
    landscape.difference(context.params, params),
    np.linspace(-0.5, 1.5, _POINTS),
    context.batches,
    weight=problem_lib.num_examples,
    label=f'{context.network.name} at 0, {other.name} at 1',
    record=context.parts.record('line'),
    progress=context.show_points('line'),
  )
  result.save(context.folder / LINE)
  between = result.loss[(result.x >= 0) & (result.x <= 1)]
  ends = max(between[0], between[-1])
  return {'line': {'towards': str(other.workdir), 'barrier': between.max() - ends}}


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  order=130,
  switch='landscape_towards',
  check=_check,
  figures=(
    Figure('line.png', LINE, landscape.load, plotting.landscape, several=False),
  ),
)
