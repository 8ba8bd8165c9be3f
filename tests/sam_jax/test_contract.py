"""The optimizer contract: a new method's file is found and tested by all of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import sam_jax
from tests.sam_jax.cases import (
  BASE,
  RHO,
  VARIANTS,
  as_numpy,
  assert_trees_equal,
  chain,
  compiled_step,
  each_kind,
  each_method,
  example_batch,
  functions,
  init_params,
  loss_fn,
  over,
  spec,
  train_step,
)


@each_kind
def test_jit_equals_eager(case):
  tx, step, _, _ = compiled_step(case)
  start = init_params()
  eager = train_step(case, tx, start, tx.init(start), example_batch())
  jitted = step(start, tx.init(start), example_batch())
  assert_trees_equal(eager, jitted, rtol=1e-5, atol=1e-6)


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
  if case.needs_function:
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
  if not case.wraps_base:
    case.make(RHO).init(shapes)  # without tracing too


@each_method
def test_plain_grad_fn_gives_the_same_updates(case):
  tx, batch, params = chain(case), example_batch(), init_params()
  grads = jax.grad(loss_fn)(params, batch)

  @jax.jit
  def step(grads, params, state):
    updates, state = tx.update(
      grads, state, params, **functions(case, batch, 'grad_fn')
    )
    return optax.apply_updates(params, updates), state

  if case.needs_value:
    with pytest.raises(ValueError, match='value_and_grad_fn'):
      step(grads, params, tx.init(params))
    return
  plain, state = step(grads, params, tx.init(params))
  with_value, _ = compiled_step(case)[1](params, tx.init(params), batch)
  assert_trees_equal(plain, with_value, rtol=1e-5, atol=1e-6)
  assert optax.tree.get(state, 'perturbed_loss') == 0


@each_method
def test_exactly_one_function_is_required(case):
  tx, params, batch = chain(case), init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)
  if not case.needs_function:
    return
  both = functions(case, batch) | functions(case, batch, 'grad_fn')
  rest = {k: v for k, v in both.items() if not k.endswith('grad_fn')}
  for given in (rest, both):
    with pytest.raises(ValueError, match='exactly one of grad_fn'):
      tx.update(grads, tx.init(params), params, **given)


@each_method
def test_another_tree_is_a_type_error(case):
  tx, params, batch = chain(case), init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)
  given = functions(case, batch)
  proper = given['value_and_grad_fn']

  def with_aux(params, *which):
    value, grads = proper(params, *which)
    return value, (grads, {'accuracy': 1.0})

  if case.needs_function:
    with pytest.raises(TypeError, match='tree structure'):
      tx.update(
        grads, tx.init(params), params, **given | {'value_and_grad_fn': with_aux}
      )


@each_kind
def test_python_zero_is_the_base_optimizer(case):
  _, _, params, _ = compiled_step(case, rho=0.0)
  expected, state = init_params(), BASE.init(init_params())

  @jax.jit
  def step(params, state, batch):
    updates, state = BASE.update(jax.grad(loss_fn)(params, batch), state)
    return optax.apply_updates(params, updates), state

  for _ in range(3):
    expected, state = step(expected, state, example_batch())
  tolerance = case.off_tolerance
  assert_trees_equal(params, expected, rtol=tolerance, atol=tolerance)


@over(VARIANTS)
def test_traced_rho_selects_and_vmaps(case):
  """vmap over rho equals one compiled step a value; rho = 0 returns the updates.

  For the methods themselves test_population.py asks for more.
  """
  params, batch = init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)

  @jax.jit
  def update(rho):
    tx = chain(case, rho)
    return tx.update(grads, tx.init(params), params, **functions(case, batch))[0]

  mapped = jax.vmap(update)(jnp.array([0.0, RHO]))
  off, on = (jax.tree.map(lambda x, i=i: x[i], mapped) for i in (0, 1))
  tolerance = case.off_tolerance
  base = BASE.update(grads, BASE.init(params))[0]
  assert_trees_equal(off, base, rtol=tolerance, atol=tolerance)
  after, _ = compiled_step(case)[1](params, chain(case).init(params), batch)
  moved = jax.tree.map(jnp.subtract, after, params)
  assert_trees_equal(on, moved, rtol=1e-3, atol=1e-5)


@each_kind
def test_injected_schedule(case):
  """inject_hyperparams and a schedule in rho itself run the same radii."""
  schedule = optax.linear_schedule(0.0, RHO, 4)
  injected = optax.inject_hyperparams(lambda rho: chain(case, rho))(rho=schedule)
  params, batch = init_params(), example_batch()
  grads = jax.grad(loss_fn)(params, batch)
  trails = []
  for tx in (injected, chain(case, schedule)):

    @jax.jit
    def update(state, tx=tx):
      return tx.update(grads, state, params, **functions(case, batch))

    state, trail = tx.init(params), []
    for _ in range(3):
      updates, state = update(state)
      trail.append(updates)
    trails.append(trail)
  assert_trees_equal(trails[0], trails[1], rtol=1e-6, atol=1e-7)
  if not hasattr(state, 'next_rho'):
    np.testing.assert_allclose(optax.tree.get(state, 'rho'), RHO / 2, rtol=1e-6)


@each_method
def test_zero_gradient_is_finite(case):
  params, batch = init_params(), example_batch()
  flat = batch | {'weight': jnp.zeros_like(batch['weight'])}
  tx, step, _, _ = compiled_step(case)
  with jax.debug_nans(True):
    after, state = step(params, tx.init(params), flat)
    after, state = step(after, state, flat)
    step(params, tx.init(params), batch)
  assert_trees_equal(after, params)
  assert all(np.all(np.isfinite(as_numpy(x))) for x in jax.tree.leaves(state))


def assert_half_precision(case, dtype):
  """Gradients are taken at float32 points; updates and parameters stay as they were."""
  params = init_params(dtype)
  batch = example_batch(dtype)
  seen = []

  def spy(params, batch):
    seen.append({x.dtype for x in jax.tree.leaves(params)})
    return loss_fn(params, batch).astype(jnp.float32)

  tx = chain(case)
  grads = jax.grad(loss_fn)(params, batch)
  update = lambda g, s, p: tx.update(g, s, p, **functions(case, batch, loss=spy))
  updates, state = jax.jit(update)(grads, tx.init(params), params)
  if not case.needs_function:
    seen.append(
      {x.dtype for x in jax.tree.leaves(sam_jax.gradient_point(state, params))}
    )
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
  assert {jnp.dtype(jnp.float32)} in seen
  assert spec(state) == spec(tx.init(params))
  assert optax.tree.get(state, 'gradient_norm').dtype == jnp.float32


@each_method
def test_bfloat16(case):
  assert_half_precision(case, jnp.bfloat16)


@each_kind
def test_float16(case):
  assert_half_precision(case, jnp.float16)


@each_method
def test_map_params_tells_trees_of_parameters_from_the_rest(case):
  tx, _, _, opt_state = compiled_step(case)
  kinds = optax.tree.map_params(
    tx, lambda leaf: 'parameter', opt_state, transform_non_params=lambda leaf: 'other'
  )
  shapes = {leaf.shape for leaf in jax.tree.leaves(init_params())}
  for leaf, kind in zip(
    jax.tree.leaves(opt_state), jax.tree.leaves(kinds), strict=True
  ):
    assert kind == ('parameter' if leaf.shape in shapes else 'other'), leaf.shape


@each_method
def test_float64_agrees_with_float32(case):
  _, _, params32, _ = compiled_step(case)
  with jax.enable_x64(True):
    widen = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
    params = widen(init_params(jnp.float32))
    batch = widen(example_batch(jnp.float32))
    tx = chain(case)
    state = tx.init(params)
    step = jax.jit(functools.partial(train_step, case, tx))
    for _ in range(3):
      params, state = step(params, state, batch)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    assert optax.tree.get(state, 'gradient_norm').dtype == jnp.float64
    if not case.sampled:
      assert_trees_equal(params, params32, rtol=1e-4, atol=1e-5)


@each_kind
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
    np.testing.assert_array_equal(as_numpy(leaf)[0], as_numpy(leaf)[1])
  assert_trees_equal(on_devices, on_one, rtol=1e-4, atol=1e-5)


@each_kind
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


@each_kind
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
  method = chain(case)
  expected, _ = compiled_step(case)[1](params, method.init(params), batch)
  wrappers = (
    optax.named_chain(('method', method)),
    optax.apply_if_finite(method, 3),
    optax.transforms.conditionally_transform(method, lambda step, **kw: step >= 0),
  )

  @jax.jit
  def update(grads, params):
    arguments = functions(case, batch)
    return [
      tx.update(grads, tx.init(params), params, **arguments)[0] for tx in wrappers
    ]

  for updates in update(grads, params):
    moved = optax.apply_updates(params, updates)
    assert_trees_equal(moved, expected, rtol=1e-5, atol=1e-6)
