"""Residual networks: published sizes, the function itself, its start, its curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from models import ResNet

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
SMALL = ResNet(
  num_classes=5, depth=10, width=2, pixel_mean=(127.5,) * 3, pixel_std=(74.0,) * 3
)


@pytest.fixture(scope='module')
def variables():
  """Of the small network, with values that a trained one might have."""
  first = jax.jit(SMALL.init)(jax.random.key(0), IMAGES)
  leaves, tree = jax.tree.flatten(first)
  generator = np.random.default_rng(1)
  changed = [x + generator.uniform(0.1, 0.5, x.shape).astype(x.dtype) for x in leaves]
  return jax.tree.unflatten(tree, changed)


@pytest.mark.parametrize(
  ('depth', 'parameters'),
  [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)],
)
def test_published_parameter_counts(depth, parameters):
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
  variables = jax.eval_shape(ResNet(depth=depth).init, jax.random.key(0), images)
  sizes = [leaf.size for leaf in jax.tree.leaves(variables['params'])]
  assert sum(sizes) == parameters


def _shapes(model, size):
  def apply(images):
    variables = model.init(jax.random.key(0), images)
    return model.apply(variables, images, capture_intermediates=True)

  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  return jax.eval_shape(apply, images)[1]['intermediates']


def test_the_stride_is_in_the_3x3_convolution_of_a_bottleneck():
  found = _shapes(ResNet(), 224)
  shape = lambda *path: _at(found, *path)[0].shape[1:]
  assert shape('Conv_0') == (112, 112, 64)
  assert shape('_Bottleneck_0', 'Conv_0') == (56, 56, 64)
  assert shape('_Bottleneck_2') == (56, 56, 256)
  sizes = [shape('_Bottleneck_3', f'Conv_{i}') for i in range(4)]
  assert sizes == [(56, 56, 128), (28, 28, 128), (28, 28, 512), (28, 28, 512)]
  assert shape('_Bottleneck_15') == (7, 7, 2048)


def _at(tree, *path):
  for name in path:
    tree = tree[name]
  return tree['__call__']


def _reference(variables, images):
  """The small network in float64, written out."""
  wide = lambda leaf: jnp.asarray(leaf, jnp.float64)
  params, statistics = jax.tree.map(
    wide, (variables['params'], variables['batch_stats'])
  )

  def conv(x, kernel, stride):
    pad = (kernel.shape[0] // 2,) * 2
    return jax.lax.conv_general_dilated(
      x, kernel, (stride,) * 2, (pad, pad), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  def layer(where, number, x, stride):
    own, seen = params, statistics
    for name in where:
      own, seen = own[name], seen[name]
    x = conv(x, own[f'Conv_{number}']['kernel'], stride)
    own, seen = own[f'BatchNorm_{number}'], seen[f'BatchNorm_{number}']
    scale = own['scale'] / jnp.sqrt(seen['var'] + 1e-5)
    return (x - seen['mean'][None, None, None]) * scale[None, None, None] + own['bias'][
      None, None, None
    ]

  x = (wide(images) - 127.5) / 74
  x = jnp.maximum(layer((), 0, x, 2), 0)
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
  parts = [x[:, i : i + 16 : 2, j : j + 16 : 2] for i in range(3) for j in range(3)]
  x = jnp.max(jnp.stack(parts), axis=0)
  for block in range(4):
    name, stride = (f'_Block_{block}',), 2 if block else 1
    y = jnp.maximum(layer(name, 0, x, stride), 0)
    y = layer(name, 1, y, 1)
    shortcut = layer(name, 2, x, stride) if block else x
    x = jnp.maximum(y + shortcut, 0)
  dense = params['Dense_0']
  return x.mean((1, 2)) @ dense['kernel'] + dense['bias'][None]


def test_the_network_is_the_one_that_is_written_out(variables, x64):
  expected = _reference(variables, IMAGES)
  np.testing.assert_allclose(
    jax.jit(SMALL.apply)(variables, IMAGES), expected, rtol=1e-4, atol=1e-4
  )
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables['params'])
  found = jax.jit(SMALL.apply)({**variables, 'params': low}, IMAGES)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)


def test_at_first_blocks_are_their_shortcuts_and_classes_as_likely():
  variables = jax.jit(SMALL.init)(jax.random.key(0), IMAGES)
  for block in range(4):
    norm = variables['params'][f'_Block_{block}']['BatchNorm_1']
    assert not np.any(norm['scale']) and not np.any(norm['bias'])
  apply = jax.jit(SMALL.apply, static_argnames=('train', 'mutable'))
  logits, updated = apply(variables, IMAGES, train=True, mutable=('batch_stats',))
  assert abs(-jax.nn.log_softmax(logits).mean() - np.log(5)) < 0.05
  assert any(map(np.any, jax.tree.leaves(updated)))


def test_products_with_the_hessian_are_symmetric(variables):
  def loss(params):
    logits = SMALL.apply({**variables, 'params': params}, IMAGES)
    return -jax.nn.log_softmax(logits)[:, 0].mean()

  params = variables['params']
  product = jax.jit(lambda v: sam_jax.hvp(loss, params, v))
  u, v = (
    jax.tree.map(lambda x, k=key: jax.random.normal(k, x.shape), params)
    for key in jax.random.split(jax.random.key(1))
  )
  dot = lambda *pair: sum(
    jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, pair), strict=True)
  )
  uhv, vhu = dot(u, product(v)), dot(v, product(u))
  assert abs(uhv) > 1e-3
  np.testing.assert_allclose(uhv, vhu, rtol=2e-2)


@pytest.mark.parametrize(
  ('change', 'message'),
  [({'depth': 20}, 'depth=20: must be one of 10, 18'), ({'width': 0}, 'width=0')],
)
def test_impossible_networks(change, message):
  with pytest.raises(ValueError, match=message):
    SMALL.clone(**change).init(jax.random.key(0), IMAGES)
