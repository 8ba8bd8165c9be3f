"""A trained network, rebuilt from a checkpoint of its run."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax

from training import checkpoints, optimizers
from training.config import Config, label, title
from training.errors import UsageError
from training.problem import Problem


class Network(NamedTuple):
  """A trained network with its data.

  Attributes:
    config: that of its run.
    problem: its model, data, loss and scores.
    params: its parameters.
    batch_stats: its running batch statistics, possibly empty.
    step: updates done.
    arrays: the whole checkpoint by path, for what only some measurements need.
    workdir: the folder of its run.
  """

  config: Config
  problem: Problem
  params: Any
  batch_stats: Any
  step: int
  arrays: dict[str, Any]
  workdir: pathlib.Path

  @property
  def name(self) -> str:
    """Its method and seed, for readers."""
    return f'{label(self.config)}, seed {self.config.seed}'

  @property
  def title(self) -> str:
    """What a figure of it is headed with."""
    return f'{title(self.config)}, step {self.step:,}'


def restore(
  workdir: pathlib.Path, config: Config, problem: Problem, step: int | None = None
) -> Network:
  """Rebuilds the network of a workdir from one of its checkpoints.

  Args:
    workdir: the run's folder.
    config: its configuration.
    problem: that of the configuration, as ``tasks.build`` makes it; networks that share
      one are measured by programs that are compiled once.
    step: of the checkpoint; None is the newest.

  Raises:
    UsageError: there is no such checkpoint, or it is of another model.
  """
  checkpoint = checkpoints.load(workdir, step)
  params, batch_stats = variables(workdir, problem, checkpoint)
  number = int(checkpoint.arrays['step'])
  return Network(
    config, problem, params, batch_stats, number, checkpoint.arrays, workdir
  )


def variables(
  workdir: pathlib.Path, problem: Problem, checkpoint: checkpoints.Checkpoint
) -> tuple[Any, Any]:
  """Parameters and batch statistics of a checkpoint, which must fit the model.

  Raises:
    UsageError: it is of another model.
  """
  like = problem.variables()
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
  return [
    variables(workdir, network.problem, checkpoints.load(workdir, step))[0]
    for step in trajectory_steps(network)
  ]


def trajectory_steps(network: Network) -> list[int]:
  """The steps of those checkpoints."""
  return [s for s in checkpoints.steps(network.workdir) if s <= network.step]


def optimizer_state(network: Network) -> Any:
  """The state of the run's optimizer chain at the checkpoint.

  Raises:
    UsageError: the checkpoint is of another optimizer.
  """
  config = network.config
  batches = network.problem.train.batches(config.batch_size, seed=config.seed)
  tx = optimizers.build(config, batches.steps_per_epoch)
  return checkpoints.from_arrays(
    checkpoints.select(network.arrays, 'opt_state'),
    jax.eval_shape(tx.init, network.params),
    f'the checkpoint in {network.workdir}',
  )


def second_moments(network: Network) -> Any:
  """The state in which the run's Adam keeps its second moments.

  Raises:
    UsageError: the run keeps none, or has made no step yet.
  """
  base = network.config.base_optimizer
  if base not in ('adam', 'adamw'):
    raise UsageError(
      f'--preconditioner=adam: the run was trained with {base}, which keeps no second '
      'moments.'
    )
  if not network.step:
    raise UsageError(
      f'--preconditioner=adam: the checkpoint of step 0 in {network.workdir} has no '
      'second moments yet; choose a later one by --steps.'
    )
  return optimizer_state(network)
