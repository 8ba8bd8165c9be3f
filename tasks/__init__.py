"""The tasks: each a module with a `RECIPE` and a `build`, found in this folder.

A task of one's own is a Python file anywhere, or a module, with

- ``RECIPE``, a `training.Config`: what its flags are where they are not given;
- ``build(config) -> training.Problem``: model, data, loss of each example, scores;
- optionally ``METHODS``, arguments of methods that differ from the methods' own, as
  ``{'sam': {'rho': 0.1}}``;
- optionally ``SCALES``, other sizes of it: recipe fields by the name that ``--scale``
  takes, as ``{'small': {'epochs': 10}}``; ``build`` reads the name in ``config.scale``;
- optionally ``LEARNING_RATES``, that of each base optimizer that the recipe's own rate
  does not suit, as ``{'adam': 0.01}``;
- optionally ``NETWORK``, the flax module that ``--model`` changes, with its values: its
  attributes are told by ``--help`` and checked before the data are read;
- optionally ``HEEDS``, those of the fields ``dataset`` and ``label_smoothing`` that its
  ``build`` reads: the others are refused. Without it none is.

It is named by ``--task=path/to/my_task.py`` or ``--task=package.module``.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil
import types
from collections.abc import Mapping
from typing import Any

import training
from tasks import networks
from training import config as config_lib
from training import methods, optimizers, plugins, sharing
from training.errors import UsageError

_HELPERS = ('edges', 'imagenet', 'networks')
# Fields that mean nothing to some tasks.
_OPTIONAL = ('dataset', 'label_smoothing')
_FIELDS = {field.name for field in dataclasses.fields(training.Config)}


def names() -> list[str]:
  """The tasks of this folder, the default first."""
  found = [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _HELPERS]
  return sorted(found, key=lambda name: name != 'digits_mlp')


def load(name: str) -> types.ModuleType:
  """Imports a task: a name of `names`, a Python file, or a module.

  Raises:
    UsageError: there is no such task, or the file is none.
  """
  if name in names():
    return importlib.import_module(f'tasks.{name}')
  if not plugins.is_reference(name):
    config_lib.require_choice(
      'task', name, [*names(), 'the path of a .py file', 'package.module']
    )
  module = plugins.load('task', name)
  for attribute in ('RECIPE', 'build'):
    if not hasattr(module, attribute):
      raise UsageError(
        f'--task={name}: {module.__name__} has no {attribute}; a task has a RECIPE and '
        'a function build(config).'
      )
  return module


def resolve(name: str = 'digits_mlp', **overrides: Any) -> training.Config:
  """The full configuration: a task's recipe with some fields changed.

  A method's radius and other arguments are the task's own for it, else the method's;
  with a base optimizer alone there are none. A method that follows a momentum buffer
  takes momentum over a recipe of plain SGD. The learning rate is that of the base
  optimizer: the recipe's, or the task's own for it.

  Args:
    name: a task, see `load`.
    **overrides: fields of `training.Config`, or flags of the method's arguments (as
      looksam_every); those that are None are the recipe's.

  Raises:
    UsageError: a field's value.
    TypeError: a name that is neither.

  >>> resolve('digits_mlp', optimizer='sam', epochs=3).base_optimizer
  'sgd'
  >>> resolve('digits_mlp', optimizer='looksam', looksam_every=3).hyperparameters
  {'every': 3, 'alpha': 0.7}
  """
  task = load(name)
  given = {field: value for field, value in overrides.items() if value is not None}
  flags = {flag: given.pop(flag) for flag in set(given) - _FIELDS}
  if 'optimizer' in given:
    given['optimizer'] = plugins.absolute(given['optimizer'])
  folder = pathlib.Path(given.get('dataset', '')).expanduser()
  if '/' in given.get('dataset', '') and folder.exists():
    given['dataset'] = str(folder.resolve())  # The same from every folder.
  recipe = _scaled(task, name, given.get('scale', ''))
  config = dataclasses.replace(recipe, **given)
  for field in set(_OPTIONAL) - set(getattr(task, 'HEEDS', _OPTIONAL)):
    if (value := getattr(config, field)) != getattr(recipe, field):
      raise UsageError(
        f'--{field}={value} has no effect with --task={name}: leave it out.'
      )
  if hasattr(task, 'NETWORK'):
    networks.parse(task.NETWORK, config.model)
  if config.optimizer in optimizers.BASES and 'base_optimizer' not in given:
    config = dataclasses.replace(config, base_optimizer=config.optimizer)
  known = [*methods.found(), config.optimizer]
  if unknown := [flag for flag in flags if not methods.owners(flag, known)]:
    raise TypeError(f'neither a field of Config nor of any method: {unknown}')
  if methods.is_method(config.optimizer):
    name = methods.get(config.optimizer).__name__
    own = getattr(task, 'METHODS', {}).get(name, {})
    config = _with_method(config, own, given, flags)
  if 'learning_rate' not in given:
    rate = _learning_rate(config, recipe, getattr(task, 'LEARNING_RATES', {}))
    config = dataclasses.replace(config, learning_rate=rate)
  config_lib.validate(config)
  optimizers.validate(config)
  sharing.of(config)
  return config


def _scaled(task: types.ModuleType, name: str, scale: str) -> training.Config:
  """A task's recipe at one of its scales."""
  scales = {'': {}, **getattr(task, 'SCALES', {})}
  if scale not in scales:
    choices = ', '.join(filter(None, scales))
    raise UsageError(
      f'--scale={scale}: '
      + (f'choose one of {choices}, or leave it out.' if choices else '')
      + ('' if choices else f'--task={name} has one size only: leave it out.')
    )
  fields = {'task': plugins.absolute(name), 'scale': scale, **scales[scale]}
  return dataclasses.replace(task.RECIPE, **fields)


def _with_method(
  config: training.Config,
  own: dict[str, Any],
  given: dict[str, Any],
  flags: dict[str, Any],
) -> training.Config:
  """Fills in what belongs to the configuration's method."""
  specs = methods.hyperparameters(config.optimizer)
  by_flag = {spec.flag: name for name, spec in specs.items()}
  values = methods.resolve(
    config.optimizer,
    own,
    config.hyperparameters,
    {by_flag[flag]: value for flag, value in flags.items() if flag in by_flag},
  )
  changes = {'hyperparameters': values}
  if config.rho is None:
    changes['rho'] = own.get('rho', specs['rho'].default)
  if not config.m_sharpness:
    changes['m_sharpness'] = config.batch_size
  traits = methods.get(config.optimizer).traits
  plain = config.base_optimizer == 'sgd' and 'base_optimizer' not in given
  if traits.needs_momentum and plain and 'learning_rate' not in given:
    changes['base_optimizer'] = 'momentum'
  return dataclasses.replace(config, **changes)


def _learning_rate(
  config: training.Config, recipe: training.Config, rates: Mapping[str, float]
) -> float:
  """The learning rate of a configuration that none was given for.

  Args:
    config: with its base optimizer, and the recipe's learning rate.
    recipe: the task's, at its scale.
    rates: the task's own, by base optimizer.

  Raises:
    UsageError: the task has no rate that suits the base optimizer.
  """
  base = config.base_optimizer
  known = {**rates, recipe.base_optimizer: recipe.learning_rate}
  if base in known:
    return known[base]
  # Of the same kind: with momentum a step is 1 / (1 - momentum) times as long.
  scale = {'sgd': 1, **dict.fromkeys(optimizers.WITH_MOMENTUM, 1 - config.momentum)}
  adaptive = ('adam', 'adamw')
  for other, rate in known.items():
    if base in scale and other in scale:
      return rate * scale[base] / scale[other]
    if base in adaptive and other in adaptive:
      return rate
  if base not in optimizers.BASES:
    return config.learning_rate  # The base optimizer is refused later.
  raise UsageError(
    f'--task={config.task} has no learning rate for --base_optimizer={base}: give '
    '--learning_rate.'
  )


def build(config: training.Config) -> training.Problem:
  """The model, the data and the loss of a configuration.

  Raises:
    UsageError: the configuration.
    DataError: the data cannot be found or read.
  """
  problem = load(config.task).build(config)
  config_lib.check_size(config, problem.train.num_examples)
  model = networks.change(problem.model, config.model, problem.example_inputs)
  return problem._replace(model=model)
