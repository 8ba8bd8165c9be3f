"""The optimizer contract, over every method: a new method is tested by adding a line.

One small regression network (a weight matrix, a bias, an output layer) serves all; each
method's step is compiled once per dtype and shared by the checks.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import sam_jax

RHO = 0.1
GROUPS = 2
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Case:
  """One method: how to build it, and what sets it apart from the rest."""

  name: str
  make: Callable  # (rho, axis_name=None) -> transformation
  grouped: bool = False  # grad_fn(params, group), incoming updates ignored
  off_tolerance: float = 0.0  # 0: rho = 0 is the base optimizer bit for bit


CASES = [
    Case('sam', sam_jax.sam),
    Case('asam', sam_jax.asam),
    Case(
        'asam_every_parameter',
        lambda rho, axis_name=None: sam_jax.asam(
            rho, 0.0, weights=True, axis_name=axis_name
        ),
    ),
    Case('usam', sam_jax.usam),
    Case(
        'm_sharpness',
        lambda rho, axis_name=None: sam_jax.m_sharpness(
            sam_jax.sam(rho, axis_name=axis_name), GROUPS
        ),
        grouped=True,
        off_tolerance=1e-6,
    ),
]

each_method = pytest.mark.parametrize('case', CASES, ids=lambda c: c.name)


def init_params(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 2)
  return {
      'hidden': {
          'kernel': 0.5 * jax.random.normal(keys[0], (3, 4), dtype),
          'bias': jnp.full((4,), 0.1, dtype),
      },
      'out': {'kernel': 0.5 * jax.random.normal(keys[1], (4, 1), dtype)},
  }


def example_batch(dtype=jnp.float32, size=BATCH):
  keys = jax.random.split(jax.random.key(1), 2)
  x = jax.random.normal(keys[0], (size, 3), dtype)
  return {'x': x, 'y': jnp.sin(x.sum(-1, keepdims=True))}


def loss_fn(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['hidden']['kernel'] + params['hidden']['bias'][None])
  return jnp.mean((hidden @ params['out']['kernel'] - batch['y']) ** 2)


def functions(case, batch, kind='value_and_grad_fn'):
  """The extra arguments of ``tx.update`` for one batch."""
  take = jax.value_and_grad if kind == 'value_and_grad_fn' else jax.grad
  if not case.grouped:
    return {kind: lambda params: take(loss_fn)(params, batch)}
  groups = jax.tree.map(lambda x: x.reshape(GROUPS, -1, *x.shape[1:]), batch)

  def of_group(params, group):
    return take(loss_fn)(params, jax.tree.map(lambda x: x[group], groups))

  return {kind: of_group}


def chain(case, rho=RHO, axis_name=None, base=None):
  steps = [case.make(rho, axis_name=axis_name)]
  if axis_name is not None:
    steps.append(sam_jax.cross_replica_mean(axis_name))
  return optax.chain(*steps, optax.sgd(0.1, momentum=0.9) if base is None else base)


def train_step(case, tx, params, opt_state, batch):
  grads = jax.grad(loss_fn)(params, batch)
  updates, opt_state = tx.update(grads, opt_state, params, **functions(case, batch))
  return optax.apply_updates(params, updates), opt_state


@functools.cache
def compiled_step(case, rho=RHO):
  """The jitted step, its transformation and its state after three steps."""
  tx = chain(case, rho)
  step = jax.jit(functools.partial(train_step, case, tx))
  params, batch = init_params(), example_batch()
  opt_state = tx.init(params)
  for _ in range(3):
    params, opt_state = step(params, opt_state, batch)
  return tx, step, params, opt_state


def assert_trees_equal(a, b, rtol=0.0, atol=0.0):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(
        np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol
    )


def spec(tree):
  return jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)


@each_method
def test_jit_equals_eager(case):
  tx, _, params, opt_state = compiled_step(case)
  p, s = init_params(), tx.init(init_params())
  for _ in range(3):
    p, s = train_step(case, tx, p, s, example_batch())
  assert_trees_equal(p, params, rtol=1e-5, atol=1e-6)
  assert_trees_equal(s, opt_state, rtol=1e-5, atol=1e-6)


@each_method
def test_state_is_stable_and_recorded(case):
  tx, _, params, opt_state = compiled_step(case)
  initial = tx.init(init_params())
  assert spec(initial) == spec(opt_state)
  assert jax.tree.structure(initial) == jax.tree.structure(opt_state)
  for name in ('count', 'rho', 'gradient_norm', 'perturbed_loss'):
    value = optax.tree.get(initial, name)
    assert value.shape == () and value == 0, name
    assert name == 'count' or value.dtype == jnp.float32
  assert optax.tree.get(opt_state, 'count') == 3
  np.testing.assert_allclose(optax.tree.get(opt_state, 'rho'), RHO, rtol=1e-6)
  assert optax.tree.get(opt_state, 'gradient_norm') > 0
  assert optax.tree.get(opt_state, 'perturbed_loss') > 0


@each_method
def test_init_on_shapes(case):
  tx = chain(case)
  params = init_params()
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  abstract = jax.eval_shape(tx.init, shapes)
  real = tx.init(params)
  assert jax.tree.structure(abstract) == jax.tree.structure(real)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == spec(real)
  case.make(RHO).init(shapes)  # without tracing too


@each_method
def test_plain_grad_fn_gives_the_same_updates(case):
  tx, batch, params = chain(case), example_batch(), init_params()
  grads = jax.grad(loss_fn)(params, batch)

  @functools.partial(jax.jit, static_argnums=0)
  def update(kind):
    return tx.update(grads, tx.init(params), params, **functions(case, batch, kind))

  with_value, _ = update('value_and_grad_fn')
  plain, state = update('grad_fn')
  assert_trees_equal(plain, with_value, rtol=1e-6, atol=1e-7)
  assert optax.tree.get(state, 'perturbed_loss') == 0


@each_method
def test_unknown_extra_arguments_are_accepted(case):
  tx, params, batch = chain(case), init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)
  tx.update(grads, tx.init(params), params, **functions(case, batch), value=1.0, foo='x')


@each_method
def test_exactly_one_function_is_required(case):
  tx, params, batch = chain(case), init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)
  both = functions(case, batch) | functions(case, batch, 'grad_fn')
  for given in ({}, both):
    with pytest.raises(ValueError, match='exactly one of grad_fn'):
      tx.update(grads, tx.init(params), params, **given)


@each_method
def test_another_tree_is_a_type_error(case):
  tx, params, batch = chain(case), init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)

  def with_aux(params, *group):
    del group
    return jax.grad(loss_fn)(params, batch), {'accuracy': 1.0}

  with pytest.raises((TypeError, ValueError), match='tree structure'):
    tx.update(grads, tx.init(params), params, grad_fn=with_aux)


@each_method
def test_python_zero_is_the_base_optimizer(case):
  base = optax.sgd(0.1, momentum=0.9)
  _, _, params, _ = compiled_step(case, rho=0.0)
  expected, state = init_params(), base.init(init_params())

  @jax.jit
  def step(params, state, batch):
    updates, state = base.update(jax.grad(loss_fn)(params, batch), state)
    return optax.apply_updates(params, updates), state

  for _ in range(3):
    expected, state = step(expected, state, example_batch())
  tolerance = case.off_tolerance
  assert_trees_equal(params, expected, rtol=tolerance, atol=tolerance)


@each_method
def test_traced_rho_selects_and_vmaps(case):
  """vmap over rho equals one compiled step a value; rho = 0 returns the updates."""
  params, batch = init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)

  @jax.jit
  def update(rho):
    tx = case.make(rho)
    return tx.update(grads, tx.init(params), params, **functions(case, batch))[0]

  rhos = jnp.array([0.0, 0.05, RHO])
  mapped = jax.jit(jax.vmap(update))(rhos)
  for i, rho in enumerate(rhos):
    assert_trees_equal(
        jax.tree.map(lambda x, i=i: x[i], mapped), update(rho), rtol=1e-5, atol=1e-6
    )
  if case.off_tolerance == 0:
    assert_trees_equal(update(jnp.float32(0)), grads)


@each_method
def test_injected_schedule(case):
  """inject_hyperparams and a schedule in rho itself run the same radii."""
  schedule = optax.linear_schedule(0.0, RHO, 4)
  injected = optax.inject_hyperparams(lambda rho: case.make(rho))(rho=schedule)
  params, batch = init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)
  trails = []
  for tx in (injected, case.make(schedule)):

    @jax.jit
    def update(state, tx=tx):
      return tx.update(grads, state, params, **functions(case, batch))

    state, trail = tx.init(params), []
    for _ in range(3):
      updates, state = update(state)
      trail.append(updates)
    trails.append(trail)
  assert_trees_equal(trails[0], trails[1], rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(optax.tree.get(state, 'rho'), RHO / 2, rtol=1e-6)


@each_method
def test_zero_gradient_is_finite(case):
  params, batch = init_params(), example_batch()
  flat = {'grad_fn': lambda params, *group: jax.tree.map(jnp.zeros_like, params)}
  tx = case.make(RHO)
  with jax.debug_nans(True):
    updates, state = jax.jit(
        lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p, **flat)
    )(params)
    train_step(case, tx, params, tx.init(params), batch)
  assert all(not np.any(x) for x in jax.tree.leaves(updates))
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@each_method
def test_bfloat16(case):
  """Gradients are taken at float32 points; updates and parameters stay bfloat16."""
  params = init_params(jnp.bfloat16)
  batch = example_batch(jnp.bfloat16)
  seen = []

  def spy(params, *group):
    del group
    seen.append({x.dtype for x in jax.tree.leaves(params)})
    return jax.tree.map(
        lambda g, p: g.astype(p.dtype), jax.grad(loss_fn)(params, batch), params
    )

  tx = chain(case)
  updates, state = tx.update(
      jax.grad(loss_fn)(params, batch), tx.init(params), params, grad_fn=spy
  )
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
  assert seen[-1] == {jnp.dtype(jnp.float32)}
  assert spec(state) == spec(tx.init(params))
  assert optax.tree.get(state, 'gradient_norm').dtype == jnp.float32


@each_method
def test_float64_agrees_with_float32(case):
  _, _, params32, _ = compiled_step(case)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), init_params(jnp.float32))
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), example_batch(jnp.float32))
    tx = chain(case)
    state = tx.init(params)
    step = jax.jit(functools.partial(train_step, case, tx))
    for _ in range(3):
      params, state = step(params, state, batch)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    assert optax.tree.get(state, 'gradient_norm').dtype == jnp.float64
    assert_trees_equal(params, params32, rtol=1e-4, atol=1e-5)


@each_method
def test_replicas_stay_identical(case):
  """Ten steps on two devices with different batches: one train state, bit for bit."""
  tx = chain(case, axis_name='batch')
  params, batch = init_params(), example_batch()
  shards = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
  step = functools.partial(train_step, case, tx)
  state = (params, tx.init(params))
  replicated = jax.tree.map(lambda x: jnp.stack([x, x]), state)
  pmapped = jax.pmap(step, axis_name='batch', devices=jax.devices()[:2])
  vmapped = jax.jit(jax.vmap(step, axis_name='batch'))
  on_devices, on_one = replicated, replicated
  for _ in range(10):
    on_devices = pmapped(*on_devices, shards)
    on_one = vmapped(*on_one, shards)
  for leaf in jax.tree.leaves(on_devices):
    np.testing.assert_array_equal(leaf[0], leaf[1])
  assert_trees_equal(on_devices, on_one, rtol=1e-4, atol=1e-5)


@each_method
def test_named_sharding(case):
  """Plain jit over a mesh, batch and kernel sharded, equals one device."""
  _, step, params, _ = compiled_step(case)
  mesh = jax.make_mesh(
      (2, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  put = lambda x, *axes: jax.device_put(
      x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  )
  batch = jax.tree.map(lambda x: put(x, 'data'), example_batch())
  sharded = jax.tree.map(put, init_params())
  sharded['hidden']['kernel'] = put(init_params()['hidden']['kernel'], None, 'model')
  tx = chain(case)
  state = tx.init(sharded)
  step = jax.jit(functools.partial(train_step, case, tx))
  for _ in range(3):
    sharded, state = step(sharded, state, batch)
  assert_trees_equal(sharded, params, rtol=1e-5, atol=1e-6)


@each_method
def test_checkpoint_round_trip(case, tmp_path):
  """A state restored from disk goes on bit for bit as the one that stayed."""
  _, step, params, opt_state = compiled_step(case)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', (params, opt_state))
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', (params, opt_state))
  assert_trees_equal(
      step(*restored, example_batch()), step(params, opt_state, example_batch())
  )


@each_method
def test_passes_through_wrappers(case):
  """chain, named_chain, apply_if_finite and conditionally_transform change nothing."""
  params, batch = init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)
  method = case.make(RHO)
  expected, _ = method.update(
      grads, method.init(params), params, **functions(case, batch)
  )
  for wrapped in (
      optax.named_chain(('method', method)),
      optax.apply_if_finite(method, 3),
      optax.transforms.conditionally_transform(method, lambda step, **kw: step >= 0),
  ):
    updates, _ = wrapped.update(
        grads, wrapped.init(params), params, **functions(case, batch)
    )
    assert_trees_equal(updates, expected, rtol=1e-6, atol=1e-7)
