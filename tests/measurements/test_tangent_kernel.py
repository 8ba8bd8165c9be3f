"""The tangent kernel of dense layers against the Jacobian."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import models
from measurements import tangent_kernel


class Nested(nn.Module):
  """A layer without a bias inside a module, and a skip connection."""

  outputs: int = 2

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    x = nn.Dense(3, use_bias=False)(x)
    x = x + models.MLP(features=(4,), num_classes=3, activation='tanh')(x)
    x = nn.Dense(self.outputs)(inputs=x)
    return x if self.outputs > 1 else x[:, 0]


class Twice(nn.Module):
  """One layer that is called twice."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    layer = nn.Dense(2)
    return layer(nn.tanh(layer(x)))


class Sequence(nn.Module):
  """A dense layer of three axes."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    return nn.Dense(3)(x[..., None]).sum(1)


class Normalized(nn.Module):
  """A normalization with parameters of its own."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    return nn.LayerNorm()(nn.Dense(2)(x))


@pytest.mark.parametrize('outputs', [1, 2])
def test_the_kernel_is_that_of_the_jacobian(x64, outputs):
  model = Nested(outputs)
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
  variables = jax.jit(model.init)(jax.random.key(0), inputs)
  variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) + 0.1, variables)
  assert tangent_kernel.applies(model, variables, inputs)
  params = variables['params']
  found = jax.jit(lambda w: tangent_kernel.of_dense_layers(model, w, {}, inputs))(
    params
  )
  flat, unravel = ravel_pytree(params)
  call = lambda w: model.apply({'params': unravel(w)}, inputs).reshape(-1)
  jacobian = jax.jit(jax.jacrev(call))(flat)
  assert found.shape == (6 * outputs,) * 2
  np.testing.assert_allclose(found, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('model', [Twice(), Sequence(), Normalized()])
def test_where_it_does_not_apply(model):
  inputs = jnp.ones((3, 2))
  variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
  assert not tangent_kernel.applies(model, variables, inputs)
