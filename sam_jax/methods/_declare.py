"""How a method says what a training loop and a command line must know of it.

The traits of a method stand in its decorator. Its hyperparameters are read from its
signature and docstring, so that they are written down once.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from sam_jax import ascent

PROVIDED = (
  'inner',
  'learning_rate',
  'total_steps',
  'steps_per_epoch',
  'axis_name',
  'key',
  'perturbation',
  'momentum',
)
_KINDS = {float: 'float', int: 'int', bool: 'bool', str: 'str'}
# Of float32, in which a step computes: what is smaller vanishes.
_FLOAT32_RANGE = 1.1754944e-38, 3.4028234e38
_BOOLS = {'true': True, 'false': False}
_Function = TypeVar('_Function', bound=Callable)


def lost_in_float32(number: float) -> str:
  """Why a number cannot be an argument of a step, '' where it can.

  >>> lost_in_float32(0.1), lost_in_float32(1e-60)
  ('', 'float32 has 0 and numbers from 1.2e-38 to 3.4e+38 only')
  """
  smallest, largest = _FLOAT32_RANGE
  if not number or smallest <= abs(number) <= largest:
    return ''
  return f'float32 has 0 and numbers from {smallest:.2g} to {largest:.2g} only'


@dataclasses.dataclass(frozen=True)
class Traits:
  """What a training loop must know of a method.

  Attributes:
    wraps_base: it takes the base chain as its argument ``inner``, instead of preceding
      the chain.
    one_gradient: it takes one gradient an update, at `sam_jax.gradient_point`, so that
      the loss at w itself is not known there.
    chooses_examples: its gradient function takes the indices of examples.
    period: name of the argument that holds the number of updates from one ascent step
      to the next; None where every update has one.
    needs_momentum: the base optimizer must have a momentum buffer.
    flags: command-line names of the arguments that are not called
      ``<method>_<argument>``.
  """

  wraps_base: bool = False
  one_gradient: bool = False
  chooses_examples: bool = False
  period: str | None = None
  needs_momentum: bool = False
  flags: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Bounds:
  """The range of a number, as `typing.Annotated` metadata of an argument.

  Attributes:
    least: smallest value.
    most: largest value.
    above: every value is larger than this.
    below: every value is smaller than this.
  """

  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None

  def allow(self, value: float) -> bool:
    """Whether a number is inside."""
    return (
      (self.least is None or value >= self.least)
      and (self.most is None or value <= self.most)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
    )

  def __str__(self) -> str:
    """The range in words: 'at least 0 and below 1'."""
    words = ('at least', self.least), ('above', self.above)
    words += ('at most', self.most), ('below', self.below)
    return ' and '.join(f'{word} {x:g}' for word, x in words if x is not None)


@dataclasses.dataclass(frozen=True)
class Choices:
  """The words for an argument's values, as `typing.Annotated` metadata of it.

  Attributes:
    values: from each word of the command line to the value that the method takes.
  """

  values: Mapping[str, Any]


Radius = Annotated[ascent.ScalarOrSchedule, Bounds(least=0)]


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
  """An argument of a method that a user may set.

  Attributes:
    name: of the argument.
    flag: its name on the command line and in a configuration.
    kind: 'float', 'int', 'bool' or 'str'.
    default: the value that stands for leaving the argument out, as `check` takes it.
    help: the first sentence that the docstring says of it.
    optional: whether None is a value.
    bounds: the range of a number.
    choices: from the words that are allowed to the values they stand for; None where
      the value is given itself.
  """

  name: str
  flag: str
  kind: str
  default: Any
  help: str
  optional: bool = False
  bounds: Bounds = Bounds()
  choices: Mapping[str, Any] | None = None

  def check(self, value: Any) -> Any:
    """Converts a value of the command line or of a file to that of the argument.

    Args:
      value: a number, a bool, a text that reads as one, or None where that is allowed;
        with choices one of their words.

    Returns:
      What the method takes.

    Raises:
      ValueError: the value is not of this kind, not finite, or out of bounds.

    >>> import sam_jax
    >>> gamma = sam_jax.methods.hyperparameters(sam_jax.wsam)['gamma']
    >>> gamma.check('0.5')
    0.5
    >>> gamma.check(1)
    Traceback (most recent call last):
      ...
    ValueError: --wsam_gamma=1: must be at least 0 and below 1.
    """
    if self.choices is not None:
      if not isinstance(value, str) or value not in self.choices:
        raise self._error(value, f'choose one of {", ".join(self.choices)}')
      return self.choices[value]
    if value is None and self.optional:
      return None
    converted = self._convert(value)
    if self.kind in ('float', 'int') and not self.bounds.allow(converted):
      raise self._error(value, f'must be {self.bounds}')
    return converted

  def _convert(self, value: Any) -> Any:
    """The value as one of this kind."""
    if self.kind == 'str' and isinstance(value, str):
      return value
    if self.kind == 'bool':
      truth = _BOOLS.get(value.lower()) if isinstance(value, str) else value
      if isinstance(truth, bool):
        return truth
    if self.kind in ('float', 'int') and not isinstance(value, bool):
      try:
        number = float(value)
      except (TypeError, ValueError):
        number = math.nan
      if math.isfinite(number) and self.kind == 'float':
        if reason := lost_in_float32(number):
          raise self._error(value, reason)
        return number
      if math.isfinite(number) and number == int(number):
        return int(number)
    wanted = {
      'float': 'a finite number',
      'int': 'a whole number',
      'bool': 'true or false',
      'str': 'a text',
    }
    raise self._error(value, f'must be {wanted[self.kind]}')

  def _error(self, value: Any, reason: str) -> ValueError:
    return ValueError(f'--{self.flag}={value}: {reason}.')


def method(
  *,
  one_gradient: bool = False,
  chooses_examples: bool = False,
  period: str | None = None,
  needs_momentum: bool = False,
  flags: Mapping[str, str] | None = None,
) -> Callable[[_Function], _Function]:
  """Declares a function as a method, with what a training loop must know of it.

  The function comes back unchanged but for its attribute ``traits``. Its arguments are
  hyperparameters (see `hyperparameters`), except those that the loop provides by their
  names: ``inner``, the base chain; ``learning_rate``, its schedule; ``total_steps`` and
  ``steps_per_epoch``, in updates; ``axis_name``, of the mapped axis; ``key``, a seed.

  Args:
    one_gradient: whether it takes one gradient an update, at `sam_jax.gradient_point`.
    chooses_examples: whether its gradient function takes the indices of examples.
    period: name of the argument that is its period in updates.
    needs_momentum: whether the base optimizer must have a momentum buffer.
    flags: command-line names of arguments; ``<method>_<argument>`` for those left out,
      and ``rho`` for the radius.

  Returns:
    A decorator.

  Raises:
    ValueError: period or flags name an argument that the function has not.

  >>> import sam_jax
  >>> @sam_jax.methods.method()
  ... def double_sam(rho: float = 0.05, *, axis_name: str | None = None):
  ...   return sam_jax.sam(2 * rho, axis_name=axis_name)
  >>> double_sam.traits.wraps_base
  False
  >>> list(sam_jax.methods.hyperparameters(double_sam))
  ['rho']
  """

  def declare(function: _Function) -> _Function:
    arguments = inspect.signature(function).parameters
    for name in (*(flags or ()), *([period] if period else [])):
      if name not in arguments:
        raise ValueError(
          f'{function.__name__} has no argument {name!r}, which its declaration names.'
        )
    function.traits = Traits(
      wraps_base='inner' in arguments,
      one_gradient=one_gradient,
      chooses_examples=chooses_examples,
      period=period,
      needs_momentum=needs_momentum,
      flags=types.MappingProxyType(dict(flags or {})),
    )
    return function

  return declare


def hyperparameters(function: Callable) -> dict[str, Hyperparameter]:
  """Reads the hyperparameters of a method from its signature and docstring.

  They are the arguments that hold a number, a bool or a text, or that are annotated
  with `Choices`, other than those that a training loop provides (`PROVIDED`). Arguments
  of any other kind, such as functions, are for callers in Python and need a default.

  Args:
    function: a declared method.

  Returns:
    The hyperparameters by the name of their argument, in the order of the signature.

  Raises:
    TypeError: an argument without a default, or a function that is not declared.

  >>> import sam_jax
  >>> every = sam_jax.methods.hyperparameters(sam_jax.looksam)['every']
  >>> every.flag, every.kind, every.default, str(every.bounds)
  ('looksam_every', 'int', 5, 'at least 1')
  """
  if not is_method(function):
    raise TypeError(
      f'{function!r} is no method: declare it with sam_jax.methods.method.'
    )
  hints = inspect.get_annotations(function, eval_str=True)
  texts = _argument_texts(function)
  found = {}
  for name, parameter in inspect.signature(function).parameters.items():
    if name in PROVIDED:
      continue
    if parameter.default is parameter.empty:
      raise TypeError(
        f'{function.__name__}({name}) has no default: give it one, or the name of what '
        f'a training loop provides ({", ".join(PROVIDED)}).'
      )
    flag = 'rho' if name == 'rho' else f'{function.__name__}_{name}'
    read = _read(hints.get(name, type(parameter.default)), parameter.default)
    if read:
      flag = function.traits.flags.get(name, flag)
      found[name] = Hyperparameter(name, flag, help=texts.get(name, ''), **read)
  return found


def _read(hint: Any, default: Any) -> dict[str, Any] | None:
  """Kind, default, bounds and choices of an argument; None if it is not for users."""
  metadata = getattr(hint, '__metadata__', ())
  for choices in (x for x in metadata if isinstance(x, Choices)):
    same = lambda value: type(value) is type(default) and value == default
    (word,) = (w for w, value in choices.values.items() if same(value))
    return {'kind': 'str', 'default': word, 'choices': choices.values}
  plain = hint.__origin__ if metadata else hint
  members = _members(plain)
  kinds = [kind for kind in _KINDS if kind in members]
  if not kinds:
    return None
  # Bounds may also stand in one member of a union: Annotated[int, Bounds(1)] | None.
  for member in typing.get_args(plain):
    metadata += getattr(member, '__metadata__', ())
  bounds = [x for x in metadata if isinstance(x, Bounds)]
  return {
    'kind': _KINDS[kinds[0]],
    'default': default,
    'optional': type(None) in members,
    'bounds': bounds[0] if bounds else Bounds(),
  }


def _members(hint: Any) -> list[Any]:
  """The types of a union, or the one type."""
  if typing.get_origin(hint) is Annotated:
    return _members(hint.__origin__)
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return [m for member in typing.get_args(hint) for m in _members(member)]
  return [hint]


def _argument_texts(function: Callable) -> dict[str, str]:
  """The first sentence that a docstring's ``Args`` section says of each argument."""
  section = re.search(
    r'^Args:\n(.*?)(?=^\S|\Z)', inspect.getdoc(function) or '', re.DOTALL | re.MULTILINE
  )
  entries = re.findall(
    r'^  (\w+): (.*(?:\n    .*)*)', section[1] if section else '', re.MULTILINE
  )
  return {name: _first_sentence(text) for name, text in entries}


def _first_sentence(text: str) -> str:
  """One sentence on one line, without markup and without its full stop."""
  line = re.sub(r'\s+', ' ', text).strip()
  line = re.sub(r':math:|`', '', line)
  return re.split(r'\.(?: |$)', line, maxsplit=1)[0]


def is_method(value: Any) -> bool:
  """Whether a value is a function declared with `method`."""
  return callable(value) and isinstance(getattr(value, 'traits', None), Traits)


def declared(module: types.ModuleType) -> dict[str, Callable]:
  """The methods that a module declares itself, by name, in the order of their text.

  Args:
    module: a module of this package, or of a user's own.

  Returns:
    From the name of each function to the function; methods that the module imports are
    left out.

  >>> from sam_jax.methods import _wsam
  >>> list(declared(_wsam))
  ['wsam', 'decoupled_wsam']
  """
  return {
    value.__name__: value
    for value in vars(module).values()
    if is_method(value) and value.__module__ == module.__name__
  }


def find() -> dict[str, Callable]:
  """Every method of this package by name: SAM's own file first, then by file name.

  Returns:
    From the name of each function to the function.

  Raises:
    ValueError: two files declare methods of one name.

  >>> import sam_jax
  >>> sam_jax.methods.find()['gsam'] is sam_jax.gsam
  True
  """
  package = importlib.import_module(__package__)
  names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
  names.sort(key=lambda name: name != '_sam')
  methods: dict[str, Callable] = {}
  for name in names:
    for found, function in declared(
      importlib.import_module(f'{__package__}.{name}')
    ).items():
      if found in methods:
        raise ValueError(f'two files of {__package__} declare a method {found!r}.')
      methods[found] = function
  return methods
