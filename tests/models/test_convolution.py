"""The convolution against JAX's own, to second order, and its speed in a loop."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Conv, conv

CASES = {
  '3x3': (3, 1, (6, 6)),
  '3x3, stride 2': (3, 2, (6, 8)),
  '3x3, stride 2, odd image': (3, 2, (7, 5)),
  '1x1': (1, 1, (5, 4)),
  '1x1, stride 2': (1, 2, (6, 6)),
  '5x5, stride 3': (5, 3, (8, 11)),
}


def _reference(x, kernel, stride):
  pad = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _arrays(size, image):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(2, *image, 3), (size, size, 3, 4)] * 2
  return [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(('size', 'stride', 'image'), CASES.values(), ids=CASES.keys())
def test_values_gradients_and_hessian_products(x64, size, stride, image):
  x, kernel, *tangents = _arrays(size, image)

  def everything(function):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(function(x, kernel, stride)))

    gradient = jax.grad(loss, argnums=(0, 1))
    product = jax.jvp(gradient, (x, kernel), tuple(tangents))[1]
    inner = lambda x, kernel: sum(
      jnp.vdot(g, t) for g, t in zip(gradient(x, kernel), tangents, strict=True)
    )
    twice = jax.grad(inner, argnums=(0, 1))(x, kernel)
    along = jax.jvp(loss, (x, kernel), tuple(tangents))[1]
    slope = jax.grad(lambda x: jax.jvp(loss, (x, kernel), tuple(tangents))[1])(x)
    values = function(x, kernel, stride), gradient(x, kernel)
    return *values, product, twice, along, slope

  ours, reference = jax.jit(lambda: (everything(conv), everything(_reference)))()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
    ours,
    reference,
  )
  assert ours[0].shape[1:3] == tuple(-(-length // stride) for length in image)


def test_gradients_inside_loops_branches_and_vmap(x64):
  x, kernel, *_ = _arrays(3, (5, 5))
  gradient = jax.grad(lambda kernel, x: jnp.sum(jnp.tanh(conv(x, kernel))))
  expected = gradient(kernel, x)

  @jax.jit
  def placed(kernel, x):
    mapped = jax.lax.map(lambda row: gradient(kernel, row[None]), x).sum(0)
    branch = jax.lax.cond(
      x[0, 0, 0, 0] > 9, lambda: kernel, lambda: gradient(kernel, x)
    )
    vmapped = jax.vmap(gradient, (None, 0))(kernel, x[:, None]).sum(0)
    middle = jax.vmap(gradient, (None, 1))(kernel, x[None]).sum(0)
    both = jax.vmap(gradient)(jnp.stack([kernel] * 2), x[:, None]).sum(0)
    return mapped, branch, vmapped, middle, both

  for found in placed(kernel, x):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_as_fast_inside_a_loop():
  x = jnp.ones((8, 16, 16, 32))
  kernel = jnp.ones((3, 3, 32, 32))

  def gradients(x, kernel):
    loss = lambda x, kernel: jnp.sum(conv(x, kernel) ** 2)
    return jax.grad(loss, argnums=(0, 1))(x, kernel)

  @jax.jit
  def looped(x, kernel):
    add = lambda total, shift: (
      jax.tree.map(jnp.add, total, gradients(x + shift, kernel)),
      None,
    )
    return jax.lax.scan(add, (x, kernel), jnp.arange(2.0))[0]

  def seconds(function):
    jax.block_until_ready(function(x, kernel))
    found = []
    for _ in range(5):
      start = time.perf_counter()
      jax.block_until_ready(function(x, kernel))
      found.append(time.perf_counter() - start)
    return min(found)

  # Twice the work; it takes 50 times as long where gradients are left to autodiff.
  assert seconds(looped) < 10 * seconds(jax.jit(gradients))


def test_a_layer_computes_in_its_kernels_dtype():
  x = jnp.ones((1, 4, 4, 2))
  layer = Conv(3, use_bias=True)
  variables = layer.init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, variables['params']) == {
    'kernel': (3, 3, 2, 3),
    'bias': (3,),
  }
  low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
  assert layer.apply(variables, x).dtype == jnp.float32
  assert layer.apply(low, x).dtype == jnp.bfloat16
