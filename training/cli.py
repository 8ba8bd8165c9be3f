"""What the scripts share: flags, help, and errors as one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence

from absl import flags

from training import files, methods
from training.config import Config
from training.errors import TrainingDiverged, UsageError

USAGE_EXIT_CODE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_NO_READER = 141  # 128 + SIGPIPE
# Texts that name one of a few things.
_CHOICES = ('optimizer', 'base_optimizer', 'schedule', 'dtype')
_HELP = ('--help', '-h', '-help', '--helpfull', '--helpshort')


class Flags:
  """A script's own flags, without those that libraries define.

  Every flag has a name, a kind ('str', 'int', 'float', 'bool' or 'list'), a help text
  and a default, None if unset. A flag of several values is read as a list of texts,
  which `split` turns into values of its kind.
  """

  def __init__(self):
    """Starts without flags."""
    self._values = flags.FlagValues()
    self._lines: list[str] = []
    self._several: dict[str, str] = {}

  def heading(self, text: str) -> None:
    """Starts a group in the help."""
    self._lines.append(f'\n{text}:')

  def define(
    self, name: str, kind: str, help_text: str, default=None, *, several: bool = False
  ) -> None:
    """Defines one flag; with several, one that takes values separated by commas."""
    parsers = {'int': _Integer, 'float': _Float}
    if several:
      self._several[name] = kind
      flags.DEFINE_list(name, default, help_text, flag_values=self._values)
    elif kind in parsers:
      serializer = flags.ArgumentSerializer()
      flags.DEFINE(parsers[kind](), name, default, help_text, self._values, serializer)
    else:
      definers = {
        'str': flags.DEFINE_string,
        'bool': flags.DEFINE_boolean,
        'list': flags.DEFINE_list,
      }
      definers[kind](name, default, help_text, flag_values=self._values)
    shown = f'--[no]{name}' if kind == 'bool' else f'--{name}={_metavar(kind)}'
    if default not in (None, '', False):
      help_text = f'{help_text} (default: {default})'
    lines = textwrap.wrap(help_text, 88 - 27)
    first = f'  {shown:<24} {lines[0]}'
    if len(shown) > 24:
      first = f'  {shown}\n{" " * 27}{lines[0]}'
    self._lines += [first, *(' ' * 27 + line for line in lines[1:])]

  def define_config(self, *, recipe: Config | None = None, keys: str = '') -> None:
    """Defines a flag for each field of Config that is a single value.

    Numbers and choices take several values. Texts, such as names of files, are taken
    whole.

    Args:
      recipe: the help shows its values.
      keys: what --model changes, with its values, for the help.
    """
    for field in config_fields():
      kind = str(field.type).removesuffix(' | None')
      value = keys if field.name == 'model' else getattr(recipe, field.name, None)
      here = '' if value in (None, '') else f' (here: {value})'
      several = kind != 'str' or field.name in _CHOICES
      self.define(field.name, kind, field.metadata['help'] + here, several=several)

  def define_methods(self, names: Sequence[str]) -> None:
    """Defines a flag for each argument of some methods."""
    for flag, spec in methods.flags(names).items():
      owners = ', '.join(methods.owners(flag, names))
      default = '' if spec.default is None else f' (default: {spec.default})'
      text = f'{owners}: {spec.help}{default}'
      self.define(flag, spec.kind, text, several=spec.kind != 'bool')

  def split(
    self, names: Sequence[str]
  ) -> tuple[dict[str, object], dict[str, list[object]]]:
    """What the command line sets of Config and of the arguments of some methods.

    Returns:
      The single values by name, and by name those of which there are several.

    Raises:
      UsageError: an entry that is empty, not of the flag's kind, or there twice.
    """
    single, swept = {}, {}
    known = [field.name for field in config_fields()] + list(methods.flags(names))
    for name in known:
      given = self._values[name].value
      if given is None:
        continue
      if name in self._several:
        found = values(name, self._several[name], given)
        if len(found) > 1:
          swept[name] = found
          continue
        (given,) = found
      single[name] = given
    return single, swept

  def parse(
    self, argv: Sequence[str], usage: str | Callable[[], str]
  ) -> flags.FlagValues:
    """Parses a command line; prints the help and leaves where it is asked for.

    Args:
      argv: the command line, the script's name first.
      usage: what the help begins with, or what makes it.

    Raises:
      UsageError: an argument that is not a flag.
      flags.Error: an unknown flag or a value of the wrong kind.
    """
    if any(argument in _HELP for argument in argv[1:]):
      usage = usage if isinstance(usage, str) else usage()
      print(usage.strip() + '\n' + '\n'.join(self._lines), flush=True)
      raise SystemExit(0)
    rest = self._values(list(argv))[1:]
    if rest:
      raise UsageError(
        f'unexpected argument {rest[0]!r}: flags are given as --name=value.'
      )
    # Libraries that define absl flags of their own expect them parsed.
    flags.FLAGS.mark_as_parsed()
    return self._values


def config_fields() -> list[dataclasses.Field]:
  """The fields of Config that are flags."""
  fields = dataclasses.fields(Config)
  return [field for field in fields if field.name != 'hyperparameters']


def named(argv: Sequence[str], flag: str) -> str:
  """The value of a flag in a command line that is not parsed yet; '' without one."""
  values = ''
  for before, argument in zip(['', *argv], argv, strict=False):
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name == flag and equals:
      values = value
    elif before.lstrip('-') == flag and before.startswith('-'):
      values = argument
  return values


def entries(name: str, texts: Sequence[str] | None) -> Sequence[str] | None:
  """The entries of a list flag, None if it is unset.

  Raises:
    UsageError: it is empty, or one of them is, or there are two of one.
  """
  if texts is None:
    return None
  if not all(texts or ['']):
    raise UsageError(
      f'--{name}={",".join(texts)} has an empty entry: give one or more, as A,B.'
    )
  _refuse_twice(name, texts, texts)
  return texts


def _refuse_twice(name: str, texts: Sequence[str], values: Sequence[object]) -> None:
  for place, value in enumerate(values):
    if value in values[:place]:
      raise UsageError(f'--{name}={",".join(texts)} has {texts[place]} twice.')


def values(name: str, kind: str, texts: Sequence[str]) -> list[object]:
  """The values of a flag that takes several.

  Args:
    name: of the flag.
    kind: 'int', 'float' or 'str'.
    texts: the entries, at least one.

  Raises:
    UsageError: an entry is empty, not of this kind, or there twice.
  """
  texts = list(entries(name, texts))
  if kind == 'str':
    return texts
  parser, what, example = {
    'int': (_Integer(), 'whole numbers', '1,2'),
    'float': (_Float(), 'numbers', '0.05,0.1'),
  }[kind]
  found = []
  for text in texts:
    try:
      found.append(parser.convert(text))
    except ValueError:
      raise UsageError(
        f'--{name}={",".join(texts)}: give one or more {what}, as {example}; {text!r} '
        'is not a number of this kind.'
      ) from None
  _refuse_twice(name, texts, found)
  return found


def _plain(text: object) -> object:
  """A number's text as people write it; Python would read 0_1 as 1."""
  if isinstance(text, str) and '_' in text:
    raise ValueError(f'{text!r} is not a number')
  return text


class _Integer(flags.IntegerParser):
  """Parses integers, without Python's underscores."""

  def convert(self, argument: int | str) -> int:
    """The value of a text."""
    return super().convert(_plain(argument))


class _Float(flags.FloatParser):
  """Parses numbers, without Python's underscores."""

  def convert(self, argument: float | int | str) -> float:
    """The value of a text."""
    return super().convert(_plain(argument))


def run(
  main: Callable[[Sequence[str]], None],
  argv: Sequence[str],
  *,
  errors: tuple[type[Exception], ...] = (),
) -> int:
  """Runs a script's main function.

  Args:
    main: takes the command line.
    argv: the command line, the script's name first.
    errors: further exceptions whose message is written for the user.

  Returns:
    The exit code: 0, 2 after an error of the user's or a full disk, which is printed on
    stderr, 130 after Ctrl-C, or 141 if nobody reads what is printed.
  """
  name = argv[0].rsplit('/', 1)[-1]
  with warnings.catch_warnings():
    warnings.showwarning = lambda message, *_, **__: print(
      f'{name}: warning: {message}', file=sys.stderr
    )
    try:
      main(argv)
      sys.stdout.flush()
    except (UsageError, TrainingDiverged, flags.Error, *errors) as error:
      message = ' '.join(str(error).split())
      if isinstance(error, flags.Error):
        # The library quotes some of its reasons as tuples.
        message = re.sub(r"\('([^']*)', .*\)", r'\1', message)
        message = f'{message.rstrip(".")}: see --help for the flags and their values.'
      print(f'{name}: {message}', file=sys.stderr)
      return USAGE_EXIT_CODE
    except KeyboardInterrupt:
      print(
        f'\n{name}: interrupted; the same command goes on from here.', file=sys.stderr
      )
      return _INTERRUPTED
    except BrokenPipeError:
      _discard_output()
      return _NO_READER
    except OSError as error:
      message = files.explain(error, _folders(argv))
      if message is None:
        raise
      print(f'{name}: {message}', file=sys.stderr)
      return USAGE_EXIT_CODE
  return 0


def _folders(argv: Sequence[str]) -> list[str]:
  """The folders of a command line that a script writes into."""
  given = [*named(argv, 'workdir').split(','), *named(argv, 'out').split(',')]
  return [folder for folder in given if folder] + ['runs']


def _discard_output() -> None:
  """Lets the interpreter's last flush of stdout succeed."""
  with contextlib.suppress(OSError, ValueError, AttributeError):
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)


def _metavar(kind: str) -> str:
  return {'str': 'TEXT', 'int': 'N', 'float': 'X', 'list': 'A[,B...]'}[kind]
