"""How a vector that is sharded over a mesh is packed, without any device holding it.

A packed vector of a sharded layout is (devices * chunks, chunk), and its leading axis
is sharded over all axes of the mesh. Every device packs its own pieces of the leaves.
Where a leaf does not use an axis of the mesh, the devices along that axis hold the same
piece, and each keeps only its part of it: packing needs no communication, unpacking one
all-gather over the unused axes. The functions that take a `Share` run inside
`jax.shard_map`, on one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_INDICES = 1 << 32  # so many entries can be numbered by 32 bits
_ROWS = 64  # chunks for which random numbers are drawn at a time


@dataclasses.dataclass(frozen=True)
class Share:
  """What a device holds of one leaf, and what it keeps of that in a packed vector.

  Attributes:
    shape: the shape of the leaf.
    piece: the shape of the piece that a device holds.
    axes: for each dimension the axes of the mesh that divide it.
    unused: the axes of the mesh along which all devices hold the same piece.
    kept: the number of entries that a device keeps: its part of the piece, rounded up.
  """

  shape: tuple[int, ...]
  piece: tuple[int, ...]
  axes: tuple[tuple[str, ...], ...]
  unused: tuple[str, ...]
  kept: int

  @property
  def spec(self) -> PartitionSpec:
    """The spec of the leaf."""
    return PartitionSpec(*(axes or None for axes in self.axes))

  @classmethod
  def of(cls, sharding: NamedSharding, shape: tuple[int, ...]) -> Share:
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    axes = tuple(_axes(entry) for entry in spec)
    used = {axis for each in axes for axis in each}
    sizes = dict(sharding.mesh.shape)
    piece = sharding.shard_shape(shape)
    unused = tuple(name for name in sizes if name not in used and sizes[name] > 1)
    if not math.prod(piece):
      unused = ()  # There is nothing to divide.
    copies = math.prod(sizes[name] for name in unused)
    return cls(shape, piece, axes, unused, -(-math.prod(piece) // copies))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def whole(mesh: jax.sharding.Mesh) -> PartitionSpec:
  """The spec of an array whose leading axis is divided by all axes of a mesh."""
  return PartitionSpec(mesh.axis_names)


def cut(share: Share, piece: jax.Array) -> jax.Array:
  """What a device keeps of its piece of a leaf, (kept,); zeros fill it up."""
  flat = piece.ravel()
  if not share.unused:
    return flat
  copies = jax.lax.axis_size(share.unused)
  flat = jnp.pad(flat, (0, copies * share.kept - flat.size))
  return jax.lax.dynamic_slice(flat, (_start(share),), (share.kept,))


def join(share: Share, kept: jax.Array) -> jax.Array:
  """The piece of a leaf, from what this device and its copies keep of it."""
  if share.unused:
    kept = jax.lax.all_gather(kept, share.unused, tiled=True)
  return kept[: math.prod(share.piece)].reshape(share.piece)


def numbers(share: Share) -> tuple[jax.Array, jax.Array]:
  """Where the entries that a device keeps stand in the flat leaf, and which are real.

  Returns:
    uint32 (kept,), and bool (kept,) that is False where zeros fill the vector up.
  """
  index = jnp.arange(share.kept, dtype=jnp.uint32)
  if share.unused:
    index += _start(share).astype(jnp.uint32)
  real = index < math.prod(share.piece)
  place, stride = jnp.zeros_like(index), 1
  described = zip(share.shape, share.piece, share.axes, strict=True)
  for size, part, axes in reversed(list(described)):
    inside = index % part if part else index
    if axes:
      inside += (jax.lax.axis_index(axes) * part).astype(jnp.uint32)
    place += inside * np.uint32(stride % _INDICES)
    index = index // part if part else index
    stride *= size
  return place, real


def _start(share: Share) -> jax.Array:
  return jax.lax.axis_index(share.unused) * share.kept


def fold(flat: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """A flat array as (chunks, chunk), filled up with zeros."""
  return jnp.pad(flat, (0, math.prod(shape) - flat.size)).reshape(shape)


def split(flat: jax.Array, shares: Sequence[Share]) -> Iterator[jax.Array]:
  """The parts of a flat array that belong to the leaves."""
  start = 0
  for share in shares:
    yield flat[start : start + share.kept]
    start += share.kept


def normal(
  key: jax.Array, shares: Sequence[Share], shape: tuple[int, int], dtype: np.dtype
) -> jax.Array:
  """A device's part of a standard normal vector, (chunks, chunk).

  Entry i of the flat tree is entry i of `jax.random.normal` of this key, so the vector
  is the same on any mesh and on one device. For trees of 2^32 entries and more the
  leaves have keys of their own.
  """
  sizes = [math.prod(share.shape) for share in shares]
  large = sum(sizes) >= _INDICES
  low, high, real = [], [], []
  for leaf, share in enumerate(shares):
    place, there = numbers(share)
    low.append(place if large else place + np.uint32(sum(sizes[:leaf])))
    high.append(jnp.full(share.kept, leaf, jnp.uint32))
    real.append(there)
  columns = [low, real, high] if large else [low, real]
  folded = [fold(jnp.concatenate(column), shape) for column in columns]

  def draw(row):
    low, real, *high = row

    def words(low, *high):
      of_leaf = jax.random.fold_in(key, *high) if high else key
      return jax.random.key_data(jax.random.fold_in(of_leaf, low))

    return jnp.where(real, _normals(jax.vmap(words)(low, *high), dtype), 0)

  return jax.lax.map(draw, tuple(folded), batch_size=min(_ROWS, shape[0]))


def _normals(words: jax.Array, dtype: np.dtype) -> jax.Array:
  """Normal numbers of pairs of random 32-bit words, as `jax.random.normal` makes them.

  The words that `jax.random.fold_in` gives for i are those of entry i there.
  """
  words, info = words[..., :2], jnp.finfo(dtype)
  if info.bits == 64:
    wide = words.astype(jnp.uint64)
    bits = (wide[..., 0] << np.uint64(32)) | wide[..., 1]
  else:
    bits = words[..., 0] ^ words[..., 1]
  one = jax.lax.bitcast_convert_type(jnp.ones((), dtype), bits.dtype)
  fraction = (bits >> np.array(info.bits - info.nmant, bits.dtype)) | one
  fraction = jax.lax.bitcast_convert_type(fraction, dtype) - jnp.ones((), dtype)
  least = np.nextafter(np.array(-1, dtype), np.array(0, dtype), dtype=dtype)
  uniform = jnp.maximum(least, fraction * (1 - least) + least)
  return np.array(math.sqrt(2), dtype) * jax.lax.erf_inv(uniform)
