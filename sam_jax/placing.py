"""Where the leaves of a pytree lie on a mesh of devices, and how others get there.

An array knows its sharding, and so does a `jax.ShapeDtypeStruct` that was given one.
While a function is traced a sharding is known on meshes with explicit axes only; on
automatic axes the compiler chooses. Nothing here does anything on one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding

Described = tuple[jax.ShapeDtypeStruct, ...]


def place(vector: Any, like: Any) -> Any:
  """A vector that lies on a mesh as a given one, where that is known."""
  return jax.tree.map(lambda x, y: placed(x, mesh_sharding(y)), vector, like)


def placed(leaf: jax.Array, sharding: NamedSharding | None) -> jax.Array:
  """A leaf with a sharding, if there is one."""
  if sharding is None:
    return leaf
  if _is_explicit(sharding):
    return jax.sharding.reshard(leaf, sharding)
  return jax.lax.with_sharding_constraint(leaf, sharding)


def described(leaf: Any) -> jax.ShapeDtypeStruct:
  """The shape, dtype and sharding of a leaf."""
  return jax.ShapeDtypeStruct(
    np.shape(leaf), jnp.result_type(leaf), sharding=mesh_sharding(leaf)
  )


def mesh_sharding(leaf: Any) -> NamedSharding | None:
  """How a leaf lies on a mesh, where that is known.

  An array knows it, and so does what describes one. While a function is traced it is
  known of explicit meshes only. None stands for one device.
  """
  has_one = isinstance(leaf, jax.ShapeDtypeStruct) or is_concrete(leaf)
  sharding = leaf.sharding if has_one else jax.typeof(leaf).sharding
  if not isinstance(sharding, NamedSharding):
    return None
  # The automatic axes of an abstract mesh say nothing: the compiler chooses.
  known = isinstance(sharding.mesh, jax.sharding.Mesh) and sharding.mesh.size > 1
  return sharding if known or _is_explicit(sharding) else None


def _is_explicit(sharding: NamedSharding) -> bool:
  return AxisType.Explicit in sharding.mesh.axis_types


def is_concrete(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def is_on_devices(leaf: jax.ShapeDtypeStruct) -> bool:
  """Whether it is known on which devices of a mesh a leaf lies."""
  sharding = mesh_sharding(leaf)
  return sharding is not None and not isinstance(sharding.mesh, AbstractMesh)


def is_addressable(leaf: jax.ShapeDtypeStruct) -> bool:
  """Whether all devices on which a leaf lies belong to this process."""
  return not is_on_devices(leaf) or leaf.sharding.is_fully_addressable


def made(
  function: Callable[[jax.Array, Described], list[jax.Array]],
  key: jax.Array,
  leaves: Described,
) -> list[jax.Array]:
  """Calls ``function(key, leaves)``, which makes leaves like the ones described.

  On a mesh it is compiled as one, so that each device makes its own share and none a
  whole leaf.

  Args:
    function: it has to be hashable; equal ones are compiled once.
    key: a key of `jax.random`.
    leaves: shapes, dtypes and shardings.
  """
  if any(map(is_on_devices, leaves)):
    return _compiled(function, leaves)(key)
  return [
    placed(made, leaf.sharding)
    for made, leaf in zip(function(key, leaves), leaves, strict=True)
  ]


@functools.lru_cache(maxsize=64)
def _compiled(function, leaves):
  shardings = [leaf.sharding for leaf in leaves]
  return jax.jit(lambda key: function(key, leaves), out_shardings=shardings)


def on_devices(values: np.ndarray, dtype: np.dtype, like: Any) -> jax.Array:
  """Values of the host as an array, on a mesh as a given leaf if that is on one."""
  sharding = mesh_sharding(like)
  if sharding is None:
    return jnp.asarray(values, dtype)
  return jax.device_put(values.astype(dtype), sharding)
