"""Curvature of parameters sharded over a 4 x 2 mesh: values, places and memory."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sam_jax import curvature
from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import operators

DEVICES = 8
# Over both axes of the mesh, over one of them, and whole on each device.
SPECS = {
  'in': P(None, 'fsdp'),
  'bias': P(),
  'middle': P('fsdp', 'data'),
  'out': P(('data', 'fsdp')),
  'scale': P(),
  'repeated': P('data', 'fsdp'),
}
REPEATED = 40.0  # beyond all eigenvalues of the network, four times at each end
COLLECTIVES = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'


def _loss(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['in'] + params['bias'][None])
  outputs = params['scale'] * jnp.tanh(hidden @ params['middle']) @ params['out']
  signs = jnp.array([[1, -1]], params['repeated'].dtype)
  added = REPEATED / 2 * jnp.sum(signs * params['repeated'] ** 2)
  return jnp.mean((outputs - batch['y']) ** 2) + added


def _problem(dtype=jnp.float64):
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
  params = {
    'in': normal(5, 6),
    'bias': normal(6),
    'middle': normal(6, 8) / 3,
    'out': normal(8, 3),
    'scale': jnp.asarray(1.5, dtype),
    'repeated': normal(4, 2),
  }
  return params, {'x': normal(8, 5), 'y': normal(8, 3)}


def _mesh(axis_type=AxisType.Auto):
  return jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(axis_type,) * 2)


def _placed(params, batch, mesh):
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return jax.tree.map(put, params, SPECS), jax.tree.map(
    lambda x: put(x, P('data')), batch
  )


def _dense(params, batch):
  flat, unflatten = ravel_pytree(params)
  return np.asarray(jax.jit(jax.hessian(lambda w: _loss(unflatten(w), batch)))(flat))


def _measured(params, batch, tol=1e-9):
  operator = curvature.hessian(_loss, params, [batch])
  pairs = curvature.eigenpairs(operator, 6, 'both', tol=tol, max_basis_size=30)
  density = curvature.spectral_density(operator, 8, 2)
  deflated = curvature.spectral_density(operator, 8, 2, pairs=pairs)
  diagonal = curvature.diagonal(operator, 4)
  return pairs, {
    'eigenvalues': pairs.eigenvalues,
    'nodes': density.nodes,
    'weights': density.weights,
    'deflated': deflated.nodes,
    'trace': curvature.trace(operator, 20).value,
    'rest': curvature.trace(operator, 6, pairs=pairs).value,
    'squares': curvature.squared_frobenius_norm(operator, 6, pairs=pairs).value,
    'diagonal': jax.device_get(diagonal.value),
    'of leaves': [x.value for x in diagonal.leaf_traces.values()],
  }


def _assert_lies_as(vector, params):
  for x, y in zip(jax.tree.leaves(vector), jax.tree.leaves(params), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, y.ndim), (x.sharding, y.sharding)


def test_results_are_those_of_one_device_and_of_the_dense_matrix(x64):
  params, batch = _problem()
  _, expected = _measured(params, batch)
  sharded, sharded_batch = _placed(params, batch, _mesh())
  pairs, found = _measured(sharded, sharded_batch)
  for name, value in found.items():
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-8),
      value,
      expected[name],
    )
  matrix = _dense(params, batch)
  values = np.linalg.eigvalsh(matrix)[::-1]
  ends = np.concatenate([values[:6], values[-6:]])
  assert (np.abs(np.abs(ends) - REPEATED) < 1e-9).sum() == 8  # four copies at each end
  np.testing.assert_allclose(pairs.eigenvalues, ends, rtol=1e-8, atol=1e-8)
  assert pairs.verified and pairs.num_matvecs > 30  # it restarted
  for value, vector in zip(pairs.eigenvalues, pairs.eigenvectors, strict=True):
    _assert_lies_as(vector, sharded)
    flat = ravel_pytree(jax.device_get(vector))[0]
    assert np.linalg.norm(matrix @ flat - value * flat) < 1e-7


def test_top_eigenpairs_in_jit_are_those_of_the_dense_matrix(x64):
  params, batch = _problem()
  sharded, sharded_batch = _placed(params, batch, _mesh())
  product = curvature.hessian_product(_loss)
  like = curvature.operator(lambda v: v, sharded).structure

  @jax.jit
  def top(params, batch):
    matvec = functools.partial(product, params, batch)
    return curvature.top_eigenpairs(matvec, like, 2, 'largest', tol=1e-9)

  found = top(sharded, sharded_batch)
  assert found.converged.all()
  # One Krylov space holds the repeated eigenvalue once.
  values = np.unique(np.linalg.eigvalsh(_dense(params, batch)).round(9))[::-1]
  np.testing.assert_allclose(found.eigenvalues, values[:2], rtol=1e-7)
  for stacked, leaf in zip(
    jax.tree.leaves(found.eigenvectors), jax.tree.leaves(sharded), strict=True
  ):
    expected = NamedSharding(leaf.sharding.mesh, P(None, *leaf.sharding.spec))
    assert stacked.sharding.is_equivalent_to(expected, stacked.ndim)


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_a_vector_is_packed_without_loss_and_drawn_as_on_one_device(
  axis_type, dtype, x64
):
  params, batch = _problem(dtype)
  params['half'] = jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3)
  params['none'] = jnp.zeros((0, 3), dtype)
  params['bulk'] = jnp.zeros((8, 5003), dtype)  # several chunks a device
  mesh = _mesh(axis_type)
  specs = {**SPECS, 'half': P('data'), 'none': P(), 'bulk': P('fsdp')}
  sharded = {
    name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
    for name, leaf in params.items()
  }
  layout, alone = basis_lib.Layout.of(sharded), basis_lib.Layout.of(params)
  packed = layout.pack(sharded)
  assert basis_lib.norm(packed) == pytest.approx(basis_lib.norm(alone.pack(params)))
  back = layout.unpack(packed)
  _assert_lies_as(back, sharded)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  key = jax.random.key(7)
  drawn = layout.normal(key)
  jax.tree.map(
    np.testing.assert_array_equal,
    layout.unpack(drawn),
    alone.unpack(alone.normal(key)),
  )
  # What fills the shares up is zero.
  assert (np.asarray(drawn) != 0).sum() == layout.size < drawn.size
  for array in (packed, drawn):
    shares = {shard.device: shard.data.nbytes for shard in array.addressable_shards}
    assert list(shares.values()) == [layout.vector_bytes] * DEVICES
  assert layout.vector_bytes <= 1.01 * alone.vector_bytes / DEVICES


def _wide(mesh):
  """Vectors of 1.6 MB, float32: over both axes, over one of them, and whole."""
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return {
    'both': put(jnp.linspace(1, 2, 1 << 18).reshape(512, 512), P('fsdp', 'data')),
    'data': put(jnp.linspace(2, 3, 1 << 16).reshape(256, 256), P(None, 'data')),
    'whole': put(jnp.linspace(3, 9, 1 << 16).reshape(256, 256), P()),
  }


def _collectives(compiled):
  """Each collective of a program, with the elements that it makes."""
  text = compiled.as_text()
  return [
    (kind, shape)
    for shape, kind in re.findall(rf'= (\S+)\{{\S* ({COLLECTIVES})\(', text)
  ]


def test_only_unpacking_gathers_and_only_what_the_axes_do_not_divide():
  diagonal = _wide(_mesh())
  layout = basis_lib.Layout.of(diagonal)
  lower = lambda function, *arguments: function.lower(*arguments).compile()
  vector = layout.pack(diagonal)
  basis = basis_lib.Basis(layout)
  basis.append(vector)
  block, coefficients = basis._blocks[0], np.ones(layout.block, np.float32)
  for compiled in (
    lower(basis_lib._pack, layout, diagonal),
    lower(basis_lib._normal, layout, jax.random.key(0)),
    lower(basis_lib._dots, block, vector),
    lower(basis_lib._subtract, vector, block, coefficients),
    lower(basis_lib._combine, block, block, np.eye(layout.block, dtype=np.float32)),
    lower(basis_lib._squares, vector),
    lower(basis_lib._write, block, vector, 1),
    lower(basis_lib._read, block, 1),
    lower(basis_lib.add_scaled, vector, 1.0, vector),
  ):
    assert not _collectives(compiled)
  # 'data' lies twice on the devices along fsdp, 'whole' eight times.
  unpack = lower(basis_lib._unpack, layout, vector)
  assert sorted(_collectives(unpack)) == [
    ('all-gather', f'f32[{(1 << 16) // 4}]'),
    ('all-gather', f'f32[{1 << 16}]'),
  ]


def _held():
  """Bytes of all arrays there are, by device."""
  held = collections.Counter()
  for array in jax.live_arrays():
    for shard in array.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return held


def test_a_search_holds_its_share_of_the_basis_on_each_device():
  diagonal = _wide(_mesh())
  multiply = jax.jit(functools.partial(jax.tree.map, jnp.multiply))
  operator = curvature.operator(lambda v: multiply(diagonal, v), diagonal)
  vector, before, most = 4 * operator.size, _held(), collections.Counter()

  def look(progress):
    if progress.num_matvecs == 20:
      most.update(_held() - before)

  curvature.eigenpairs(operator, 1, tol=1e-7, max_num_matvecs=24, progress=look)
  assert len(most) == DEVICES
  assert sum(most.values()) > 20 * vector
  # The blocks of the basis and at most 7 vectors to work with.
  room = basis_lib.Layout.of(operator.structure).rounded(20) + 7
  assert max(most.values()) <= room * vector / DEVICES


# A network of 48 layers, a scan over their stacked matrices.
WIDTH, LAYERS, EXAMPLES = 128, 48, 4


def _deep_loss(params, batch):
  step = lambda hidden, kernel: (jnp.tanh(hidden @ kernel), None)
  return jnp.mean(jax.lax.scan(step, batch, params)[0] ** 2)


def test_a_product_takes_its_share_of_memory_and_the_activations():
  """A product as the operator compiles it, on one device and on 4 x 2."""
  normal = np.random.default_rng(0).normal
  params = jnp.asarray(normal(size=(LAYERS, WIDTH, WIDTH)), jnp.float32)
  batch = jnp.asarray(normal(size=(EXAMPLES, WIDTH)), jnp.float32)
  put = lambda x, spec: jax.device_put(x, NamedSharding(_mesh(), spec))
  sharded = put(params, P(None, 'fsdp', 'data')), put(batch, P('data'))
  product = curvature.hessian_product(_deep_loss)

  def size(params, batch):
    sharding = curvature.operator(lambda v: v, params).structure.sharding
    found = operators._add_product.lower(
      (sharding,), product, params, batch, params, params, 1.0
    )
    memory = found.compile().memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + made + memory.temp_size_in_bytes

  activations = LAYERS * batch.nbytes
  assert params.nbytes > 30 * activations
  whole, share = size(params, batch), size(*sharded)
  assert whole >= 4 * params.nbytes
  assert share <= 1.15 * whole / DEVICES + activations


def test_float32_finds_the_eigenvalues_of_the_dense_float64_matrix():
  params, batch = _placed(*_problem(jnp.float32), _mesh())
  pairs = curvature.eigenpairs(
    curvature.hessian(_loss, params, [batch]), 6, 'largest', tol=1e-5
  )
  with jax.enable_x64(True):
    values = np.linalg.eigvalsh(_dense(*_problem()))[::-1]
  np.testing.assert_allclose(pairs.eigenvalues, values[:6], rtol=1e-5)
