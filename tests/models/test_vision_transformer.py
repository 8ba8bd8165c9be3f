"""Vision transformers: published sizes, the function itself, its start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from models import VisionTransformer

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3)).astype(np.uint8)
SMALL = VisionTransformer(
  num_classes=5,
  patch=8,
  width=12,
  depth=2,
  num_heads=3,
  mlp_width=20,
  representation=7,
  pixel_mean=(127.5,) * 3,
  pixel_std=(127.5,) * 3,
)


def _changed(model):
  """Variables that a trained network might have."""
  first = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  generator = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: generator.normal(0, 0.3, x.shape).astype(np.float32), first
  )


@pytest.mark.parametrize(
  ('change', 'parameters'),
  [({}, 22_050_664), ({'width': 768, 'num_heads': 12}, 86_567_656)],
)
def test_published_parameter_counts(change, parameters):
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
  model = VisionTransformer(**change)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def _reference(variables, images, pool):
  """The small network in float64 NumPy, image by image and head by head."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])

  def dense(where, x):
    return x @ where['kernel'] + where['bias']

  def norm(where, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * where['scale'] + where['bias']

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  def attention(where, x):
    q, k, v = (dense(where[f'Dense_{i}'], x) for i in range(3))
    heads = []
    for head in range(3):
      part = slice(4 * head, 4 * head + 4)
      scores = np.exp(q[:, part] @ k[:, part].T / 2)
      heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
    return dense(where['Dense_3'], np.concatenate(heads, -1))

  logits = []
  for image in (images.astype(np.float64) - 127.5) / 127.5:
    patches = [
      image[row : row + 8, column : column + 8].ravel()
      for row in (0, 8)
      for column in (0, 8, 16)
    ]
    x = dense(params['_Patches_0'], np.array(patches))
    if pool == 'token':
      x = np.concatenate([params['token'][0], x])
    x = x + params['positions']
    for number in range(2):
      own = params[f'_Layer_{number}']
      x = x + attention(own['_SelfAttention_0'], norm(own['LayerNorm_0'], x))
      hidden = gelu(dense(own['Dense_0'], norm(own['LayerNorm_1'], x)))
      x = x + dense(own['Dense_1'], hidden)
    x = norm(params['LayerNorm_0'], x)
    x = x[0] if pool == 'token' else x.mean(0)
    logits.append(dense(params['Dense_1'], np.tanh(dense(params['Dense_0'], x))))
  return np.array(logits)


@pytest.mark.parametrize('pool', ['token', 'mean'])
def test_the_network_is_the_one_that_is_written_out(pool):
  model = SMALL.clone(pool=pool)
  variables = _changed(model)
  expected = _reference(variables, IMAGES, pool)
  found = jax.jit(model.apply)(variables, IMAGES)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  found = jax.jit(model.apply)(low, IMAGES)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)


def test_at_first_all_classes_are_as_likely():
  model = SMALL.clone(depth=1)
  variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
  assert not np.any(jax.jit(model.apply)(variables, IMAGES))
  params = variables['params']
  assert abs(np.std(params['positions']) - 0.02) < 0.005
  assert not np.any(params['token'])
  kernel = params['_Patches_0']['kernel']
  np.testing.assert_allclose(np.std(kernel), 192**-0.5, rtol=0.1)


def test_dropout_is_of_training_only():
  model = SMALL.clone(dropout_rate=0.5)
  variables = _changed(model)
  apply = jax.jit(model.apply, static_argnames='train')
  np.testing.assert_array_equal(
    apply(variables, IMAGES), jax.jit(SMALL.apply)(variables, IMAGES)
  )
  one, other = (
    apply(variables, IMAGES, train=True, rngs={'dropout': jax.random.key(seed)})
    for seed in (0, 1)
  )
  assert np.abs(one - other).max() > 0.01


def test_products_with_the_hessian_are_symmetric():
  model = SMALL.clone(depth=1)
  variables = _changed(model)

  def loss(params):
    logits = model.apply({'params': params}, IMAGES)
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
  np.testing.assert_allclose(uhv, vhu, rtol=1e-3)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'patch': 5}, 'patch=5: must divide the 16 x 24 pixels'),
    ({'patch': 0}, 'patch=0: must divide'),
    ({'num_heads': 5}, 'width=12: must be a multiple of num_heads=5'),
    ({'pool': 'max'}, "pool='max': choose one of token, mean"),
  ],
)
def test_impossible_networks(change, message):
  with pytest.raises(ValueError, match=message):
    SMALL.clone(**change).init(jax.random.key(0), IMAGES)
