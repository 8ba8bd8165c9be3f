"""Directions through the parameters and the loss along them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
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
  assert (again.value, again.path, again.explained) == ('loss', None, ())

  on_line = landscape.line(_loss, params, along_x, x, [data[:7], data[7:]])
  np.testing.assert_array_equal(on_line.loss, result.loss[0])
  on_line.save(tmp_path / 'line.npz')
  assert landscape.load(tmp_path / 'line.npz').y is None


def test_a_quadratic_is_its_own_closed_form():
  # Small dyadic numbers: float32 has every one of them exactly.
  weights = {'a': jnp.array([1.0, 3.0]), 'b': jnp.array(0.5)}

  def loss(params, batch):
    terms = jax.tree.map(lambda w, p: jnp.sum(w * p**2), weights, params)
    return jnp.mean(batch) * sum(jax.tree.leaves(terms))

  zero = jax.tree.map(jnp.zeros_like, weights)
  first = {'a': jnp.array([1.0, 0.0]), 'b': jnp.array(1.0)}
  second = {'a': jnp.array([0.0, 2.0]), 'b': jnp.array(0.0)}
  x, y = np.linspace(-2, 2, 9), np.linspace(-1, 1, 5)
  result = landscape.surface(loss, zero, (first, second), x, y, [jnp.ones(3)])
  np.testing.assert_array_equal(result.loss, 1.5 * x**2 + 12 * y[:, None] ** 2)


def test_any_iterable_of_batches_and_every_device_give_the_same_bits():
  params = {'w': jnp.array([1.0, -2.0]), 'b': jnp.array([0.5])}
  directions = landscape.random_directions(
    jax.random.key(1), params, include_vectors=True
  )
  data = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
  x, y = np.linspace(-1, 1, 5), np.linspace(-1, 1, 4)

  class Anew:
    def __iter__(self):
      return iter([data[:7], data[7:]])

  def evaluate(batches, devices):
    seen = []
    result = landscape.surface(
      _loss,
      params,
      directions,
      x,
      y,
      batches,
      devices=devices,
      progress=lambda *done: seen.append(done),
    )
    assert seen == [(i, 20) for i in range(1, 21)]
    return result.loss

  assert jax.local_device_count() == 8
  expected = evaluate([data[:7], data[7:]], jax.local_devices()[:1])
  some = jax.local_devices()[5:7]
  for batches, devices in (
    ([data[:7], data[7:]], None),
    (iter([data[:7], data[7:]]), some),
    (Anew(), some),
  ):
    np.testing.assert_array_equal(evaluate(batches, devices), expected)
  with pytest.raises(ValueError, match=r'devices=\[\]'):
    evaluate([data], [])


# Few shapes: each of them is compiled.
@settings(max_examples=12)
@given(
  shapes=st.lists(
    st.sampled_from([(3, 4), (1, 5), (6,)]), min_size=1, max_size=3, unique=True
  ),
  num=st.integers(1, 2),
  seed=st.integers(0, 2**32 - 1),
  vectors=st.booleans(),
)
def test_random_directions_hold_their_invariants(shapes, num, seed, vectors):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  params = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
  moved = [vectors or p.ndim >= 2 for p in params]
  assume(sum(p.size for p, m in zip(params, moved, strict=True) if m) >= num)
  found = landscape.random_directions(
    jax.random.key(seed + 1), params, num, include_vectors=vectors
  )
  for leaf, move, *drawn in zip(params, moved, *found, strict=True):
    drawn = np.stack([np.asarray(d, np.float64) for d in drawn])
    if not move:
      assert not drawn.any()
      continue
    # Filters of fewer weights than directions, and vectors, are one filter a leaf.
    whole = leaf.ndim < 2 or leaf.size // leaf.shape[-1] < num
    filters = 1 if whole else leaf.shape[-1]
    drawn = drawn.reshape(num, -1, filters)
    norms = np.linalg.norm(np.asarray(leaf, np.float64).reshape(-1, filters), axis=0)
    np.testing.assert_allclose(
      np.einsum('iwf,jwf->fij', drawn, drawn),
      norms[:, None, None] ** 2 * np.eye(num),
      atol=2e-5 * norms.max() ** 2,
    )


@pytest.mark.parametrize('center', [-1, 0, 17])
def test_a_spiral_in_many_dimensions_is_found(x64, center):
  rng = np.random.default_rng(0)
  turn = np.linspace(0.5, 9, 40)
  spiral = np.stack([3 * turn * np.cos(turn), turn * np.sin(turn)], 1)
  basis = np.linalg.qr(rng.normal(size=(300, 2)))[0]
  flat = spiral @ basis.T + rng.normal(size=300)
  trees = [
    {'a': row[:200].reshape(10, 20), 'b': [row[200:], np.zeros((0,))]} for row in flat
  ]
  found = landscape.trajectory(trees, center=center)
  first, second = (ravel_pytree(d)[0] for d in found.directions)
  both = np.stack([first, second])
  np.testing.assert_allclose(both @ both.T, np.eye(2), atol=1e-12)
  # The plane is that of the spiral, each of its axes turned or mirrored only.
  np.testing.assert_allclose(np.linalg.svd(both @ basis)[1], 1, rtol=1e-12)
  relative = spiral - spiral[center]
  np.testing.assert_allclose(
    found.coordinates @ found.coordinates.T, relative @ relative.T, atol=1e-9
  )
  np.testing.assert_allclose(found.coordinates, (flat - flat[center]) @ both.T)
  np.testing.assert_allclose(sum(found.explained), 1, rtol=1e-12)
  variances = np.linalg.eigvalsh(np.cov(spiral.T))[::-1]
  np.testing.assert_allclose(found.explained, variances / variances.sum())


def test_a_trajectory_out_of_the_plane_is_projected():
  rng = np.random.default_rng(1)
  flat = np.cumsum(rng.normal(size=(12, 50)), axis=0).astype(np.float32)
  found = landscape.trajectory([{'w': jnp.asarray(row)} for row in flat])
  centred = flat.astype(np.float64) - flat.mean(0, dtype=np.float64)
  values, vectors = np.linalg.svd(centred, full_matrices=False)[1:]
  np.testing.assert_allclose(
    found.explained, values[:2] ** 2 / (values**2).sum(), rtol=1e-9
  )
  for direction, vector in zip(found.directions, vectors, strict=False):
    assert abs(direction['w'] @ vector) == pytest.approx(1, rel=1e-6)
  np.testing.assert_array_equal(found.coordinates[-1], 0)
  assert (found.coordinates.max(0) == abs(found.coordinates).max(0)).all()


def test_a_difference_leads_from_one_network_to_another():
  first = {'w': jnp.array([1.0, 2.0], jnp.bfloat16), 'b': jnp.array([0.5])}
  second = {'w': jnp.array([1.01, -2.0], jnp.bfloat16), 'b': jnp.array([1.5])}
  direction = landscape.difference(first, second)
  assert direction['w'].dtype == jnp.float32
  data = [jnp.ones((3, 2))]
  result = landscape.line(_loss, first, direction, [0, 1], data)
  np.testing.assert_array_equal(
    result.loss, [_loss(params, data[0]) for params in (first, second)]
  )


@pytest.mark.parametrize(
  ('checkpoints', 'arguments', 'message'),
  [
    ([1.0, 2.0], {}, 'checkpoints: 2 given'),
    ([1.0, 1.0, 1.0], {}, 'did not move'),
    ([1.0, np.nan, 3.0], {}, 'not finite'),
    ([1.0, 2.0, 4.0], {}, 'lie on one line'),
    ([1.0, 2.0, 4.0], {'center': 3}, 'center=3: there are 3'),
  ],
)
def test_a_trajectory_that_spans_no_plane_is_refused(checkpoints, arguments, message):
  trees = [{'w': scale * jnp.arange(1.0, 5.0)} for scale in checkpoints]
  with pytest.raises(ValueError, match=message):
    landscape.trajectory(trees, **arguments)


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    ({'w': jnp.ones(3)}, r"\['w'\] is \(3,\) instead of \(2,\)"),
    ({'w': jnp.ones(2), 'z': jnp.ones(1)}, r"\['z'\] is \(1,\) instead of missing"),
  ],
)
def test_networks_that_differ_in_shape_are_named(other, message):
  first = {'w': jnp.ones(2)}
  with pytest.raises(ValueError, match='second: 1 leaves differ.*' + message):
    landscape.difference(first, other)
  with pytest.raises(ValueError, match=r'checkpoints\[2\]: .*' + message):
    landscape.trajectory([first, first, other])
  loss, axis, data = lambda w, _: w['w'].sum(), [0.0, 1.0], [jnp.ones(1)]
  with pytest.raises(ValueError, match='direction: .*' + message):
    landscape.line(loss, first, other, axis, data)
  with pytest.raises(ValueError, match='direction 2: .*' + message):
    landscape.surface(loss, first, (first, other), axis, axis, data)


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


@pytest.mark.parametrize('evaluate', [landscape.surface, landscape.eigen_ratio])
@pytest.mark.parametrize('num', [1, 3])
def test_a_surface_takes_two_directions(evaluate, num):
  """One or three are counted; two that are no trees like the parameters are named."""
  w, axis, data = {'w': jnp.ones(3)}, [0.0, 1.0], [jnp.ones(1)]
  loss = lambda w, batch: w['w'].sum() * batch.mean()
  with pytest.raises(ValueError, match=f'directions: {num} given, a surface takes two'):
    evaluate(loss, w, (w,) * num, axis, axis, data)
  with pytest.raises(ValueError, match='directions: 1 given'):
    evaluate(loss, w, w, axis, axis, data)
  with pytest.raises(ValueError, match='direction 2: .*instead of'):
    evaluate(loss, w, (w, {'w': jnp.ones(2)}), axis, axis, data)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_short_steps_of_half_precision_parameters_are_gone(dtype):
  """Against float64: at 1 both formats round a step of 1e-4 away."""
  w = {'w': jnp.array([1.0, -2.0, 0.5], dtype), 'b': jnp.array(3.0)}
  along = {'w': jnp.array([1.0, 0.5, -1.0], dtype), 'b': jnp.array(0.25)}
  other = {'w': jnp.array([0.0, 1.0, 2.0]), 'b': jnp.array(0.0)}
  seen = []

  def loss(w, batch):
    seen.append(w['w'].dtype)
    return jnp.mean(batch) * (jnp.sum(w['w'] ** 2) - 5.25 + w['b'] - 3.0)

  x = np.array([-1e-4, 0.0, 1e-4])
  exact = lambda t, v, u=0.0: (
    np.sum((np.array([1, -2, 0.5]) + t * np.array(v) + u * np.array([0, 1, 2])) ** 2)
    - 5.25
    + t * 0.25
  )
  expected = [exact(t, [1.0, 0.5, -1.0]) for t in x]
  on_line = landscape.line(loss, w, along, x, [jnp.ones(2)]).loss
  np.testing.assert_allclose(on_line, expected, rtol=1e-2, atol=1e-7)
  grid = landscape.surface(loss, w, (along, other), x, x[:1], [jnp.ones(2)]).loss
  expected = [[exact(t, [1.0, 0.5, -1.0], x[0]) for t in x]]
  np.testing.assert_allclose(grid, expected, rtol=1e-2, atol=1e-6)
  assert set(seen) == {jnp.dtype('float32')}


def _scaled(dtype, factor):
  shapes = {'kernel': (4, 3), 'narrow': (1, 6)}
  keys = jax.random.split(jax.random.key(5), 2)
  return {
    name: (factor * jax.random.normal(k, shape)).astype(dtype)
    for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


@pytest.mark.parametrize('normalization', ['filter', 'layer', 'none'])
@pytest.mark.parametrize(
  ('dtype', 'factor'),
  [
    (jnp.float32, 1e-25),
    (jnp.float32, 1e30),
    (jnp.float16, 1e3),
  ],
)
def test_directions_have_the_size_of_the_parameters_in_the_whole_range(
  dtype, factor, normalization
):
  """Against norms and products in float64 of what is returned."""
  params = _scaled(dtype, factor)
  directions = landscape.random_directions(
    jax.random.key(0), params, normalization=normalization
  )
  wide = lambda tree: {k: np.asarray(x, np.float64) for k, x in tree.items()}
  like = wide(params)
  first, second = map(wide, directions)
  whole = lambda tree: np.concatenate([x.ravel() for x in tree.values()])
  for got in (first, second):
    if normalization == 'none':
      size = np.linalg.norm(whole(like))
      np.testing.assert_allclose(np.linalg.norm(whole(got)), size, rtol=1e-5)
      continue
    norms = _filter_norms if normalization == 'filter' else np.linalg.norm
    np.testing.assert_allclose(norms(got['kernel']), norms(like['kernel']), rtol=1e-5)
    narrow = np.linalg.norm(like['narrow'])
    np.testing.assert_allclose(np.linalg.norm(got['narrow']), narrow, rtol=1e-5)
  cosine = whole(first) @ whole(second) / (whole(first) @ whole(first))
  assert abs(cosine) < 1e-5


def test_two_directions_without_normalization_of_zero_parameters_are_zero():
  zero = {'kernel': jnp.zeros((4, 3))}
  found = landscape.random_directions(jax.random.key(0), zero, normalization='none')
  assert all(not x.any() for x in jax.tree.leaves(found))
