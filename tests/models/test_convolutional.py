"""The small convolutional network."""

import jax
import numpy as np
import pytest

from models import ConvNet


def gelu(x):  # the approximation by tanh
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize('smooth', [False, True])
def test_logits_are_the_formula_in_numpy(smooth):
  """Straight loops over pixels, in float64; an odd row is dropped by the pool."""
  model = ConvNet(features=(2, 3), num_classes=4, smooth=smooth)
  activation = gelu if smooth else lambda x: np.maximum(x, 0)
  pool = np.mean if smooth else np.max
  images = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
  params = model.init(jax.random.key(0), images)['params']
  given = jax.tree.map(lambda x: x + 0.1, params)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
  x = images.astype(np.float64)
  for block in range(2):
    kernel = params[f'Conv_{block}']['kernel']
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i in range(x.shape[1]):
      for j in range(x.shape[2]):
        y[:, i, j] = np.tensordot(padded[:, i : i + 3, j : j + 3], kernel, 3)
    y = activation(y + params[f'Conv_{block}']['bias'])
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    norm = params[f'LayerNorm_{block}']
    y = y * norm['scale'] + norm['bias']
    height, width = y.shape[1] // 2, y.shape[2] // 2
    x = np.zeros((2, height, width, kernel.shape[-1]))
    for i in range(height):
      for j in range(width):
        four = y[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        x[:, i, j] = pool(four, axis=(1, 2))
  expected = x.reshape(2, -1) @ params['Dense_0']['kernel'] + params['Dense_0']['bias']
  np.testing.assert_allclose(
    model.apply({'params': given}, images), expected, rtol=1e-4, atol=1e-5
  )


def test_the_published_network_has_its_size():
  shapes = jax.eval_shape(
    ConvNet().init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)
  )
  sizes = (27 * 16 + 16 + 32) + (144 * 32 + 32 + 64) + (64 * 32 * 10 + 10)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sizes


def test_too_many_blocks_are_refused():
  with pytest.raises(ValueError, match='4x8 pixels cannot be halved 3 times'):
    ConvNet(features=(2, 2, 2)).init(jax.random.key(0), np.zeros((1, 4, 8, 3)))
