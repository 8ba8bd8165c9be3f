"""What the system refuses about a run's files, as one sentence."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence

_FREE = 'free some space; the same command goes on from here'
_MOVE = 'move it away, or choose another folder'
_WRITE = 'make it writable, or choose another folder'
# Whichever file was being written: the system names none.
_FULL = {errno.ENOSPC: _FREE, errno.EDQUOT: _FREE, errno.EFBIG: _FREE}
_OTHER = {
  errno.ENAMETOOLONG: 'choose a shorter one',
  errno.ENOTDIR: _MOVE,
  errno.EISDIR: _MOVE,
  errno.EACCES: _WRITE,
  errno.EROFS: _WRITE,
}


def explain(error: OSError, folders: Sequence[str]) -> str | None:
  """What to do about an error of the system.

  Args:
    error: what was raised.
    folders: those that a command line names; a pattern means what it begins with.

  Returns:
    A sentence, or None if the error is a fault of the program or of another file.
  """
  path = error.filename
  where = '' if path is None else f'{os.fsdecode(path)}: '
  if error.errno in _FULL:
    return f'{where}{error.strerror}: {_FULL[error.errno]}.'
  if error.errno not in _OTHER or not isinstance(path, str | bytes | os.PathLike):
    return None
  path = os.path.abspath(os.fsdecode(path))
  stems = [os.path.abspath(re.split(r'[*?[]', folder)[0]) for folder in folders]
  if not any(path.startswith(stem) or stem.startswith(path) for stem in stems):
    return None
  return f'{where}{error.strerror}: {_OTHER[error.errno]}.'


def no_space(error: BaseException) -> OSError | None:
  """The error of a full disk that another library has put into words of its own."""
  for number in _FULL:
    if os.strerror(number) in str(error):
      return OSError(number, os.strerror(number))
  return None
