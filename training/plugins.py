"""Tasks and methods of a user's own: Python files and modules outside this project."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import types

from training.errors import UsageError


def is_reference(name: str) -> bool:
  """Whether a name is that of a file or of a module in a package."""
  return name.endswith('.py') or '.' in name


def absolute(name: str) -> str:
  """A reference that means the same from every folder; other names are unchanged."""
  return (
    str(pathlib.Path(name).expanduser().resolve()) if name.endswith('.py') else name
  )


@functools.cache
def load(flag: str, reference: str) -> types.ModuleType:
  """Imports a file or a module once.

  Args:
    flag: the flag that names it, for messages.
    reference: path of a Python file, or a module as package.module.

  Raises:
    UsageError: there is none. What its code raises is shown as it is.
  """
  if not reference.endswith('.py'):
    try:
      return importlib.import_module(reference)
    except ModuleNotFoundError as error:
      if error.name and reference.startswith(error.name):
        raise UsageError(
          f'--{flag}={reference}: there is no such module; give package.module that '
          'Python finds, or the path of a .py file.'
        ) from error
      raise
  path = pathlib.Path(reference).expanduser()
  if not path.is_file():
    raise UsageError(f'--{flag}={reference}: there is no such file.')
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
