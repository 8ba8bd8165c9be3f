"""Finished points in a file, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

import jax
import numpy as np

_ENTRY = re.compile(rb'(\d+) (-?(?:0x[01]\.[0-9a-f]+p[+-]\d+|inf|nan))\n')


class Record:
  """The values of the points that are finished, and the file that keeps them.

  The file's first line tells what is evaluated. Each further line is the index of a
  point and its value in hexadecimal, which is read back bit for bit. Lines from the
  first damaged one on, as a killed run leaves one, are cut off. A file that tells of
  something else is started anew.

  Attributes:
    path: the file, or None.
    digest: what tells one landscape from another; empty without a file.
    num_points: of the whole landscape.
    values: the finished ones, by index.
  """

  def __init__(self, path: str | os.PathLike[str] | None, num_points: int, facts: Any):
    """Opens the file; None keeps the values in memory only.

    Args:
      path: the file, made if it is missing; its folder must exist.
      num_points: of the whole landscape.
      facts: pytree of arrays, numbers and text that tells one landscape from another.
    """
    self.path = path
    self.digest = ''
    self.num_points = num_points
    self.values: dict[int, float] = {}
    self._file = None
    if path is not None:
      self.digest = _digest(facts)
      self._file = open(path, 'a+b')  # noqa: SIM115
      self._restore(f'sam_jax landscape 1 {self.digest}\n'.encode())

  def __enter__(self) -> Record:
    return self

  def __exit__(self, *_: Any) -> None:
    if self._file is not None:
      self._file.close()

  @property
  def missing(self) -> list[int]:
    """The points still to be evaluated, ascending."""
    return [index for index in range(self.num_points) if index not in self.values]

  def add(self, index: int, value: float) -> None:
    """Keeps a finished point; it is with the operating system on return."""
    self.values[index] = value
    if self._file is not None:
      self._file.write(f'{index} {value.hex()}\n'.encode())
      self._file.flush()

  def array(self, shape: tuple[int, ...]) -> np.ndarray:
    """All values, float64, once every point is finished."""
    return np.array([self.values[i] for i in range(self.num_points)]).reshape(shape)

  def _restore(self, header: bytes) -> None:
    self._file.seek(0)
    first, *entries = self._file.readlines() or [b'']
    if first != header:
      self._file.truncate(0)
      self._file.write(header)
      self._file.flush()
      return
    size = len(header)
    for entry in entries:
      match = _ENTRY.fullmatch(entry)
      if match is None or int(match[1]) >= self.num_points:
        break
      self.values[int(match[1])] = float.fromhex(match[2].decode())
      size += len(entry)
    self._file.truncate(size)


def _digest(facts: Any) -> str:
  """Changes with the structure and with every bit of the leaves."""
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_flatten_with_path(facts)[0]:
    array = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
