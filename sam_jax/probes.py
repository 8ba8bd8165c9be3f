"""Random directions in parameter space: ``(key, params) -> u``, a tree like params.

Of parameters that are sharded over a mesh, arrays or shapes with a sharding, each
device draws its own share, and the numbers are those of one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from sam_jax import placing

Sampler = Callable[[jax.Array, optax.Params], optax.Params]


def typed_key(key: jax.Array | int) -> jax.Array:
  """A typed key from one, or from a seed (a number, possibly injected).

  It is a copy, so that a state which holds it can be donated.
  """
  dtype = getattr(key, 'dtype', None)
  if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return jnp.array(key, copy=True)
  return jax.random.key(key)


def gaussian(key: jax.Array, params: optax.Params) -> optax.Params:
  """Draws u ~ N(0, I).

  >>> import jax, jax.numpy as jnp, sam_jax
  >>> sam_jax.probes.gaussian(jax.random.key(0), {'w': jnp.ones((2, 3))})['w'].shape
  (2, 3)
  """
  return _random_like(key, params, jax.random.normal)


def uniform_cube(half_width: float) -> Sampler:
  """A sampler of u uniform in the cube [-half_width, half_width]^n.

  >>> import jax, jax.numpy as jnp, sam_jax
  >>> u = sam_jax.probes.uniform_cube(0.01)(jax.random.key(0), jnp.ones(100))
  >>> bool(abs(u).max() <= 0.01)
  True
  """
  return lambda key, params: _random_like(key, params, _Uniform(half_width))


@dataclasses.dataclass(frozen=True)
class _Uniform:
  """Uniform in an interval around 0; equal for equal widths, as jit needs it."""

  half_width: float

  def __call__(self, key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -self.half_width, self.half_width)


def _random_like(key, params, sample):
  leaves, treedef = jax.tree.flatten(params)
  described = tuple(map(placing.described, leaves))
  if any(map(placing.is_on_devices, described)):
    return treedef.unflatten(placing.made(_Leaves(sample), key, described))
  # Within a compiled function optax sees to explicit meshes.
  return placing.place(optax.tree.random_like(key, params, sample), params)


@dataclasses.dataclass(frozen=True)
class _Leaves:
  sample: Callable

  def __call__(self, key, leaves):
    bare = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return optax.tree.random_like(key, bare, self.sample)
