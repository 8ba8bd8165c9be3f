"""Directions through the parameters and the loss along them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import landscape

_PARAMS = {
  'conv': jax.random.normal(jax.random.key(0), (3, 3, 2, 4)),
  'dense': {
    'kernel': jax.random.normal(jax.random.key(1), (5, 3)),
    'bias': jnp.ones(3),
  },
  'narrow': jax.random.normal(jax.random.key(2), (1, 6)),
  'zero': jnp.zeros((4, 2)),
}


def _filter_norms(leaf):
  return np.linalg.norm(np.asarray(leaf).reshape(-1, leaf.shape[-1]), axis=0)


def test_filters_keep_their_norms_and_directions_are_orthogonal():
  directions = landscape.random_directions(jax.random.key(3), _PARAMS)
  for direction in directions:
    for got, like in (
      (direction['conv'], _PARAMS['conv']),
      (direction['dense']['kernel'], _PARAMS['dense']['kernel']),
      (direction['zero'], _PARAMS['zero']),
    ):
      np.testing.assert_allclose(_filter_norms(got), _filter_norms(like), rtol=1e-5)
    # A filter of one weight leaves no room for two directions: the leaf is one filter.
    whole = np.linalg.norm(_PARAMS['narrow'])
    np.testing.assert_allclose(np.linalg.norm(direction['narrow']), whole, rtol=1e-5)
    assert not direction['dense']['bias'].any()
  first, second = (ravel_pytree(d)[0] for d in directions)
  assert abs(first @ second) < 1e-5 * jnp.linalg.norm(first) ** 2
  assert jnp.linalg.norm(first - second) > jnp.linalg.norm(first)


def test_layer_and_no_normalization():
  (layer,) = landscape.random_directions(
    jax.random.key(3), _PARAMS, 1, normalization='layer', include_vectors=True
  )
  for got, like in zip(jax.tree.leaves(layer), jax.tree.leaves(_PARAMS), strict=True):
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(like), rtol=1e-5)
  first, second = (
    ravel_pytree(d)[0]
    for d in landscape.random_directions(
      jax.random.key(3), _PARAMS, 2, normalization='none'
    )
  )
  moved = ravel_pytree({**_PARAMS, 'dense': _PARAMS['dense']['kernel']})[0]
  np.testing.assert_allclose(
    [jnp.linalg.norm(first), jnp.linalg.norm(second)],
    jnp.linalg.norm(moved),
    rtol=1e-5,
  )
  assert abs(first @ second) < 1e-4 * jnp.linalg.norm(first) ** 2


def _loss(params, batch):
  return jnp.mean((batch @ params['w']) ** 2) + jnp.sum(params['b'] ** 2)


def test_surface_is_the_loss_at_each_point_over_unequal_batches(tmp_path):
  params = {'w': jnp.array([1.0, -2.0]), 'b': jnp.array([0.5])}
  along_x = {'w': jnp.array([1.0, 0.0]), 'b': jnp.zeros(1)}
  along_y = {'w': jnp.array([0.0, 1.0]), 'b': jnp.ones(1)}
  data = jax.random.normal(jax.random.key(0), (10, 2))
  x, y = np.linspace(-1, 1, 3), np.linspace(0, 1, 2)
  seen = []
  result = landscape.surface(
    _loss,
    params,
    (along_x, along_y),
    x,
    y,
    [data[:7], data[7:]],
    progress=lambda done, total: seen.append((done, total)),
  )
  expected = [
    [
      _loss({'w': params['w'] + jnp.array([a, b]), 'b': params['b'] + b}, data)
      for a in x
    ]
    for b in y
  ]
  np.testing.assert_allclose(result.loss, expected, rtol=1e-6)
  assert seen == [(i, 6) for i in range(1, 7)]
  result.save(tmp_path / 'landscape.npz')
  again = landscape.load(tmp_path / 'landscape.npz')
  for field in ('x', 'y', 'loss'):
    np.testing.assert_array_equal(getattr(again, field), getattr(result, field))
  assert again.labels == result.labels

  on_line = landscape.line(_loss, params, along_x, x, [data[:7], data[7:]])
  np.testing.assert_array_equal(on_line.loss, result.loss[0])
  on_line.save(tmp_path / 'line.npz')
  assert landscape.load(tmp_path / 'line.npz').y is None


@pytest.mark.parametrize(
  ('params', 'arguments', 'message'),
  [
    (_PARAMS, {'normalization': 'batch'}, "normalization='batch'"),
    (_PARAMS, {'num': 0}, 'num=0'),
    ({'bias': jnp.ones(4)}, {}, 'include_vectors=True'),
  ],
)
def test_wrong_arguments_are_named(params, arguments, message):
  with pytest.raises(ValueError, match=message):
    landscape.random_directions(jax.random.key(0), params, **arguments)
