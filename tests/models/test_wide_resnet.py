"""Wide residual networks: published sizes, first loss, statistics, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import WideResNet

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3)).astype(np.uint8)
SMALL = WideResNet(
  depth=10, width=2, pixel_mean=(127.5,) * 3, pixel_std=(74.0, 74.0, 74.0)
)


def _init(model, images=IMAGES):
  return jax.jit(model.init)(jax.random.key(0), images)


def _size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ('depth', 'width', 'parameters'),
  [
    (16, 8, 10_961_370),
    (22, 8, 17_158_106),
    (28, 10, 36_479_194),
    (40, 10, 55_841_754),
  ],
)
def test_published_parameter_counts(depth, width, parameters):
  model = WideResNet(depth=depth, width=width)
  images = jnp.zeros((1, 32, 32, 3), jnp.uint8)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  assert _size(variables['params']) == parameters


@pytest.mark.parametrize('norm', ['batch', 'group', 'none'])
def test_the_first_loss_is_that_of_guessing(norm):
  model = SMALL.clone(norm=norm, depth=16)
  variables = _init(model)
  apply = jax.jit(model.apply, static_argnames=('train', 'mutable'))
  logits, _ = apply(variables, IMAGES, train=True, mutable=('batch_stats',))
  assert logits.shape == (8, 10)
  loss = -jax.nn.log_softmax(logits).mean()
  assert abs(loss - np.log(10)) < 0.35
  assert ('batch_stats' in variables) == (norm == 'batch')


def test_images_shrink_twice_and_may_have_any_size():
  def shapes(images):
    apply = lambda images: SMALL.apply(
      SMALL.init(jax.random.key(0), images), images, capture_intermediates=True
    )
    found = jax.eval_shape(apply, images)[1]['intermediates']
    return [found[f'_Block_{i}']['__call__'][0].shape for i in range(3)]

  assert shapes(IMAGES) == [(8, 12, 12, 32), (8, 6, 6, 64), (8, 3, 3, 128)]
  odd = shapes(IMAGES[:, :9, :7])
  assert odd == [(8, 9, 7, 32), (8, 5, 4, 64), (8, 3, 2, 128)]


def test_pixels_are_standardized():
  plain = SMALL.clone(pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3)
  variables = _init(SMALL)
  by_hand = (IMAGES.astype(np.float32) - 127.5) / 74
  np.testing.assert_allclose(
    SMALL.apply(variables, IMAGES),
    plain.apply(variables, by_hand),
    rtol=2e-5,
    atol=1e-6,
  )


def test_statistics_move_in_training_only():
  variables = _init(SMALL)
  first = variables['batch_stats']['_Block_0']['BatchNorm_0']
  apply = jax.jit(SMALL.apply, static_argnames=('train', 'mutable'))
  mutable = ('batch_stats',)
  _, updated = apply(variables, IMAGES, train=True, mutable=mutable)
  last = updated['batch_stats']['_Block_0']['BatchNorm_0']
  # A tenth of the way to the batch's own.
  kernel = variables['params']['Conv_0']['kernel']
  x = (IMAGES.astype(np.float32) - 127.5) / 74
  x = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  np.testing.assert_allclose(
    last['mean'], 0.9 * first['mean'] + 0.1 * x.mean((0, 1, 2)), atol=1e-5
  )
  logits, same = apply(variables, IMAGES, mutable=mutable)
  assert np.isfinite(logits).all()
  jax.tree.map(
    np.testing.assert_array_equal, same['batch_stats'], variables['batch_stats']
  )


def test_bfloat16_parameters_give_float32_logits_and_statistics():
  variables = _init(SMALL)
  low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables['params'])

  @jax.jit
  def apply(variables):
    return SMALL.apply(
      variables,
      IMAGES,
      train=True,
      mutable=['batch_stats'],
      capture_intermediates=True,
    )

  exact, _ = apply(variables)
  logits, found = apply({**variables, 'params': low})
  assert found['intermediates']['_Block_1']['__call__'][0].dtype == jnp.bfloat16
  dtypes = {leaf.dtype for leaf in jax.tree.leaves((logits, found['batch_stats']))}
  assert dtypes == {jnp.dtype('float32')}
  np.testing.assert_allclose(logits, exact, atol=0.05)
  assert (logits != logits.astype(jnp.bfloat16)).any()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'depth': 18}, 'depth=18: must be 6 n'),
    ({'depth': 4}, 'depth=4'),
    ({'width': 0}, 'width=0'),
    ({'norm': 'layer'}, "norm='layer': choose one of batch, group, none"),
  ],
)
def test_impossible_networks_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(SMALL.clone(**changes).init, jax.random.key(0), IMAGES)
