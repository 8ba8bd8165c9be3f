"""The workloads by name: each a module with `RECIPE`, `RHO` and `build`."""

from __future__ import annotations

import dataclasses
import importlib
import types
from typing import Any

import training
from tasks import networks
from training import config as config_lib
from training import optimizers
from training.errors import UsageError

TASKS = {
  'digits_mlp': 'tasks.digits_mlp',
  'cifar10_wrn': 'tasks.cifar10_wrn',
  'mitbih_attention': 'tasks.mitbih_attention',
  'mutagenicity_gcn': 'tasks.mutagenicity_gcn',
  'mutagenicity_transformer': 'tasks.mutagenicity_transformer',
  'tudataset_gcn': 'tasks.tudataset_gcn',
}


def load(name: str) -> types.ModuleType:
  """Imports a task.

  Raises:
    UsageError: there is no such task.
  """
  config_lib.require_choice('task', name, TASKS)
  return importlib.import_module(TASKS[name])


def resolve(name: str = 'digits_mlp', **overrides: Any) -> training.Config:
  """The full configuration: a task's recipe with some fields changed.

  A method's radius is the task's own for it, else the method's; with a base optimizer
  alone there is none. Momentum SAM over a recipe of plain SGD takes momentum at the
  same effective rate.

  Args:
    name: a name in TASKS.
    **overrides: fields of `training.Config`; those that are None are the recipe's.

  Raises:
    UsageError: a field's value.

  >>> resolve('digits_mlp', optimizer='sam', epochs=3).base_optimizer
  'sgd'
  """
  task = load(name)
  given = {field: value for field, value in overrides.items() if value is not None}
  config = dataclasses.replace(task.RECIPE, **given)
  if config.optimizer in optimizers.BASES and 'base_optimizer' not in given:
    config = dataclasses.replace(config, base_optimizer=config.optimizer)
  if (
    config.optimizer == 'msam'
    and config.base_optimizer == 'sgd'
    and not ({'base_optimizer', 'learning_rate'} & set(given))
  ):
    # It follows a momentum buffer; the step is as long as without in the long run.
    rate = config.learning_rate * (1 - config.momentum)
    config = dataclasses.replace(config, base_optimizer='momentum', learning_rate=rate)
  if config.optimizer in optimizers.METHODS and config.rho is None:
    own = optimizers.METHODS[config.optimizer].rho
    config = dataclasses.replace(config, rho=task.RHO.get(config.optimizer, own))
  config_lib.validate(config)
  optimizers.validate(config)
  return config


def build(config: training.Config) -> training.Workload:
  """The model and the data of a configuration.

  Raises:
    UsageError: the configuration.
    DataError: the data cannot be found or read.
  """
  workload = load(config.task).build(config)
  num_examples = workload.train.num_examples
  if config.batch_size > num_examples:
    raise UsageError(
      f'--batch_size={config.batch_size}: the training split has {num_examples} '
      'examples; give at most that.'
    )
  model = networks.change(workload.model, config.model, workload.example_inputs)
  return workload._replace(model=model)
