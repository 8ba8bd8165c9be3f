"""Random directions in parameter space: ``(key, params) -> u``, a tree like params."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

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
  return optax.tree.random_like(key, params, jax.random.normal)


def uniform_cube(half_width: float) -> Sampler:
  """A sampler of u uniform in the cube [-half_width, half_width]^n.

  >>> import jax, jax.numpy as jnp, sam_jax
  >>> u = sam_jax.probes.uniform_cube(0.01)(jax.random.key(0), jnp.ones(100))
  >>> bool(abs(u).max() <= 0.01)
  True
  """

  def sample(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -half_width, half_width)

  return lambda key, params: optax.tree.random_like(key, params, sample)
