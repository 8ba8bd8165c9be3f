"""Orthonormal bases of very long vectors.

A vector of n entries is kept as (chunks, chunk): products are taken chunk by chunk on
the device and the partial sums are added in float64 on the host, because one long
float32 sum loses the digits that reorthogonalisation needs. Vectors stand in blocks
(chunks, block, chunk), so a product with a block is one batched matrix product, memory
grows with the basis, and a new vector is written in place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.curvature import stacks

_CHUNK = 4096


# Streams of random vectors, so that functions given one key draw different ones: a
# probe must not depend on the vectors it is made orthogonal to.
EIGENPAIRS_STREAM, DENSITY_STREAM, TRACE_STREAM = range(3)
FROBENIUS_STREAM, DIAGONAL_STREAM = range(3, 5)

# Gram-Schmidt: passes at most, and the share of the length that ends them.
_MAX_PASSES, _ENOUGH = 3, 0.7
_SMALL = 1e-25  # of a sum of squares in float32
_WORK_VECTORS = 7  # of a Lanczos step, beside the basis


class NonFiniteError(ArithmeticError):
  """A product with an operator is NaN or infinite, or a vector cannot be scaled."""


class AsymmetryError(ValueError):
  """Products with an operator are not those of a symmetric matrix."""


def stream(key: jax.Array | None, number: int) -> jax.Array:
  """A key of one stream; None is that of ``jax.random.key(0)``."""
  if key is not None and not isinstance(key, jax.Array):
    raise TypeError(f'key={key!r}: give a key of jax.random, as jax.random.key(0)')
  return jax.random.fold_in(jax.random.key(0) if key is None else key, number)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a pytree is laid out as a (chunks, chunk) array, padded with zeros.

  On an explicit mesh the leaves lie as the parameters do, and the array is whole on
  each device.
  """

  treedef: Any
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[np.dtype, ...]
  shardings: tuple[jax.sharding.NamedSharding | None, ...]
  dtype: np.dtype
  size: int

  @classmethod
  def of(cls, structure: Any) -> Layout:
    leaves, treedef = jax.tree.flatten(structure)
    return cls(
      treedef=treedef,
      shapes=tuple(leaf.shape for leaf in leaves),
      dtypes=tuple(np.dtype(leaf.dtype) for leaf in leaves),
      shardings=tuple(stacks.explicit_sharding(leaf) for leaf in leaves),
      dtype=np.dtype(jnp.promote_types(jnp.result_type(*leaves), jnp.float32)),
      size=sum(math.prod(leaf.shape) for leaf in leaves),
    )

  @property
  def shape(self) -> tuple[int, int]:
    chunks = -(-self.size // _CHUNK)
    return chunks, -(-self.size // chunks)

  @property
  def block(self) -> int:
    # Small blocks where a single vector is already much memory.
    return 16 if self.size <= 1 << 20 else 4

  @property
  def vector_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def rounded(self, num_vectors: int) -> int:
    """So many vectors a basis of ``num_vectors`` takes: whole blocks."""
    return -(-num_vectors // self.block) * self.block

  def room(self, max_gib: float, num_vectors: int = 0) -> int:
    """How many vectors of bases fit into memory, beside the work vectors.

    Args:
      max_gib: memory in GiB.
      num_vectors: so many have to fit.

    Raises:
      ValueError: they do not; it names what is needed.
    """
    rows = int(max_gib * 2**30 / self.vector_bytes) - _WORK_VECTORS
    if rows < num_vectors:
      need = (num_vectors + _WORK_VECTORS) * self.vector_bytes / 2**30
      raise ValueError(
        f'max_basis_gib={max_gib:g}: {num_vectors} basis vectors of size '
        f'{self.size:,} and {_WORK_VECTORS} to work with need {need:.2g} GiB; allow '
        'that, or take fewer'
      )
    return rows // self.block * self.block

  def pack(self, tree: Any) -> jax.Array:
    """A pytree as a (chunks, chunk) array."""
    return _pack(self, tree)

  def unpack(self, vector: jax.Array) -> Any:
    """A (chunks, chunk) array as a pytree."""
    return _unpack(self, vector)

  def normal(self, key: jax.Array) -> jax.Array:
    """A standard normal vector."""
    return _normal(self, key)


class Basis:
  """Orthonormal vectors, added one at a time."""

  def __init__(self, layout: Layout):
    self.layout = layout
    self.size = 0
    self._blocks: list[jax.Array] = []

  def append(self, vector: jax.Array) -> None:
    """Adds a vector, which must be orthogonal to the others and of norm 1."""
    index = self.size % self.layout.block
    if index == 0:
      self._blocks.append(self._empty_block())
    self._blocks[-1] = _write(self._blocks[-1], vector, index)
    self.size += 1

  def coefficients(self, vector: jax.Array) -> np.ndarray:
    """Products with each vector of the basis, (size,) float64."""
    partial = [_dots(block, vector) for block in self._blocks]
    sums = [np.asarray(p, np.float64).sum(0) for p in partial]
    return np.concatenate([*sums, np.zeros(0)])[: self.size]

  def subtract(self, vector: jax.Array, coefficients: np.ndarray) -> jax.Array:
    """The vector less the basis vectors times their coefficients; donates it."""
    for block, part in zip(self._blocks, self._parts(coefficients), strict=True):
      vector = _subtract(vector, block, part)
    return vector

  def combine(self, coefficients: np.ndarray) -> Basis:
    """The basis of the linear combinations in the columns of (size, new size)."""
    result = Basis(self.layout)
    rows = self.layout.block
    for start in range(0, coefficients.shape[1], rows):
      columns = coefficients[:, start : start + rows]
      width = columns.shape[1]
      columns = np.pad(columns, ((0, 0), (0, rows - width)))
      new = self._empty_block()
      for block, part in zip(self._blocks, self._parts(columns), strict=True):
        new = _combine(new, block, part)
      result._blocks.append(new)
      result.size += width
    return result

  def extend(self, other: Basis) -> None:
    """Adds the vectors of another basis, which must be orthogonal to these."""
    for index in range(other.size):
      self.append(other.vector(index))

  def vector(self, index: int) -> jax.Array:
    """One vector of the basis, (chunks, chunk)."""
    block, row = divmod(index, self.layout.block)
    return _read(self._blocks[block], row)

  def _empty_block(self) -> jax.Array:
    chunks, chunk = self.layout.shape
    return jnp.zeros((chunks, self.layout.block, chunk), self.layout.dtype)

  def _parts(self, coefficients: np.ndarray) -> list[np.ndarray]:
    """Coefficients cut into blocks, the last one filled up with zeros."""
    rows = len(self._blocks) * self.layout.block
    padding = [(0, rows - len(coefficients))] + [(0, 0)] * (coefficients.ndim - 1)
    padded = np.pad(coefficients, padding).astype(self.layout.dtype)
    return np.split(padded, len(self._blocks)) if self._blocks else []


def orthogonalise(
  vector: jax.Array, *bases: Basis
) -> tuple[jax.Array, list[np.ndarray], float]:
  """Classical Gram-Schmidt, until a pass leaves nothing but rounding; donates.

  A pass that leaves most of the length has lost no digits ("twice is enough").

  Returns:
    The rest of the vector, for each basis the coefficients taken out of it, and the
    norm of the rest.
  """
  totals = [np.zeros(basis.size) for basis in bases]
  left = norm(vector)
  for _ in range(_MAX_PASSES):
    before = left
    found = [basis.coefficients(vector) for basis in bases]
    for basis, total, coefficients in zip(bases, totals, found, strict=True):
      vector = basis.subtract(vector, coefficients)
      total += coefficients
    left = norm(vector)
    if not left < _ENOUGH * before:
      break
  return vector, totals, left


def orthonormal(vector: jax.Array, *bases: Basis) -> jax.Array:
  """A vector made orthogonal to bases and of norm 1; donates it.

  Repeated until nothing more is lost, so it holds for a vector nearly in their span.

  Raises:
    NonFiniteError: the vector is zero or not finite.
  """
  for _ in range(4):
    before = norm(vector)
    if not 0 < before < np.inf:
      raise NonFiniteError(f'a vector has norm {before}: give one finite and not 0')
    vector, _, after = orthogonalise(rescale(vector, 1 / before), *bases)
    if after > _ENOUGH:
      break
  return rescale(vector, 1 / after)


def norm(vector: jax.Array) -> float:
  """Norm of a (chunks, chunk) vector, summed over chunks in float64."""
  squares = np.asarray(_squares(vector), np.float64).sum()
  if _SMALL < squares < np.inf or np.isnan(squares):
    return math.sqrt(squares)
  # Squares of very small or very large entries leave the range of the type.
  largest = float(jnp.abs(vector).max())
  if not 0 < largest < np.inf:
    return largest
  return largest * math.sqrt(np.asarray(_squares(vector / largest), np.float64).sum())


def dot(x: jax.Array, y: jax.Array) -> float:
  """Product of two (chunks, chunk) vectors, summed over chunks in float64."""
  return float(np.asarray(_dot(x, y), np.float64).sum())


@jax.jit
def add_scaled(x: jax.Array, scale: float, y: jax.Array) -> jax.Array:
  """``x + scale * y``, in the type of x: a float64 of the host does not widen it."""
  return x + jnp.asarray(scale, x.dtype) * y


@functools.partial(jax.jit, donate_argnums=0)
def rescale(x: jax.Array, scale: float) -> jax.Array:
  """``scale * x``, in the type of x; donates it."""
  return jnp.asarray(scale, x.dtype) * x


@functools.partial(jax.jit, static_argnums=0)
def _pack(layout, tree):
  leaves = [
    (leaf if sharding is None else jax.sharding.reshard(leaf, jax.P()))
    .astype(layout.dtype)
    .ravel()
    for leaf, sharding in zip(jax.tree.leaves(tree), layout.shardings, strict=True)
  ]
  return _fold(layout, jnp.concatenate(leaves))


def _fold(layout, flat):
  chunks, chunk = layout.shape
  return jnp.pad(flat, (0, chunks * chunk - layout.size)).reshape(chunks, chunk)


@functools.partial(jax.jit, static_argnums=0)
def _unpack(layout, vector):
  sizes = [math.prod(shape) for shape in layout.shapes]
  flat = jnp.split(vector.ravel()[: layout.size], np.cumsum(sizes)[:-1])
  described = zip(layout.shapes, layout.dtypes, layout.shardings, strict=True)
  leaves = [
    stacks.placed(part.reshape(shape).astype(dtype), sharding)
    for part, (shape, dtype, sharding) in zip(flat, described, strict=True)
  ]
  return jax.tree.unflatten(layout.treedef, leaves)


@functools.partial(jax.jit, static_argnums=0)
def _normal(layout, key):
  return _fold(layout, jax.random.normal(key, (layout.size,), layout.dtype))


@functools.partial(jax.jit, donate_argnums=0)
def _write(block, vector, index):
  return jax.lax.dynamic_update_index_in_dim(block, vector, index, axis=1)


@jax.jit
def _read(block, index):
  return jax.lax.dynamic_index_in_dim(block, index, axis=1, keepdims=False)


@jax.jit
def _dots(block, vector):
  return jnp.einsum('kbc,kc->kb', block, vector, precision='highest')


@functools.partial(jax.jit, donate_argnums=0)
def _subtract(vector, block, coefficients):
  # Unrolled over the rows XLA makes one loop of it; as a product contracting the
  # middle axis it is 17 times slower on the CPU.
  for index in range(block.shape[1]):
    vector = vector - coefficients[index] * block[:, index]
  return vector


@functools.partial(jax.jit, donate_argnums=0)
def _combine(new, block, coefficients):
  # Batched over chunks, as in _dots, so that no operand is transposed.
  coefficients = coefficients.T[None].repeat(block.shape[0], axis=0)
  return new + jnp.einsum('krb,kbc->krc', coefficients, block, precision='highest')


@jax.jit
def _squares(vector):
  return jnp.einsum('kc,kc->k', vector, vector, precision='highest')


@jax.jit
def _dot(x, y):
  return jnp.einsum('kc,kc->k', x, y, precision='highest')
