"""Stacks of vectors inside compiled functions: pytrees with a further leading axis.

A vector is a pytree like the parameters, a stack of m vectors a pytree of (m, *shape).
Sums run leaf by leaf, as ``sum(x * y)``: long float32 sums keep their digits this way,
and leaves that are sharded over devices stay where they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_ROUNDING = 100.0  # shorter than so many eps, what is left of a unit vector is noise


def structure(like: Any) -> Any:
  """What vectors look like: shapes, dtypes of at least float32, explicit shardings.

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
      sharding=explicit_sharding(leaf),
    ),
    described,
  )


def random(key: jax.Array, like: Any) -> Any:
  """A standard normal vector, on an explicit mesh placed as a given one."""

  return place(optax.tree.random_like(key, like), like)


def place(vector: Any, like: Any) -> Any:
  """A vector, on an explicit mesh placed as a given one."""
  return jax.tree.map(lambda x, y: placed(x, explicit_sharding(y)), vector, like)


def placed(leaf: jax.Array, sharding: jax.sharding.NamedSharding | None) -> jax.Array:
  """A leaf with an explicit sharding, if there is one."""
  return leaf if sharding is None else jax.sharding.reshard(leaf, sharding)


def explicit_sharding(leaf: Any) -> jax.sharding.NamedSharding | None:
  """The sharding of a leaf where that is part of its type."""
  if not isinstance(leaf, jax.ShapeDtypeStruct):
    leaf = jax.typeof(leaf)
  sharding = leaf.sharding
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return None
  explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
  return sharding if explicit else None


def describe(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and explicit sharding of a floating-point leaf of the parameters."""
  if not isinstance(leaf, jax.ShapeDtypeStruct):
    leaf = jax.ShapeDtypeStruct(
      np.shape(leaf), jnp.result_type(leaf), sharding=explicit_sharding(leaf)
    )
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise TypeError(
      f'a leaf of the parameters has dtype {leaf.dtype}: only real floating-point '
      'parameters have curvature; leave the others out'
    )
  return leaf


def zeros(vector: Any, count: int) -> Any:
  """A stack of zeros for vectors like a given one."""
  return jax.tree.map(
    lambda leaf: jnp.broadcast_to(jnp.zeros_like(leaf)[None], (count, *leaf.shape)),
    vector,
  )


def where(condition: jax.Array, x: Any, y: Any) -> Any:
  """One of two vectors."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)


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
