"""The causal transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import LanguageModel


@pytest.fixture(scope='module')
def small():
  model = LanguageModel(
    vocabulary=7, features=6, num_layers=2, num_heads=2, head_features=4, widening=2
  )
  tokens = np.random.default_rng(0).integers(0, 7, (2, 5))
  params = jax.jit(model.init)(jax.random.key(0), tokens)['params']
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params
  )
  return jax.jit(lambda tokens: model.apply({'params': params}, tokens)), params, tokens


def test_logits_are_the_formula_in_numpy(small):
  """Position by position and head by head, in float64."""
  apply, params, tokens = small
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def dense(parent, number, x):
    return x @ parent[f'Dense_{number}']['kernel'] + parent[f'Dense_{number}']['bias']

  def norm(number, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (
      x * params[f'LayerNorm_{number}']['scale']
      + (params[f'LayerNorm_{number}']['bias'])
    )

  def gelu(x):  # the approximation by tanh
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  x = params['Embed_0']['embedding'][tokens] + params['positions']
  for layer in range(2):
    part = params[f'_CausalAttention_{layer}']
    y = norm(2 * layer, x)
    q, k, v = (dense(part, number, y) for number in range(3))
    seen = np.zeros_like(q)
    for b, t, h in np.ndindex(2, 5, 2):
      head = slice(4 * h, 4 * h + 4)
      scores = k[b, : t + 1, head] @ q[b, t, head] / 2
      weights = np.exp(scores - scores.max())
      seen[b, t, head] = weights @ v[b, : t + 1, head] / weights.sum()
    x = x + dense(part, 3, seen)
    hidden = gelu(dense(params, 2 * layer, norm(2 * layer + 1, x)))
    x = x + dense(params, 2 * layer + 1, hidden)
  expected = dense(params, 4, norm(4, x))
  np.testing.assert_allclose(apply(tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_position_sees_none_after_it(small):
  apply, _, tokens = small
  changed = tokens.copy()
  changed[:, 3] = (changed[:, 3] + 1) % 7
  before, after = apply(tokens), apply(changed)
  np.testing.assert_array_equal(before[:, :3], after[:, :3])
  assert (jnp.abs(before[:, 3:] - after[:, 3:]).max(axis=(0, 2)) > 1e-3).all()


def test_the_published_network_has_its_size():
  shapes = jax.eval_shape(
    LanguageModel().init, jax.random.key(0), np.zeros((1, 64), np.int32)
  )
  attention = 3 * (128 * 256 + 256) + 256 * 128 + 128
  dense = 128 * 512 + 512 + 512 * 128 + 128
  sizes = 128 * 128 + 64 * 128 + 6 * (attention + dense + 4 * 128)
  sizes += 2 * 128 + 128 * 128 + 128
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sizes


def test_losses_in_chunks_are_those_of_the_whole_logits(x64):
  """Values, gradients and Hessian products; chunks that divide the positions or not."""
  model = LanguageModel(
    vocabulary=9, features=4, num_layers=1, num_heads=1, head_features=4, widening=1
  )
  tokens, labels = np.random.default_rng(0).integers(0, 9, (2, 2, 5))
  params = jax.jit(model.init)(jax.random.key(0), tokens)['params']
  keys = iter(jax.random.split(jax.random.key(1), 99))
  draw = lambda x: jax.random.normal(next(keys), x.shape, jnp.float64)
  params, vector = jax.tree.map(draw, params), jax.tree.map(draw, params)
  weights = np.random.default_rng(1).uniform(size=(2, 5))

  def whole(params):
    log_probs = jax.nn.log_softmax(model.apply({'params': params}, tokens))
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]

  def found(losses):
    mean = lambda params: jnp.sum(weights * losses(params))
    gradient, product = jax.jvp(jax.grad(mean), (params,), (vector,))
    return losses(params), gradient, product

  expected = jax.jit(lambda: found(whole))()
  for chunk in (5, 3, 100):
    in_chunks = lambda p, c=chunk: model.token_losses(p, tokens, labels, chunk=c)
    for a, b in zip(
      jax.tree.leaves(jax.jit(lambda f=in_chunks: found(f))()),
      jax.tree.leaves(expected),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_chunks_bound_the_memory_of_a_gradient_and_of_a_product():
  """At 512 positions of 4,096 tokens the logits alone are 8 MiB."""
  model = LanguageModel(
    vocabulary=4096, features=8, num_layers=1, num_heads=1, head_features=8
  )
  tokens = np.zeros((8, 64), np.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']

  def temporaries(chunk):
    loss = lambda p: model.token_losses(p, tokens, tokens, chunk=chunk).mean()
    product = lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1]
    compiled = jax.jit(product).lower(params, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(512) > 8 * 2**20 > 2 * temporaries(16)


def test_a_chunk_of_none_is_refused():
  tokens = np.zeros((1, 2), np.int32)
  with pytest.raises(ValueError, match='chunk=0: must be at least 1'):
    LanguageModel().token_losses({}, tokens, tokens, chunk=0)
