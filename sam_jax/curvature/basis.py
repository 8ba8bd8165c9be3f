"""Orthonormal bases of very long vectors.

A vector of n entries is kept as (chunks, chunk): products are taken chunk by chunk on
the device and the partial sums are added in float64 on the host, because one long
float32 sum loses the digits that reorthogonalisation needs. Vectors stand in blocks
(chunks, block, chunk), so a product with a block is one batched matrix product, memory
grows with the basis, and a new vector is written in place.

Where the parameters lie on a mesh, the leading axis of all these arrays is sharded over
all of its devices, and so is everything that is done with them; see `shares`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import placing
from sam_jax.curvature import shares as shares_lib

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

  On a mesh of several devices (or one with explicit axes) the leaves lie as the
  parameters do, and the array is sharded over all devices by its leading axis.
  """

  treedef: Any
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[np.dtype, ...]
  shares: tuple[shares_lib.Share, ...] | None
  mesh: jax.sharding.Mesh | None
  dtype: np.dtype
  size: int

  @classmethod
  def of(cls, structure: Any) -> Layout:
    leaves, treedef = jax.tree.flatten(structure)
    shares, mesh = _shares(leaves)
    return cls(
      treedef=treedef,
      shapes=tuple(leaf.shape for leaf in leaves),
      dtypes=tuple(np.dtype(leaf.dtype) for leaf in leaves),
      shares=shares,
      mesh=mesh,
      dtype=np.dtype(jnp.promote_types(jnp.result_type(*leaves), jnp.float32)),
      size=sum(math.prod(leaf.shape) for leaf in leaves),
    )

  @property
  def shape(self) -> tuple[int, int]:
    """Of a packed vector."""
    chunks, chunk = self.local_shape
    return chunks * (self.mesh.size if self.mesh else 1), chunk

  @property
  def local_shape(self) -> tuple[int, int]:
    """Of what one device holds of a packed vector."""
    chunks = -(-self._local_size // _CHUNK)
    return chunks, -(-self._local_size // chunks)

  @property
  def _local_size(self) -> int:
    return sum(share.kept for share in self.shares) if self.shares else self.size

  @property
  def sharding(self) -> jax.sharding.NamedSharding | None:
    """Of arrays whose leading axis is that of a packed vector."""
    if self.mesh is None:
      return None
    return jax.sharding.NamedSharding(self.mesh, shares_lib.whole(self.mesh))

  @property
  def block(self) -> int:
    # Small blocks where a single vector is already much memory.
    return 16 if self._local_size <= 1 << 20 else 4

  @property
  def vector_bytes(self) -> int:
    """Memory of a packed vector, on one device."""
    return math.prod(self.local_shape) * self.dtype.itemsize

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
    sums = [_on_host(p).sum(0) for p in partial]
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
    layout, (chunks, chunk) = self.layout, self.layout.shape
    shape = chunks, layout.block, chunk
    return jnp.zeros(shape, layout.dtype, device=layout.sharding)

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
  squares = _on_host(_squares(vector)).sum()
  if _SMALL < squares < np.inf or np.isnan(squares):
    return math.sqrt(squares)
  # Squares of very small or very large entries leave the range of the type.
  largest = float(jnp.abs(vector).max())
  if not 0 < largest < np.inf:
    return largest
  return largest * math.sqrt(_on_host(_squares(vector / largest)).sum())


def dot(x: jax.Array, y: jax.Array) -> float:
  """Product of two (chunks, chunk) vectors, summed over chunks in float64."""
  return float(_on_host(_dot(x, y)).sum())


def _on_host(sums: jax.Array) -> np.ndarray:
  """The partial sums of all chunks in float64, those of other processes too."""
  if not (sums.is_fully_addressable or sums.is_fully_replicated):
    sums = _replicated(sums.sharding.mesh)(sums)
  return np.asarray(sums, np.float64)


@functools.cache
def _replicated(mesh):
  spec = jax.sharding.PartitionSpec()
  return jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, spec))


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
  leaves = jax.tree.leaves(tree)
  if layout.mesh is None:
    return _fold(layout, jnp.concatenate([_flat(layout, leaf) for leaf in leaves]))

  def local(*pieces):
    pairs = zip(layout.shares, pieces, strict=True)
    kept = [_flat(layout, shares_lib.cut(*pair)) for pair in pairs]
    return shares_lib.fold(jnp.concatenate(kept), layout.local_shape)

  specs = _specs(layout)
  leaves = [_laid(leaf, layout, spec) for leaf, spec in zip(leaves, specs, strict=True)]
  return _on_each_device(local, layout, specs, layout.sharding.spec)(*leaves)


def _flat(layout, leaf):
  return leaf.astype(layout.dtype).ravel()


def _fold(layout, flat):
  return shares_lib.fold(flat, layout.shape)


@functools.partial(jax.jit, static_argnums=0)
def _unpack(layout, vector):
  if layout.mesh is None:
    sizes = [math.prod(shape) for shape in layout.shapes]
    flat = jnp.split(vector.ravel()[: layout.size], np.cumsum(sizes)[:-1])
    described = zip(flat, layout.shapes, layout.dtypes, strict=True)
    leaves = [part.reshape(shape).astype(dtype) for part, shape, dtype in described]
    return jax.tree.unflatten(layout.treedef, leaves)

  def local(vector):
    parts = shares_lib.split(vector.ravel(), layout.shares)
    described = zip(layout.shares, parts, layout.dtypes, strict=True)
    # Narrow before it is sent.
    return tuple(shares_lib.join(s, part.astype(dtype)) for s, part, dtype in described)

  unpack = _on_each_device(local, layout, layout.sharding.spec, _specs(layout))
  return jax.tree.unflatten(layout.treedef, unpack(vector))


@functools.partial(jax.jit, static_argnums=0)
def _normal(layout, key):
  if layout.mesh is None:
    return _fold(layout, jax.random.normal(key, (layout.size,), layout.dtype))

  def local(key):
    return shares_lib.normal(key, layout.shares, layout.local_shape, layout.dtype)

  spec = jax.sharding.PartitionSpec()
  return _on_each_device(local, layout, spec, layout.sharding.spec)(key)


def _shares(leaves):
  """What each device holds of each leaf, and the mesh; None on one device."""
  shardings = [placing.mesh_sharding(leaf) for leaf in leaves]
  meshes = {sharding.mesh for sharding in shardings if sharding is not None}
  if not meshes:
    return None, None
  if len(meshes) > 1:
    raise ValueError(
      f'the parameters lie on {len(meshes)} different meshes: place all of them on one'
    )
  mesh = meshes.pop()
  anywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  pairs = zip(shardings, leaves, strict=True)
  return tuple(shares_lib.Share.of(s or anywhere, x.shape) for s, x in pairs), mesh


def _specs(layout):
  return tuple(share.spec for share in layout.shares)


def _laid(leaf, layout, spec):
  return placing.placed(leaf, jax.sharding.NamedSharding(layout.mesh, spec))


def _on_each_device(function, layout, in_specs, out_specs):
  # What all-gather returns is the same on the devices, which the check cannot see.
  return jax.shard_map(
    function,
    mesh=layout.mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )


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
