"""A trained network, rebuilt from a checkpoint of its run."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from training import checkpoints, optimizers
from training.config import Config
from training.workload import Workload


class Network(NamedTuple):
  """A trained network with its data.

  Attributes:
    config: that of its run.
    workload: its model and data.
    params: its parameters.
    batch_stats: its running batch statistics, possibly empty.
    step: updates done.
    arrays: the whole checkpoint by path, for what only some measurements need.
    workdir: the folder of its run.
  """

  config: Config
  workload: Workload
  params: Any
  batch_stats: Any
  step: int
  arrays: dict[str, Any]
  workdir: pathlib.Path


def restore(
  workdir: pathlib.Path,
  config: Config,
  build: Callable[[Config], Workload],
  step: int | None = None,
) -> Network:
  """Rebuilds the network of a workdir from one of its checkpoints.

  Args:
    workdir: the run's folder.
    config: its configuration; where its data lies may differ.
    build: makes the workload of a configuration.
    step: of the checkpoint; None is the newest.

  Raises:
    UsageError: there is no such checkpoint, or it is of another model.
  """
  checkpoint = checkpoints.load(workdir, step)
  workload = build(config)
  params, batch_stats = variables(workdir, workload, checkpoint)
  number = int(checkpoint.arrays['step'])
  return Network(
    config, workload, params, batch_stats, number, checkpoint.arrays, workdir
  )


def variables(
  workdir: pathlib.Path, workload: Workload, checkpoint: checkpoints.Checkpoint
) -> tuple[Any, Any]:
  """Parameters and batch statistics of a checkpoint, which must fit the model.

  Raises:
    UsageError: it is of another model.
  """
  like = jax.eval_shape(workload.model.init, jax.random.key(0), workload.example_inputs)
  params, batch_stats = (
    checkpoints.from_arrays(
      checkpoints.select(checkpoint.arrays, name),
      like.get(name, {}),
      f'the checkpoint in {workdir}',
    )
    for name in ('params', 'batch_stats')
  )
  return params, batch_stats


def trajectory(network: Network) -> list[Any]:
  """The parameters of every checkpoint of the network's run, up to its own."""
  workdir = network.workdir
  steps = [step for step in checkpoints.steps(workdir) if step <= network.step]
  return [
    variables(workdir, network.workload, checkpoints.load(workdir, step))[0]
    for step in steps
  ]


def optimizer_state(network: Network) -> Any:
  """The state of the run's optimizer chain at the checkpoint.

  Raises:
    UsageError: the checkpoint is of another optimizer.
  """
  config = network.config
  batches = network.workload.train.batches(config.batch_size, seed=config.seed)
  tx = optimizers.build(config, batches.steps_per_epoch)
  return checkpoints.from_arrays(
    checkpoints.select(network.arrays, 'opt_state'),
    jax.eval_shape(tx.init, network.params),
    f'the checkpoint in {network.workdir}',
  )


def label(config: Config) -> str:
  """A run's method in a few words: optimizer, base optimizer, radius."""
  radius = '' if config.rho is None else f', rho {config.rho:g}'
  base = config.base_optimizer
  over = f' over {base}' if base and base != config.optimizer else ''
  return f'{config.optimizer}{over}{radius}'
