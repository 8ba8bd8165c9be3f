"""Weights and filters of real modules, against the definition of Li et al., 2018."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from sam_jax import landscape, layouts, perturbations, sharpness

_KEY = jax.random.key(0)
_X = jax.random.normal(jax.random.key(1), (2, 5, 8))
_IMAGE = jax.random.normal(jax.random.key(2), (2, 4, 4, 2))


def _linen(module, x):
  """A function from the parameters of a module to its output, and the parameters."""
  params = module.init(_KEY, x)['params']
  return lambda p: module.apply({'params': p}, x), params


def _nnx(module, x):
  graph, params = nnx.split(module)
  return lambda p: nnx.merge(graph, p)(x), params


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def _many(rngs):
  return nnx.Linear(4, 4, rngs=rngs)


def _many_nnx():
  graph, params = nnx.split(_many(nnx.Rngs(0)))
  x = jax.random.normal(_KEY, (7, 4))
  return lambda p: jax.vmap(lambda q: nnx.merge(graph, q)(x))(p), params


# From a name to a function that makes (function, parameters), and the axes of its
# output that number outputs: all others are summed over.
_FLAX = {
  'dense': (lambda: _linen(nn.Dense(3), _X), (-1,)),
  'square': (lambda: _linen(nn.Dense(8), _X), (-1,)),
  'heads': (lambda: _linen(nn.DenseGeneral((2, 3)), _X), (-2, -1)),
  'joined': (lambda: _linen(nn.DenseGeneral(4, axis=(-2, -1)), _X), (-1,)),
  'einsum': (lambda: _linen(nn.Einsum((2, 3, 8), 'btd,hkd->bthk'), _X), (-2, -1)),
  'convolution': (lambda: _linen(nn.Conv(3, (2, 2)), _IMAGE), (-1,)),
  'groups': (lambda: _linen(nn.Conv(4, (2,), feature_group_count=2), _X), (-1,)),
  'local': (
    lambda: _linen(nn.ConvLocal(3, (2, 2), padding='VALID'), _IMAGE),
    (-3, -2, -1),
  ),
  'transposed': (
    lambda: _linen(nn.ConvTranspose(3, (2, 2), transpose_kernel=True), _IMAGE),
    (-1,),
  ),
  'embedding': (
    lambda: (
      lambda p: nn.Embed(5, 3).apply({'params': p}, jnp.arange(5)),
      nn.Embed(5, 3).init(_KEY, jnp.arange(5))['params'],
    ),
    (-1,),
  ),
  'nnx linear': (
    lambda: _nnx(nnx.LinearGeneral(8, (2, 3), rngs=nnx.Rngs(0)), _X),
    (-2, -1),
  ),
  'nnx einsum': (
    lambda: _nnx(nnx.Einsum('btd,dhk->bthk', (8, 2, 3), (2, 3), rngs=nnx.Rngs(0)), _X),
    (-2, -1),
  ),
  'nnx convolution': (
    lambda: _nnx(nnx.Conv(2, 3, (2, 2), rngs=nnx.Rngs(0)), _IMAGE),
    (-1,),
  ),
  'nnx stacked': (_many_nnx, (0, -1)),
}


def _equinox_cases():
  eqx = pytest.importorskip('equinox')
  image = jnp.moveaxis(_IMAGE[0], -1, 0)
  make = {
    'linear': (eqx.nn.Linear(4, 3, key=_KEY), _X[0, 0, :4], (0,)),
    'convolution': (eqx.nn.Conv2d(2, 3, 2, key=_KEY), image, (0,)),
    'transposed': (eqx.nn.ConvTranspose2d(2, 3, 2, key=_KEY), image, (0,)),
    'groups': (eqx.nn.Conv2d(2, 4, 2, groups=2, use_bias=False, key=_KEY), image, (0,)),
  }
  for name, (module, x, axes) in make.items():
    params, static = eqx.partition(module, eqx.is_inexact_array)
    yield name, lambda p, s=static, x=x: eqx.combine(p, s)(x), params, axes
  embedding, static = eqx.partition(eqx.nn.Embedding(5, 3, key=_KEY), eqx.is_array)
  whole = lambda p: jax.vmap(eqx.combine(p, static))(jnp.arange(5))
  yield 'embedding', whole, embedding, (-1,)
  stack = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k))
  stack, static = eqx.partition(stack(jax.random.split(_KEY, 4)), eqx.is_array)
  each = lambda p: eqx.filter_vmap(lambda m: m(_X[0, 0, :4]))(eqx.combine(p, static))
  yield 'stacked', each, stack, (0, 1)


def _check(function, params, output_axes):
  """Filters are the sets of entries that feed one output; directions keep their norms.

  An entry is told by its Jacobian: the one output that it feeds.
  """

  def outputs(p):
    out = function(p)
    kept = {axis % out.ndim for axis in output_axes}
    return out.sum(tuple(i for i in range(out.ndim) if i not in kept)).ravel()

  jacobian = jax.tree.leaves(jax.jacrev(outputs)(params))
  leaves = jax.tree.leaves(params)
  (direction,) = landscape.random_directions(_KEY, params, 1)
  drawn = jax.tree.leaves(direction)
  weights = 0
  described = layouts.automatic().leaves(params)
  for (path, leaf), slopes, w, d in zip(
    described, jacobian, leaves, drawn, strict=True
  ):
    assert leaf.is_weight == ('bias' not in path), path
    if not leaf.is_weight:
      assert not np.any(d)
      continue
    weights += 1
    fed = np.asarray(slopes).reshape(slopes.shape[0], -1) != 0
    assert (fed.sum(0) == 1).all()
    output = fed.argmax(0).reshape(w.shape)
    number = np.indices(w.shape)[list(leaf.filter_axes)].reshape(
      len(leaf.filter_axes), *w.shape
    )
    shape = [w.shape[a] for a in leaf.filter_axes]
    number = np.ravel_multi_index(tuple(number), shape)
    # One to one: as many pairs as outputs, and as filters.
    pairs = set(zip(output.ravel().tolist(), number.ravel().tolist(), strict=True))
    assert len(pairs) == len(set(output.flat)) == len(set(number.flat))
    for one in set(output.flat):
      np.testing.assert_allclose(
        np.linalg.norm(np.asarray(d)[output == one]),
        np.linalg.norm(np.asarray(w)[output == one]),
        rtol=1e-5,
      )
  assert weights == 1


@pytest.mark.parametrize('name', _FLAX)
def test_filters_of_flax_modules_feed_one_output_each(name):
  make, output_axes = _FLAX[name]
  _check(*make(), output_axes)


def test_filters_of_equinox_modules_feed_one_output_each():
  for _, function, params, output_axes in _equinox_cases():
    _check(function, params, output_axes)


def test_equinox_norms_and_own_modules():
  eqx = pytest.importorskip('equinox')

  class Own(eqx.Module):
    matrix: jax.Array

  tree = {'norm': eqx.nn.LayerNorm((3, 4)), 'own': Own(jnp.ones((3, 4)))}
  tree = eqx.filter(tree, eqx.is_array)
  assert layouts.automatic().unknown(tree) == ['own/matrix']
  with pytest.raises(ValueError, match='own/matrix'):
    landscape.random_directions(_KEY, tree)
  landscape.random_directions(_KEY, tree, normalization='layer')
  found = dict(layouts.equinox().leaves(tree))
  assert found['own/matrix'] == (True, (0,))
  assert not found['norm/weight'].is_weight
  assert not found['norm/bias'].is_weight


@pytest.mark.parametrize('framework', ['linen', 'nnx'])
def test_attention(framework):
  if framework == 'linen':
    module = nn.MultiHeadDotProductAttention(2, qkv_features=6, normalize_qk=True)
    params = module.init(_KEY, _X, _X)['params']
  else:
    module = nnx.MultiHeadAttention(
      2, 8, 6, decode=False, normalize_qk=True, rngs=nnx.Rngs(0)
    )
    params = nnx.split(module, nnx.Param, ...)[1]
  for stripped in (
    params,
    {k: {'kernel': v['kernel']} for k, v in params.items() if 'kernel' in v},
  ):
    for path, leaf in layouts.automatic().leaves(stripped):
      kernel = path.endswith('kernel')
      assert leaf.is_weight == kernel
      if kernel:
        assert leaf.filter_axes == ((2,) if path == 'out/kernel' else (1, 2))


def test_scanned_layers():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
      return nn.LayerNorm()(nn.Dense(8)(carry)), None

  for length in (3, 8):
    scan = nn.scan(
      Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=length
    )
    params = jax.eval_shape(lambda s=scan: s().init(_KEY, _X, None))['params']
    plain = dict(layouts.automatic().leaves(params))
    stacked = dict(layouts.automatic(stacked={'': 0}).leaves(params))
    assert [p for p, leaf in plain.items() if leaf.is_weight] == ['Dense_0/kernel']
    assert plain['Dense_0/kernel'].filter_axes == (0, 2)
    assert stacked['Dense_0/kernel'] == (True, (0, 2))
    assert not any(leaf.is_weight for p, leaf in stacked.items() if 'kernel' not in p)


def test_what_is_not_known_is_said():
  ones = jnp.ones
  unknown = {
    'stem': {'kernel': ones((3, 8, 4))},
    'ScanLayer_0': {'Conv_0': {'kernel': ones((3, 2, 8, 4))}},
    'Einsum_0': {'kernel': ones((4, 4)), 'bias': ones(4)},
    'torch': {'weight': ones((4, 3))},
    'tie': {'kernel': ones((4, 4, 8)), 'bias': ones((4, 8))},
  }
  known = {'Conv_0': {'kernel': ones((3, 8, 4))}, 'rel_bias': ones((7, 2))}
  found = layouts.automatic().unknown({**unknown, **known})
  assert sorted(path.split('/')[0] for path in found) == sorted(unknown)
  for name, leaf in unknown.items():
    with pytest.raises(ValueError, match=f'{name}/.*layouts.rule'):
      landscape.random_directions(_KEY, {name: leaf})
  assert layouts.automatic(stacked={'tie': 0}).leaves({'tie': unknown['tie']}) == [
    ('tie/bias', (False, None)),
    ('tie/kernel', (True, (0, 2))),
  ]


def test_a_rule_of_ones_own():
  torch = layouts.rule(
    lambda p: layouts.Leaf(True, (0,)) if p.path.endswith('weight') else None
  )
  params = {'weight': jax.random.normal(_KEY, (4, 3)), 'bias': jnp.ones((4, 1))}
  for direction in landscape.random_directions(_KEY, params, layout=torch):
    assert not direction['bias'].any()
    np.testing.assert_allclose(
      jnp.linalg.norm(direction['weight'], axis=1),
      jnp.linalg.norm(params['weight'], axis=1),
      rtol=1e-5,
    )
  with pytest.raises(ValueError, match='no rule knows bias'):
    layouts.Layout((lambda p: None,)).leaves(params)
  with pytest.raises(ValueError, match='has no axes'):
    layouts.rule(lambda p: layouts.Leaf(True, (2,))).leaves(params)


def test_adaptive_scales_weights_only():
  """T is |w| on weights and 1 on a bias with two axes, in both uses of it."""
  params = {'kernel': jnp.full((3, 2, 2), 2.0), 'bias': jnp.full((2, 2), 5.0)}
  grads = jax.tree.map(jnp.ones_like, params)

  def eps(weights):
    method = perturbations.adaptive(0.0, weights=weights)
    return method.update(grads, method.init(params), params)[0]

  # T^2 g / |T g|: 12 entries of T = 2 and 4 of T = 1.
  np.testing.assert_allclose(eps(None)['bias'], 1 / 52**0.5, rtol=1e-6)
  np.testing.assert_allclose(eps(None)['kernel'], 4 / 52**0.5, rtol=1e-6)
  np.testing.assert_allclose(eps(layouts.last_axis())['bias'], 25 / 148**0.5, rtol=1e-6)

  # A linear loss rises by rho |T g|.
  total = lambda w, batch: (w['kernel'].sum() + w['bias'].sum()) * batch.mean()
  for weights, square in ((True, 148), (None, 52), (layouts.last_axis(), 148)):
    rise = sharpness.worst_case(
      total, params, [jnp.ones(2)], 0.1, adaptive=True, weights=weights, num_steps=1
    )
    np.testing.assert_allclose(rise.value, 0.1 * square**0.5, rtol=1e-5)


@pytest.mark.parametrize(
  'model',
  [
    models.MLP(),
    models.WideResNet(depth=10, width=1),
    models.Attention(features=8, head_features=(16,)),
    models.GCN(),
    models.GraphTransformer(),
  ],
  ids=lambda model: type(model).__name__,
)
def test_networks_of_this_tree(model):
  """All but the attention heads of the graph transformer: two axes, the last one."""
  params = jax.eval_shape(lambda: model.init(_KEY, _example(model)))['params']
  layout, former = layouts.automatic(), layouts.last_axis()
  assert not layout.unknown(params)
  differing = {
    path.split('/', 1)[1]: leaf
    for (path, leaf), (_, before) in zip(
      layout.leaves(params), former.leaves(params), strict=True
    )
    if leaf != before
  }
  if isinstance(model, models.GraphTransformer):
    names = ('query', 'key', 'value')
    assert differing == {
      **{f'{name}/kernel': (True, (1, 2)) for name in names},
      **{f'{name}/bias': (False, None) for name in names},
    }
  else:
    assert not differing


def _example(model):
  if isinstance(model, models.WideResNet):
    return jnp.zeros((1, 32, 32, 3))
  if isinstance(model, models.Attention):
    return jnp.zeros((2, 50))
  if isinstance(model, models.MLP):
    return jnp.zeros((2, 8, 8))
  jraph = pytest.importorskip('jraph')
  return jraph.GraphsTuple(
    nodes=np.ones((3, 14), np.float32),
    edges=np.ones((2, 3), np.float32),
    globals=None,
    senders=np.array([1, 0]),
    receivers=np.array([0, 1]),
    n_node=np.array([2, 1]),
    n_edge=np.array([2, 0]),
  )
