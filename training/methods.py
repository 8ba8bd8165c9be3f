"""The sharpness-aware methods by name: the library's, and those in a user's file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sam_jax import methods as library
from training import plugins
from training.errors import UsageError


@functools.cache
def found() -> dict[str, Callable[..., Any]]:
  """The library's methods."""
  return library.find()


def get(name: str) -> Callable[..., Any] | None:
  """A method by its name, or from a file or module; None for what is no method.

  Args:
    name: a name of `found`, or a Python file or module that declares one method.

  Raises:
    UsageError: a file that cannot be imported, or declares no method or several.
  """
  if name in found():
    return found()[name]
  if not plugins.is_reference(name):
    return None
  own = library.declared(plugins.load('optimizer', name))
  if len(own) != 1:
    raise UsageError(
      f'--optimizer={name} declares {len(own)} methods ({", ".join(own)}): a file of '
      'your own declares one, with sam_jax.methods.method.'
    )
  function = next(iter(own.values()))
  if 'rho' not in library.hyperparameters(function):
    raise UsageError(
      f'--optimizer={name}: {function.__name__} has no argument rho, the radius that '
      'every method has; give it one, with a default.'
    )
  return function


def is_method(name: str) -> bool:
  """Whether an optimizer's name is that of a method and not of a base optimizer."""
  return name in found() or plugins.is_reference(name)


@functools.cache
def hyperparameters(name: str) -> dict[str, library.Hyperparameter]:
  """The arguments of a method that a user sets, by name; rho is one of them."""
  function = get(name)
  return library.hyperparameters(function) if function else {}


def flags(names: Iterable[str]) -> dict[str, library.Hyperparameter]:
  """The hyperparameters of several methods by flag, but rho; first come first."""
  by_flag: dict[str, library.Hyperparameter] = {}
  for name in names:
    for spec in hyperparameters(name).values():
      if spec.name != 'rho':
        by_flag.setdefault(spec.flag, spec)
  return by_flag


def owners(flag: str, names: Iterable[str]) -> list[str]:
  """Those of some methods that have a flag."""
  return [
    name
    for name in names
    if any(spec.flag == flag for spec in hyperparameters(name).values())
  ]


def resolve(name: str, *given: Mapping[str, Any]) -> dict[str, Any]:
  """The values of all hyperparameters of a method but rho.

  Args:
    name: of the method.
    *given: values by argument; later ones win over earlier ones and over defaults.

  Raises:
    UsageError: a value that cannot be, or an argument that the method does not have.
  """
  specs = hyperparameters(name)
  values = {key: spec.default for key, spec in specs.items() if key != 'rho'}
  for some in given:
    for key, value in some.items():
      if key == 'rho':
        continue
      if key not in values:
        raise UsageError(
          f'{name} has no argument {key!r}: choose from {", ".join(values) or "none"}.'
        )
      values[key] = value
  for key, value in values.items():
    _check(specs[key], value)
  return values


def build(
  name: str, rho: Any, values: Mapping[str, Any], provided: Mapping[str, Any]
) -> Any:
  """The transformation of a method.

  Args:
    name: of the method.
    rho: its radius, a number or a traced scalar.
    values: of its other hyperparameters, as `resolve` gives them.
    provided: what the training loop knows by the name of the argument that takes it;
      those that the method does not ask for are left out.

  Raises:
    UsageError: values that the method refuses.
  """
  function, specs = get(name), hyperparameters(name)
  wanted = inspect.signature(function).parameters
  try:
    return function(
      rho=rho,
      **{key: _check(specs[key], value) for key, value in values.items()},
      **{key: provided[key] for key in wanted if key in provided},
    )
  except ValueError as error:  # arguments that do not go together
    raise UsageError(f'--optimizer={name}: {error}') from error


def _check(spec: library.Hyperparameter, value: Any) -> Any:
  try:
    return spec.check(value)
  except ValueError as error:
    raise UsageError(str(error)) from error
