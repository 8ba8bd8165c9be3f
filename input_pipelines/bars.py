"""Progress bars on a terminal; without the package tqdm nothing is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO


@contextlib.contextmanager
def counted(total: int, title: str, unit: str) -> Iterator[Callable[[], Any]]:
  """Shows how many things have been done.

  Args:
    total: number of things there are to do.
    title: text before the bar.
    unit: plural of what is counted, such as `'images'`.

  Yields:
    A function to call once after each thing.

  >>> with counted(2, 'cats.zip', 'images') as done:
  ...   for _ in range(2):
  ...     _ = done()
  """
  tqdm = _tqdm()
  if tqdm is None:
    yield lambda: None
    return
  with tqdm.tqdm(total=total, unit=f' {unit}', **_options(title)) as bar:
    yield bar.update


def reading(
  stream: BinaryIO, total: int | None, title: str
) -> contextlib.AbstractContextManager[BinaryIO]:
  """Shows how much of a stream has been read.

  Args:
    stream: the stream; the bar follows its method `read`.
    total: its length in bytes, None if it is not known.
    title: text before the bar.

  Returns:
    A context that yields the stream to read from in place of the given one.

  >>> import io
  >>> with reading(io.BytesIO(b'abc'), 3, 'cats.zip') as visible:
  ...   visible.read()
  b'abc'
  """
  tqdm = _tqdm()
  if tqdm is None:
    return contextlib.nullcontext(stream)
  return tqdm.tqdm.wrapattr(stream, 'read', total=total, **_options(title))


def _options(title: str) -> dict[str, Any]:
  return {'desc': title, 'disable': None, 'leave': False}


def _tqdm() -> Any:
  try:
    import tqdm
  except ModuleNotFoundError:
    return None
  return tqdm
