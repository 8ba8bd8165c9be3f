"""Stacks of vectors inside compiled functions: pytrees with a further leading axis.

A vector is a pytree like the parameters, a stack of m vectors a pytree of (m, *shape).
Sums run leaf by leaf, as ``sum(x * y)``: long float32 sums keep their digits this way,
and leaves that are sharded over devices stay where they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sam_jax import placing, probes

_ROUNDING = 100.0  # shorter than so many eps, what is left of a unit vector is noise


def structure(like: Any) -> Any:
  """What vectors look like: shapes, dtypes of at least float32, shardings if known.

  Raises:
    TypeError: a leaf is not floating point.
    ValueError: there are no entries.
  """
  described = jax.tree.map(describe, like)
  if not sum(leaf.size for leaf in jax.tree.leaves(described)):
    raise ValueError('the vectors have no entries: give a pytree with parameters')
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      jnp.promote_types(leaf.dtype, jnp.float32),
      sharding=leaf.sharding,
    ),
    described,
  )


def random(key: jax.Array, like: Any) -> Any:
  """A standard normal vector, on a mesh as a given one where that is known."""
  return probes.gaussian(key, like)


def place_stack(stack: Any, like: Any) -> Any:
  """A stack of vectors each of which lies on a mesh as a given one."""

  def leaf(x, y):
    sharding = placing.mesh_sharding(y)
    return x if sharding is None else placing.placed(x, _stacked(sharding))

  return jax.tree.map(leaf, stack, like)


def _stacked(sharding: NamedSharding) -> NamedSharding:
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def describe(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and sharding of a floating-point leaf of the parameters."""
  leaf = placing.described(leaf)
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise TypeError(
      f'a leaf of the parameters has dtype {leaf.dtype}: only real floating-point '
      'parameters have curvature; leave the others out'
    )
  return leaf


def zeros(vector: Any, count: int) -> Any:
  """A stack of zeros for vectors like a given one."""

  def leaf(x):
    sharding = placing.mesh_sharding(x)
    if sharding is not None and placing.is_concrete(x):
      return jnp.zeros((count, *x.shape), x.dtype, device=_stacked(sharding))
    return jnp.broadcast_to(jnp.zeros_like(x)[None], (count, *x.shape))

  return jax.tree.map(leaf, vector)


def where(condition: jax.Array, x: Any, y: Any) -> Any:
  """One of two vectors."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)


def zero(like: Any) -> Any:
  """A vector of zeros that looks and lies as what a `structure` says."""

  def leaf(x):
    if placing.is_on_devices(x):  # Made on each device, never whole on one.
      return jnp.zeros(x.shape, x.dtype, device=x.sharding)
    return placing.placed(jnp.zeros(x.shape, x.dtype), x.sharding)

  return jax.tree.map(leaf, like)


def take(stack: Any, index: Any) -> Any:
  """One vector of a stack."""
  return jax.tree.map(
    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
  )


def put(stack: Any, vector: Any, index: Any) -> Any:
  """The stack with one of its vectors replaced."""
  return jax.tree.map(
    lambda leaf, x: jax.lax.dynamic_update_index_in_dim(
      leaf, x.astype(leaf.dtype), index, axis=0
    ),
    stack,
    vector,
  )


def dots(stack: Any, vector: Any) -> jax.Array:
  """Products of each vector of a stack with a vector, (m,)."""
  parts = jax.tree.map(
    lambda s, x: jnp.sum(s * x[None], axis=tuple(range(1, s.ndim))), stack, vector
  )
  return sum(jax.tree.leaves(parts))


def norm(vector: Any) -> jax.Array:
  """The length of a vector; its squares may leave the range of the type."""
  leaves = [leaf for leaf in jax.tree.leaves(vector) if leaf.size]
  largest = jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]).max()
  safe = jnp.where(largest > 0, largest, 1)
  squares = sum(jnp.sum((leaf / safe.astype(leaf.dtype)) ** 2) for leaf in leaves)
  return largest * jnp.sqrt(squares)


def combine(stack: Any, coefficients: jax.Array) -> Any:
  """The linear combinations in the columns of (m, r), a stack of r vectors."""
  return jax.tree.map(
    lambda leaf: jnp.tensordot(
      coefficients.T.astype(leaf.dtype), leaf, axes=1, precision='highest'
    ),
    stack,
  )


def unit(vector: Any) -> tuple[Any, jax.Array]:
  """A vector made of length 1, and the length it had; zero stays zero."""
  length = norm(vector)
  safe = jnp.where(length > 0, length, 1)
  return jax.tree.map(lambda leaf: leaf / safe.astype(leaf.dtype), vector), length


def orthogonalise(vector: Any, stack: Any) -> tuple[Any, jax.Array, jax.Array]:
  """Two passes of classical Gram-Schmidt against the orthonormal vectors of a stack.

  Vectors of zeros in the stack take no part.

  Returns:
    The rest of the vector, the coefficients (m,) that were taken out of it, and the
    share of the length that the second pass left: near 1 but where the rest is noise.
  """
  first = dots(stack, vector)
  rest = _subtract(vector, stack, first)
  before = norm(rest)
  second = dots(stack, rest)
  rest = _subtract(rest, stack, second)
  share = norm(rest) / jnp.where(before > 0, before, 1)
  return rest, first + second, share


def orthonormal(vector: Any, stack: Any, key: jax.Array) -> Any:
  """A vector of length 1 orthogonal to a stack; random if the given one is not."""
  rest, left = _new_direction(vector, stack)
  return jax.lax.cond(
    left,
    lambda rest: rest,
    lambda rest: _new_direction(random(key, rest), stack)[0],
    rest,
  )


def _new_direction(vector, stack):
  rest, _, share = orthogonalise(unit(vector)[0], stack)
  rest, length = unit(rest)
  noise = _ROUNDING * jnp.finfo(length.dtype).eps
  return rest, (length > noise) & (share > 0.5)


def _subtract(vector, stack, coefficients):
  taken = jax.tree.map(
    lambda leaf: jnp.tensordot(
      coefficients.astype(leaf.dtype), leaf, axes=1, precision='highest'
    ),
    stack,
  )
  return jax.tree.map(jnp.subtract, vector, taken)
