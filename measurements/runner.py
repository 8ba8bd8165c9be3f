"""Measures networks and writes the files of `hessian/`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from measurements import files, registry
from measurements.context import Context
from measurements.measurement import Measurement
from measurements.network import Network
from measurements.objective import Objective
from measurements.stages import Stages
from sam_jax import curvature
from sam_jax.measuring.files import fingerprint
from training import config as config_lib
from training import problem as problem_lib
from training.errors import UsageError
from training.meshes import MeshParallel
from training.problem import Problem
from training.ticker import Ticker


class Measurer:
  """Measures networks of one problem by programs that are compiled once.

  Attributes:
    problem: that of the networks.
    chosen: the measurements that are made, by name.
  """

  def __init__(
    self,
    problem: Problem,
    options: Any,
    only: Iterable[str] | None = None,
    mesh: MeshParallel | None = None,
  ):
    """Prepares nothing yet.

    Args:
      problem: that of the networks.
      options: an `Options`.
      only: names of the measurements that are wanted; None is all.
      mesh: over which parameters, vectors and examples are split; None for one device.

    Raises:
      UsageError: there is no such measurement.
    """
    self.problem = problem
    self.chosen = registry.choose(only, options)
    self._objective = Objective(problem, options, mesh)

  def measure(self, network: Network, folder: pathlib.Path) -> dict[str, Any]:
    """Measures a network and writes the files of a folder.

    What is there already for the same parameters and options is read, not measured
    again; a measurement that was killed goes on where it stood.

    Args:
      network: of the problem.
      folder: where the files go, made where it is missing.

    Returns:
      What `summary.json` says.

    Raises:
      UsageError: an option does not fit the network.
    """
    options = self._objective.options
    fingerprint = _fingerprint(network, options, self.chosen)
    found = files.read(folder)
    if found and found['fingerprint'] == fingerprint:
      return found
    ticker = Ticker()
    stages = Stages(ticker, len(_active(self.chosen, options)))
    with files.claim(folder), jax.enable_x64(options.dtype == 'float64'):
      context = Context(
        network,
        self._objective,
        folder=folder,
        fingerprint=fingerprint,
        stages=stages,
      )
      try:
        return _measured(context, self.chosen, fingerprint, stages)
      except curvature.NonFiniteError as error:
        raise UsageError(
          f'the Hessian of {network.workdir} is not finite: its parameters or its data '
          'hold NaN or infinity; train again with a lower --learning_rate.'
        ) from error
      finally:
        ticker.clear()


def measure(
  network: Network,
  folder: pathlib.Path,
  options: Any,
  only: Iterable[str] | None = None,
) -> dict[str, Any]:
  """Measures one network; `Measurer` serves several of one problem.

  Args:
    network: from `restore`.
    folder: where the files go, made where it is missing.
    options: an `Options`.
    only: names of the measurements that are wanted; None is all.

  Returns:
    What `summary.json` says.

  Raises:
    UsageError: an option does not fit the network.
  """
  return Measurer(network.problem, options, only).measure(network, folder)


def _measured(
  context: Context,
  chosen: dict[str, Measurement],
  fingerprint: str,
  stages: Stages,
) -> dict[str, Any]:
  """Measures anew, or the rest of what was killed."""
  facts = _facts(context)
  for measurement in chosen.values():
    measurement.check(context)
  context.parts = files.Parts(context.folder, fingerprint, _results())
  active = _active(chosen, context.options)
  results, notes = {}, {}
  for name, measurement in chosen.items():
    if name in active:
      stages.begin(name.replace('_', ' '))
    results |= context.part(name, functools.partial(measurement.run, context))
    notes |= measurement.notes
    _draw(context, measurement)
  summary = {
    **facts,
    'measurements': list(chosen),
    'notes': notes,
    **results,
    **context.costs(),
    'options': dataclasses.asdict(context.options),
    'versions': config_lib.versions(),
    'fingerprint': fingerprint,
  }
  config_lib.write_json(context.folder / files.SUMMARY, summary)
  context.parts.remove()
  return summary


def _active(chosen: dict[str, Measurement], options: Any) -> set[str]:
  """Those of the chosen measurements that the options do not switch off."""
  return {n for n, m in chosen.items() if not m.switch or getattr(options, m.switch)}


def _draw(context: Context, measurement: Measurement) -> None:
  """Draws the figures of a single network whose source was written."""
  for figure in measurement.figures:
    source = context.folder / figure.source
    if figure.single and source.exists():
      drawn = figure.plot(figure.load(source), title=context.network.title)
      drawn.savefig(context.folder / figure.name)


def _results() -> set[str]:
  """Every file that a measurement may write."""
  found: set[str] = set()
  for measurement in registry.find().values():
    found.update(measurement.files)
    for figure in measurement.figures:
      found.update((figure.name, figure.source))
  return found


def _facts(context: Context) -> dict[str, Any]:
  config, options = context.network.config, context.options
  mode = options.batch_norm if context.network.batch_stats else 'none in this model'
  return {
    'task': config.task,
    'optimizer': config.optimizer,
    'base_optimizer': config.base_optimizer,
    'rho': config.rho,
    'seed': config.seed,
    'step': context.network.step,
    'operator': options.operator,
    'preconditioner': options.preconditioner,
    'params_regex': options.params_regex,
    'num_parameters': context.operator.size,
    'split': options.split,
    'num_examples': round(
      sum(float(problem_lib.num_examples(batch)) for batch in context.batches)
    ),
    'batch_norm': mode,
    'dtype': options.dtype,
    'matmul_precision': 'highest',
    'device': jax.devices()[0].device_kind,
  }


def _fingerprint(network: Network, options: Any, chosen: Iterable[str]) -> str:
  """Changes with the network, the options, what is chosen, or the packages."""
  config, options = dataclasses.asdict(network.config), dataclasses.asdict(options)
  return fingerprint(
    (network.params, network.batch_stats),
    config,
    options,
    list(chosen),
    config_lib.versions(),
  )
