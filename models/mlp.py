"""Multilayer perceptron."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
  """Dense layers with ReLU between them, on flattened inputs.

  Attributes:
    features: width of each hidden layer.
    num_classes: number of classes C.

  >>> import jax.numpy as jnp
  >>> model = MLP(features=(64, 64), num_classes=10)
  >>> inputs = jnp.zeros((2, 8, 8))
  >>> variables = model.init(jax.random.key(0), inputs)
  >>> model.apply(variables, inputs).shape
  (2, 10)
  """

  features: Sequence[int] = (64, 64)
  num_classes: int = 10

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits of shape `(B, C)` for inputs of shape `(B, ...)`."""
    del train  # No layer behaves differently in training.
    x = inputs.reshape(len(inputs), -1)
    for width in self.features:
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(self.num_classes)(x)
