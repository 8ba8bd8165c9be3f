"""Initial distributions that several networks share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer


def uniform(fan_in: int) -> Initializer:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), of weights and biases in PyTorch's `Linear`.

  Args:
    fan_in: number of inputs of a unit.

  >>> bool(abs(uniform(4)(jax.random.key(0), (1000,))).max() <= 0.5)
  True
  """

  def init(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    limit = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init
