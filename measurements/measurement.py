"""What a file of this package declares, and how its numbers are shown."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sam_jax.measuring.entries import estimate as estimate
from sam_jax.measuring.page import Rows as Rows
from sam_jax.measuring.page import Section as Section
from sam_jax.measuring.page import number as number
from sam_jax.measuring.page import with_error as with_error

if TYPE_CHECKING:
  from measurements.context import Context

Summary = Mapping[str, Any]


class Column(NamedTuple):
  """A column of the comparison: its heading and where a summary has the number.

  The standard error of the entry `name` is the entry `name_standard_error` beside it.

  Attributes:
    heading: above the column.
    path: the keys that lead to the number.
    scale: the number is shown times this.
  """

  heading: str
  path: tuple[str, ...]
  scale: float = 1.0


class Figure(NamedTuple):
  """A figure that is drawn from a result file.

  Attributes:
    name: of the PNG file.
    source: the file in `hessian/` that holds what is drawn.
    load: reads it.
    plot: draws one result with ``title=``, or several by name side by side.
    single: whether it is drawn of a single network.
    several: whether it is drawn of several side by side.
  """

  name: str
  source: str
  load: Callable[[pathlib.Path], Any]
  plot: Callable[..., Any]
  single: bool = True
  several: bool = True


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """The options of a measurement that has none."""


class Measurement(NamedTuple):
  """A measurement; the file that declares it as `MEASUREMENT` gives it its name.

  Attributes:
    run: measures; what it returns becomes part of `summary.json`.
    options: a frozen dataclass of `option` fields, each a flag of `eval_hessian.py`.
    needs: measurements that run before it, whose results it reads.
    order: measurements run and are shown in ascending order.
    switch: the option without which there is nothing to measure, if there is one.
    check: refuses what cannot be measured, before anything is.
    columns: of the comparison, given a summary.
    details: headings and texts for the table of single runs, given a summary in which
      its entries may be missing.
    sections: further tables, given summaries by the name of the run.
    reading: sentences that say what the columns are, given a summary that has one.
    notes: what entries of `summary.json` are, by name.
    figures: what is drawn.
    files: result files that are no figure's source.
    hook: measures cheaply enough to be called while a network is trained.
  """

  run: Callable[[Context], dict[str, Any]]
  options: type = NoOptions
  needs: tuple[str, ...] = ()
  order: int = 100
  switch: str = ''
  check: Callable[[Context], None] = lambda context: None
  columns: Callable[[Summary], Sequence[Column]] = lambda summary: ()
  details: Callable[[Summary], Sequence[tuple[str, str]]] = lambda summary: ()
  sections: Callable[[Mapping[str, Summary]], Sequence[Section]] = lambda summaries: ()
  reading: Callable[[Summary], str] = lambda summary: ''
  notes: Mapping[str, str] = {}
  figures: tuple[Figure, ...] = ()
  files: tuple[str, ...] = ()
  hook: Callable[[Context], dict[str, Any]] | None = None


def option(default: Any, help_text: str, *checks: Callable[[Any], str]) -> Any:
  """A field of a measurement's options.

  Args:
    default: its value where the flag is not given.
    help_text: the flag's help.
    *checks: functions of the value that say what it must be, '' where it is.
  """
  metadata = {'help': help_text, 'checks': checks}
  return dataclasses.field(default=default, metadata=metadata)


def at_least(least: int) -> Callable[[Any], str]:
  """A check: a value of at least this."""
  return lambda value: '' if value >= least else f'must be at least {least}'


def at_most(most: float) -> Callable[[Any], str]:
  """A check: a value of at most this."""
  return lambda value: '' if value <= most else f'must be at most {most:g}'


def one_of(*choices: str) -> Callable[[str], str]:
  """A check: one of these values."""
  return lambda value: '' if value in choices else f'choose one of {", ".join(choices)}'


def above_zero(value: float) -> str:
  """A check: finite and above 0."""
  return '' if 0 < value < math.inf else 'must be above 0'


def not_negative(value: float) -> str:
  """A check: finite and not below 0."""
  return '' if 0 <= value < math.inf else 'must not be negative'


def points(value: int) -> str:
  """A check: the points a side of a grid, or 0."""
  most = 1001  # A surface of more would take a year.
  good = value == 0 or 2 <= value <= most
  return '' if good else f'must be 0, or at least 2 and at most {most}'


def entry(summary: Summary, path: Sequence[str]) -> Any:
  """What stands at a path in a summary; None if it was not measured."""
  for name in path:
    summary = (summary or {}).get(name)
  return summary
