"""Measurements while a network is trained."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from measurements import batch_sharpness, edges, noise, registry
from measurements.context import Context
from measurements.measurement import Measurement
from measurements.network import Network
from measurements.objective import Objective, width
from sam_jax import curvature
from sam_jax.measuring.entries import plain
from training import hooks as hooks_lib
from training.config import Config
from training.errors import TrainingDiverged, UsageError
from training.problem import Problem
from training.step import TrainState


@dataclasses.dataclass
class Hook(hooks_lib.Hook):
  """A measurement that the training loop calls; a pure function of its arguments.

  Attributes:
    name: of the measurement.
  """

  name: str
  _measurement: Measurement
  _problem: Problem
  _config: Config
  _every: int
  _objectives: dict[str, Objective] = dataclasses.field(default_factory=dict)

  def due(self, step: int, steps_per_epoch: int) -> bool:
    """Whether it is measured after so many steps."""
    return step % (self._every or steps_per_epoch) == 0

  def __call__(self, state: TrainState, step: int) -> dict[str, float | bool | None]:
    """Measures a network over the whole training split, in float32 or wider.

    Args:
      state: the parameters of the model and its running batch statistics.
      step: updates done.

    Returns:
      Numbers by name.

    Raises:
      TrainingDiverged: the loss or its curvature is not finite.
    """
    params, batch_stats = state.params, state.batch_stats
    dtype = width(params)
    if dtype not in self._objectives:
      options = registry.options_class()(dtype=dtype)
      self._objectives[dtype] = Objective(self._problem, options)
    network = Network(
      self._config, self._problem, params, batch_stats, step, {}, pathlib.Path()
    )
    try:
      context = Context(network, self._objectives[dtype])
      return plain(self._measurement.hook(context))
    except curvature.NonFiniteError as error:
      raise TrainingDiverged(
        f'the curvature of the loss is not finite after step {step}: try a lower '
        '--learning_rate or --rho.'
      ) from error


# Measurements that need more than the parameters, by the name that --track takes.
_TRACKERS = {module.NAME: module for module in (edges, batch_sharpness, noise)}
# Those that heed which examples, and which share; others take the whole split.
_ADJUSTABLE = (edges.NAME,)


def trackers() -> tuple[str, ...]:
  """What can be tracked while a network trains."""
  return tuple(_TRACKERS)


def tracker(
  name: str,
  problem: Problem,
  config: Config,
  every: int = 0,
  on: str = 'batch',
  share: float = 0,
) -> hooks_lib.Hook:
  """A tracker as a hook of the training loop.

  Args:
    name: of `trackers`.
    problem: what is trained.
    config: the run's.
    every: steps between measurements; 0 is the end of each epoch.
    on: the examples of 'edges': 'batch' (of the step that comes), 'train', or a number
      of them; the others draw from the whole training split.
    share: largest share of a run's gradients that 'edges' may spend; 0 is no bound.

  Raises:
    UsageError: there is no such tracker, or it refuses its arguments.
  """
  check_tracker(name, config, every, on, share)
  heeded = (on, share) if name in _ADJUSTABLE else ()
  return _TRACKERS[name].track(problem, config, every, *heeded)


def check_tracker(
  name: str,
  config: Config,
  every: int = 0,
  on: str = 'batch',
  share: float = 0,
  lines: Sequence[dict[str, Any]] = (),
) -> None:
  """Checks the arguments of `tracker` as far as that needs no data.

  Args:
    name: of `trackers`.
    config: the run's.
    every: steps between measurements.
    on: the examples.
    share: of a run's gradients.
    lines: that the run has of it, which are to be over the same examples.

  Raises:
    UsageError: there is no such tracker, or it refuses its arguments.
  """
  if name not in _TRACKERS:
    raise UsageError(f'--track={name}: choose of {", ".join(_TRACKERS)}.')
  module = _TRACKERS[name]
  if name in _ADJUSTABLE:
    module.check(config, every, on, share)
    module.check_lines(lines, on)
  else:
    module.check(config, every)


def adjustable(names: Iterable[str]) -> bool:
  """Whether any of some trackers heeds which examples it takes and its share."""
  return any(name in _ADJUSTABLE for name in names)


def hooks() -> tuple[str, ...]:
  """The measurements that can be hooks."""
  return tuple(name for name, found in registry.find().items() if found.hook)


def hook(name: str, problem: Problem, config: Config, every: int = 0) -> Hook:
  """A measurement as a hook of the training loop.

  Args:
    name: 'eigenvalues' (of which lambda_max), 'evaluation', 'trace', or another of
      `hooks`.
    problem: what is trained.
    config: the run's.
    every: steps between measurements; 0 is the end of each epoch.

  Raises:
    UsageError: the measurement cannot be a hook, or `every` is negative.
  """
  check_hook(name, every)
  return Hook(name, registry.find()[name], problem, config, every)


def check_hook(name: str, every: int = 0) -> None:
  """Checks the arguments of `hook`, which needs no data.

  Raises:
    UsageError: the measurement cannot be a hook, or `every` is negative.
  """
  if name not in hooks():
    raise UsageError(
      f'--measure={name}: choose of {", ".join(hooks())} while training; '
      'eval_hessian.py has the others.'
    )
  if every < 0:
    raise UsageError(f'--measure_every={every}: must not be negative.')
