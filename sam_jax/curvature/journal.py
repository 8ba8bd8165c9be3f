"""Products written down, so that a computation that was killed need not repeat them."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import placing
from sam_jax.curvature.operators import Operator, Params
from sam_jax.curvature.transforms import paths

_DIGEST = 32  # bytes


class JournaledOperator(Operator):
  """An operator whose products are kept in a file; made by `journaled`.

  Attributes:
    num_matvecs: number of products asked for.
    num_computed: how many of them this process has computed.
  """

  def __init__(
    self,
    inner: Operator,
    path: str | os.PathLike[str],
    identity: str,
    max_gib: float,
  ):
    super().__init__(self._product, inner.structure)
    self.num_computed = 0
    self._inner = inner
    self._path = pathlib.Path(path)
    self._leaves, self._treedef = jax.tree.flatten(self.structure)
    if not all(map(placing.is_addressable, self._leaves)):
      raise ValueError(
        'the operator has vectors on devices of several processes, and a journal is '
        'the file of one: leave it out there'
      )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in self._leaves)
    self._entry = _DIGEST + size + _DIGEST
    self._room = max_gib * 2**30
    header = self._header(identity)
    # The file is known to be right up to here.
    self._end = len(header)
    self._replays = self._begins_with(header)
    if not self._replays:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._path.write_bytes(header)

  def _header(self, identity: str) -> bytes:
    shapes = [(list(leaf.shape), leaf.dtype.name) for leaf in self._leaves]
    facts = {
      'format': 'sam_jax products 1',
      'size': self.size,
      'leaves': list(zip(paths(self.structure), shapes, strict=True)),
      'identity': identity,
    }
    return json.dumps(facts).encode() + b'\n'

  def _begins_with(self, header: bytes) -> bool:
    if not self._path.exists():
      return False
    with self._path.open('rb') as file:
      return file.read(len(header)) == header

  def _product(self, vector: Params) -> Params:
    question = _digest(jax.tree.leaves(vector))
    if self._replays:
      product = self._recorded(question)
      if product is not None:
        return product
      # What follows belongs to another course of the computation, or is half an entry.
      self._replays = False
      os.truncate(self._path, self._end)
    product = jax.tree.map(
      lambda leaf, like: jnp.asarray(leaf, like.dtype),
      self._inner.matvec(vector),
      self.structure,
    )
    self.num_computed += 1
    self._record(question, [np.asarray(leaf) for leaf in jax.tree.leaves(product)])
    return product

  def _recorded(self, question: bytes) -> Params | None:
    """The product in the next entry, if that is whole and for this question."""
    with self._path.open('rb') as file:
      file.seek(self._end)
      entry = file.read(self._entry)
    content, check = entry[_DIGEST:-_DIGEST], entry[-_DIGEST:]
    if len(entry) < self._entry or entry[:_DIGEST] != question:
      return None
    if check != hashlib.blake2b(content, digest_size=_DIGEST).digest():
      return None
    self._end += self._entry
    product, start = [], 0
    for leaf in self._leaves:
      values = np.frombuffer(content, leaf.dtype, leaf.size, start)
      values = values.reshape(leaf.shape)
      product.append(placing.on_devices(values.copy(), leaf.dtype, leaf))
      start += values.nbytes
    return self._treedef.unflatten(product)

  def _record(self, question: bytes, product: list[np.ndarray]) -> None:
    """Appends an entry: digest of the vector, product, digest of the product."""
    if self._end + self._entry > self._room:
      return
    with self._path.open('ab') as file:
      file.write(question)
      for values in product:
        file.write(_as_bytes(values))
      file.write(_digest(product))
    self._end += self._entry


def journaled(
  inner: Operator,
  path: str | os.PathLike[str],
  *,
  identity: str = '',
  max_gib: float = 8.0,
) -> JournaledOperator:
  """Makes any computation on an operator resumable after it was killed.

  Every product is appended to a file before it is used. A new process that asks for
  products with the same vectors in the same order, as `eigenpairs`, `trace` and the
  others do under one key, gets them from the file, bit for bit, until the file ends or
  a vector differs. From there on products are computed, and appended, again. So the
  computation ends as if it had never been interrupted, at the cost of one product.

  Args:
    inner: the operator.
    path: the file; one for each computation, used by one process at a time. Remove it
      when the computation's result is safe.
    identity: what the operator depends on, such as checkpoint, data and precision. A
      file of another identity, or of vectors of another shape, is started anew.
    max_gib: size in GiB at which the file grows no more; a restart computes what was
      not recorded again. An entry is as large as a vector.

  Returns:
    The operator. Its ``num_matvecs`` counts the products asked for, ``num_computed``
    those that this process computed.

  Raises:
    OSError: the file cannot be written.
    ValueError: the vectors lie on devices of several processes.

  >>> import os, tempfile
  >>> import jax.numpy as jnp
  >>> from sam_jax import curvature
  >>> op = curvature.operator(lambda v: 2 * v, jnp.zeros(3))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = os.path.join(folder, 'products.journal')
  ...   before = journaled(op, file).matvec(jnp.ones(3))
  ...   again = journaled(op, file)
  ...   again.matvec(jnp.ones(3)).tolist(), again.num_matvecs, again.num_computed
  ([2.0, 2.0, 2.0], 1, 0)
  """
  return JournaledOperator(inner, path, identity, max_gib)


def _digest(leaves: list[Any]) -> bytes:
  state = hashlib.blake2b(digest_size=_DIGEST)
  for leaf in leaves:
    state.update(_as_bytes(np.asarray(leaf)))
  return state.digest()


def _as_bytes(values: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
