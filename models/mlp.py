"""Multilayer perceptron."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.nn import initializers

from models.initializers import uniform

_ACTIVATIONS = {'relu': nn.relu, 'tanh': nn.tanh, 'gelu': nn.gelu}
_INITIAL = ('lecun_normal', 'glorot_normal', 'uniform')


class MLP(nn.Module):
  """Dense layers with a nonlinearity between them, on flattened inputs.

  Attributes:
    features: width of each hidden layer.
    num_classes: number of classes C.
    activation: 'relu', 'tanh' or 'gelu'.
    initial: distribution of the weights at first: 'lecun_normal' or 'glorot_normal'
      with biases of 0, or 'uniform', weights and biases in U(-1/sqrt(fan_in),
      1/sqrt(fan_in)), as PyTorch has it.

  >>> import jax.numpy as jnp
  >>> model = MLP(features=(64, 64), num_classes=10)
  >>> inputs = jnp.zeros((2, 8, 8))
  >>> variables = model.init(jax.random.key(0), inputs)
  >>> model.apply(variables, inputs).shape
  (2, 10)
  """

  features: Sequence[int] = (64, 64)
  num_classes: int = 10
  activation: str = 'relu'
  initial: str = 'lecun_normal'

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits of shape `(B, C)` for inputs of shape `(B, ...)`."""
    del train  # No layer behaves differently in training.
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f'activation={self.activation!r}: choose one of {", ".join(_ACTIVATIONS)}'
      )
    if self.initial not in _INITIAL:
      raise ValueError(f'initial={self.initial!r}: choose one of {", ".join(_INITIAL)}')
    x = inputs.reshape(len(inputs), -1)
    for width in self.features:
      x = _ACTIVATIONS[self.activation](self._dense(width, x.shape[-1])(x))
    return self._dense(self.num_classes, x.shape[-1])(x)

  def _dense(self, width: int, fan_in: int) -> nn.Dense:
    if self.initial == 'uniform':
      init = uniform(fan_in)
      return nn.Dense(width, kernel_init=init, bias_init=init)
    return nn.Dense(width, kernel_init=getattr(initializers, self.initial)())
