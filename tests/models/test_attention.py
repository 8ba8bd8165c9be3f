"""The attention network: the paper's size, its formula, its use of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Attention

SMALL = Attention(
  num_classes=3, features=6, hidden_features=5, num_layers=2, head_features=(7, 4)
)
BEATS = np.random.default_rng(0).uniform(size=(4, 9))


@pytest.fixture(scope='module')
def variables():
  initial = jax.jit(SMALL.init)(jax.random.key(0), BEATS.astype(np.float32))
  with jax.enable_x64(True):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), initial)


def test_the_papers_network_has_19528109_parameters():
  beats = jnp.zeros((1, 187))
  variables = jax.eval_shape(Attention().init, jax.random.key(0), beats)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 19_528_109
  assert variables['params']['Dense_1']['kernel'].shape == (37_400, 512)


def test_the_first_loss_is_that_of_guessing():
  model = Attention(head_features=(64, 32))
  beats = np.random.default_rng(1).uniform(size=(8, 60)).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), beats)
  logits = jax.jit(model.apply)(variables, beats)
  assert abs(-jax.nn.log_softmax(logits).mean() - np.log(5)) < 0.1
  for layer in ('Dense_0', 'Dense_1'):
    kernel, bias = (variables['params'][layer][name] for name in ('kernel', 'bias'))
    for leaf in (kernel, bias):
      assert 0.8 * len(kernel) ** -0.5 < np.abs(leaf).max() <= len(kernel) ** -0.5


def _formula(params, beat):
  """The network on one beat, head by head and sample by sample."""
  dense = lambda layer, x: x @ layer['kernel'] + layer['bias']

  def normalized(layer, x):
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-12)
    return x * layer['scale'] + layer['bias']

  x = dense(params['Dense_0'], beat[:, None])
  for time in range(len(x)):
    for feature in range(6):
      angle = time / 10_000 ** (2 * (feature // 2) / 6)
      x[time, feature] += np.cos(angle) if feature % 2 else np.sin(angle)
  for index in range(2):
    layer = params[f'_EncoderLayer_{index}']
    attention = layer['_SelfAttention_0']
    qkv = dense(attention['Dense_0'], x)
    heads = []
    for head in range(2):
      q, k, v = (
        qkv[:, 6 * part + 3 * head : 6 * part + 3 * head + 3] for part in range(3)
      )
      weights = np.exp(q @ k.T / np.sqrt(3))
      heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
    y = dense(attention['Dense_1'], np.concatenate(heads, axis=1))
    x = normalized(layer['LayerNorm_0'], x + y)
    y = dense(layer['Dense_1'], np.maximum(dense(layer['Dense_0'], x), 0))
    x = normalized(layer['LayerNorm_1'], x + y)
  x = normalized(params['LayerNorm_0'], x).ravel()
  x = np.maximum(dense(params['Dense_1'], x), 0)
  x = np.maximum(dense(params['Dense_2'], x), 0)
  return dense(params['Dense_3'], x)


def test_each_beat_is_the_formula_in_numpy(x64, variables):
  logits = jax.jit(SMALL.apply)(variables, BEATS)
  expected = [_formula(variables['params'], beat) for beat in BEATS]
  np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-12)


def test_constant_beats_have_finite_gradients(variables):
  def loss(params):
    return jnp.sum(SMALL.apply({'params': params}, jnp.zeros((2, 9))) ** 2)

  params = jax.tree.map(np.float32, variables['params'])
  for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
    assert np.isfinite(leaf).all()


def test_dropout_needs_a_key_and_follows_it(x64, variables):
  @jax.jit
  def apply(seed):
    return SMALL.apply(
      variables, BEATS, train=True, rngs={'dropout': jax.random.key(seed)}
    )

  np.testing.assert_array_equal(apply(0), apply(0))
  assert (apply(0) != apply(1)).any()


def test_bfloat16_parameters_give_float32_logits(variables):
  low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables)
  logits = SMALL.apply(low, jnp.asarray(BEATS, jnp.bfloat16))
  assert logits.dtype == jnp.float32


def test_features_that_no_head_can_share_are_refused():
  with pytest.raises(ValueError, match='features=9: must be even and a multiple'):
    SMALL.clone(features=9).init(jax.random.key(0), BEATS)
