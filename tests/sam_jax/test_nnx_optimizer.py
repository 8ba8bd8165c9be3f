"""The step of docs/frameworks.md with `nnx.Optimizer`, against one written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_jax

RATE, RHO, MOMENTUM = 0.1, 0.3, 0.9
X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X[:, 0])


class _Net(nnx.Module):
  """Batch normalization of a linear map, dropout, and their mean."""

  def __init__(self):
    self.linear = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(1))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=2))

  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x))).mean(axis=1)


_value_and_grad = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))


@nnx.jit
def _step(model, optimizer):
  graph, params, rest = nnx.as_pure(nnx.split(model, nnx.Param, ...))

  def grad_fn(params):
    _, grads = _value_and_grad(nnx.merge(graph, params, rest))
    return nnx.as_pure(grads)

  opt_state = nnx.as_pure(optimizer.opt_state)
  copy = nnx.merge(graph, sam_jax.gradient_point(opt_state, params), rest)
  value, grads = _value_and_grad(copy)
  optimizer.update(model, grads, grad_fn=grad_fn)
  nnx.update(model, nnx.state(copy, nnx.Not(nnx.Param)))
  return value


def _masks(steps):
  """What dropout multiplies with in each step, read off the layer itself."""
  layer = _Net().dropout
  return [layer(jnp.ones((16, 4))) for _ in range(steps)]


def _loss(flat, mask):
  """The loss of kernel (3, 4), scale (4,) and bias (4,), and the mean of features."""
  kernel, scale, bias = flat[:12].reshape(3, 4), flat[12:16], flat[16:]
  features = X @ kernel
  mean, variance = features.mean(0), features.var(0)
  spread = jnp.sqrt(variance + 1e-5)
  normed = (features - mean[None]) / spread[None] * scale[None] + bias[None]
  return jnp.mean(((normed * mask).mean(1) - Y) ** 2), mean


def _unit(v):
  return v / jnp.linalg.norm(v)


def _by_hand(name, flat, steps):
  """Parameters and running means after some steps."""
  grad = jax.jit(jax.grad(_loss, has_aux=True))
  velocity, running = jnp.zeros_like(flat), jnp.zeros(4)
  for mask in _masks(steps):
    point = flat
    if name == 'msam' and velocity.any():
      point = flat - RHO * _unit(velocity)
    gradient, mean = grad(point, mask)
    if name == 'sam':
      gradient, _ = grad(flat + RHO * _unit(gradient), mask)
    velocity = MOMENTUM * velocity + gradient
    flat, running = flat - RATE * velocity, 0.9 * running + 0.1 * mean
  return flat, running


@pytest.mark.parametrize('name', ['sam', 'msam'])
def test_steps_with_batch_norm_and_dropout(name):
  base = optax.sgd(RATE, momentum=MOMENTUM)
  tx = optax.chain(sam_jax.sam(RHO), base) if name == 'sam' else sam_jax.msam(base, RHO)
  model = _Net()
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  def flat():
    leaves = (model.linear.kernel, model.norm.scale, model.norm.bias)
    return jnp.concatenate([leaf[...].reshape(-1) for leaf in leaves])

  expected, running = _by_hand(name, flat(), 3)
  for _ in range(3):
    _step(model, optimizer)
  np.testing.assert_allclose(flat(), expected, rtol=2e-4, atol=2e-5)
  np.testing.assert_allclose(model.norm.mean[...], running, rtol=2e-4, atol=2e-5)
  assert float(optax.tree.get(nnx.as_pure(optimizer.opt_state), 'rho')) == (
    pytest.approx(RHO)
  )
