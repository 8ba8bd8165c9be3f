"""The multilayer perceptron."""

import jax
import numpy as np

from models import MLP


def test_logits_are_the_formula_in_numpy():
  model = MLP(features=(5, 6), num_classes=3)
  inputs = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
  variables = model.init(jax.random.key(0), inputs)
  params = jax.tree.map(np.asarray, variables['params'])
  x = inputs.reshape(4, 6).astype(np.float64)
  for layer in range(3):
    dense = params[f'Dense_{layer}']
    x = x @ dense['kernel'] + dense['bias']
    x = np.maximum(x, 0) if layer < 2 else x
  np.testing.assert_allclose(model.apply(variables, inputs), x, rtol=1e-5, atol=1e-6)


def test_the_default_is_the_digits_network():
  params = MLP().init(jax.random.key(0), np.zeros((1, 64), np.float32))
  sizes = (64 * 64 + 64) * 2 + 64 * 10 + 10
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sizes
