"""The measurements: found in this package, chosen by name, with all their options."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterable
from typing import Any

from measurements.measurement import (
  Measurement,
  above_zero,
  at_least,
  not_negative,
  one_of,
  option,
)
from training.errors import UsageError

_MAX_INT = 2**31 - 1


def _regular_expression(value: str) -> str:
  try:
    re.compile(value)
  except re.error as error:
    return f'is not a regular expression ({error})'
  return ''


def _tolerance(value: float) -> str:
  return '' if 0 < value < 1 else 'must be above 0 and below 1'


@dataclasses.dataclass(frozen=True)
class Shared:
  """What all measurements are of; each field is a flag of `eval_hessian.py`."""

  split: str = option(
    'train', 'the examples of the loss: train or test', one_of('train', 'test')
  )
  num_examples: int = option(
    0,
    'average over so many examples, drawn by --seed; 0: the whole split',
    at_least(0),
  )
  operator: str = option(
    'hessian',
    'hessian, gauss_newton (its positive semidefinite part) or fisher (of the '
    "examples' gradients)",
    one_of('hessian', 'gauss_newton', 'fisher'),
  )
  params_regex: str = option(
    '',
    'only the parameters whose path (Dense_0/kernel) has a match',
    _regular_expression,
  )
  preconditioner: str = option(
    'none',
    'none; adaptive: T H T with T = |w|; adam: P^-1/2 H P^-1/2 with the second moments '
    "of the run's optimizer",
    one_of('none', 'adaptive', 'adam'),
  )
  batch_norm: str = option(
    'eval',
    "eval: the running statistics are constants; train: the batch's own",
    one_of('eval', 'train'),
  )
  dtype: str = option(
    'float32',
    'of parameters and products, float32 or float64',
    one_of('float32', 'float64'),
  )
  tol: float = option(
    1e-4,
    'residual of each eigenpair, relative to the largest |eigenvalue|',
    _tolerance,
  )
  max_num_matvecs: int = option(
    2000, 'most products for one set of eigenpairs', at_least(1)
  )
  max_basis_gib: float = option(
    8.0, 'memory for Lanczos vectors; restarts stay below', above_zero
  )
  max_journal_gib: float = option(
    8.0,
    'disk for products that a killed measurement need not repeat; 0: none',
    not_negative,
  )
  batch_size: int = option(
    128,
    'examples a product takes at a time; alters the result in train mode only',
    at_least(1),
  )
  seed: int = option(
    0, 'of start vectors, probes, directions and drawn examples', at_least(0)
  )


@functools.cache
def find() -> dict[str, Measurement]:
  """Every file of this package that declares a `MEASUREMENT`, in their order.

  Raises:
    ValueError: a measurement needs one that does not run before it.
  """
  package = importlib.import_module('measurements')
  found = {}
  for info in pkgutil.iter_modules(package.__path__, 'measurements.'):
    declared = getattr(importlib.import_module(info.name), 'MEASUREMENT', None)
    if declared is not None:
      found[info.name.rpartition('.')[2]] = declared
  found = dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))
  names = list(found)
  for name, declared in found.items():
    for need in declared.needs:
      if need not in names[: names.index(name)]:
        raise ValueError(f'measurements/{name}.py needs {need}, which runs later')
  return found


def choose(names: Iterable[str] | None, options: Any) -> dict[str, Measurement]:
  """Some of the measurements with all that they need; None is every one.

  Raises:
    UsageError: there is no such measurement, or its option is off.
  """
  found = find()
  if names is None:
    return found
  names, chosen = list(names), set()
  for name in names:
    if name not in found:
      raise UsageError(f'--measure={name}: choose of {", ".join(found)}.')
    switch = found[name].switch
    if switch and not getattr(options, switch):
      raise UsageError(
        f'--measure={name}: --{switch} is off, so there is nothing to measure.'
      )
  while names:
    chosen.add(names[-1])
    names += found[names.pop()].needs
  return {name: declared for name, declared in found.items() if name in chosen}


def options_class() -> type:
  """The dataclass of the options of all measurements, each a flag."""
  fields = [
    (field.name, _type_name(field), option(field.default, *_described(field)))
    for declared in (Shared, *(m.options for m in find().values()))
    for field in dataclasses.fields(declared)
  ]
  return dataclasses.make_dataclass(
    'Options', fields, frozen=True, namespace={'validate': _validate}
  )


def _type_name(field: dataclasses.Field) -> str:
  """The field's type as text, which it is already under postponed annotations."""
  return field.type if isinstance(field.type, str) else field.type.__name__


def _described(field: dataclasses.Field) -> tuple[Any, ...]:
  return field.metadata['help'], *field.metadata['checks']


def _validate(self: Any) -> None:
  """Checks the values.

  Raises:
    UsageError: names the flag, its value and what it may be.
  """
  for field in dataclasses.fields(self):
    value = getattr(self, field.name)
    if isinstance(value, int) and value > _MAX_INT:
      raise UsageError(f'--{field.name}={value}: must be at most {_MAX_INT}.')
    for check in field.metadata['checks']:
      if wrong := check(value):
        raise UsageError(f'--{field.name}={value}: {wrong}.')
