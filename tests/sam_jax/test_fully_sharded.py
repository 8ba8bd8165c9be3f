"""Fully sharded training under plain jit: parameters, state and batch over one mesh."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_jax
from tests.sam_jax.cases import (
  CASES,
  assert_trees_equal,
  chain,
  each_kind,
  example_batch,
  init_params,
  loss_fn,
  over,
  train_step,
)


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def sharding_of(mesh, path, leaf):
  """A rule on path and shape: biases are whole, kernels split their largest axis."""
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  fits = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % 2 == 0]
  if name.endswith('bias') or not fits:
    return NamedSharding(mesh, P())
  largest = max(fits, key=lambda axis: leaf.shape[axis])
  return NamedSharding(mesh, P(*[None] * largest, 'fsdp'))


def shardings_of(mesh, tx, params, opt_state):
  """Those of the parameters, and of the optimizer state by `map_params`."""
  of_params = jax.tree_util.tree_map_with_path(
    functools.partial(sharding_of, mesh), params
  )
  of_state = optax.tree.map_params(
    tx,
    lambda _, sharding: sharding,
    opt_state,
    of_params,
    transform_non_params=lambda _: NamedSharding(mesh, P()),
  )
  return of_params, of_state


def placed(mesh, tx, params, batch):
  """Parameters and state by the rule, the batch over both axes; with their places."""
  carry = params, tx.init(params)
  places = shardings_of(mesh, tx, *carry)
  rows = NamedSharding(mesh, P(('data', 'fsdp')))
  batch = jax.tree.map(lambda x: jax.device_put(x, rows), batch)
  return jax.device_put(carry, places), batch, places


def assert_lies_as(tree, places):
  for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)


@each_kind
def test_several_steps_equal_one_device_and_state_stays_where_it_is(case, mesh, x64):
  tx = chain(case)
  params, batch = init_params(jnp.float64), example_batch(jnp.float64)
  expected = params, tx.init(params)
  found, sharded_batch, places = placed(mesh, tx, params, batch)
  # Without a word from the caller. Only where a method chooses examples does the
  # compiler lay out the network otherwise, and wants to be told.
  told = {'out_shardings': places} if case.arguments == 'indices' else {}
  step = functools.partial(train_step, case, tx)
  one_device, on_mesh = jax.jit(step), jax.jit(step, **told)
  assert any(not place.is_fully_replicated for place in jax.tree.leaves(places))
  for _ in range(4):
    expected = one_device(*expected, batch)
    found = on_mesh(*found, sharded_batch)
    assert_lies_as(found, places)
  assert_trees_equal(found, expected, rtol=1e-12, atol=1e-13)


def wide_params():
  """A kernel of 2048 entries, larger than anything else in a step."""
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    'hidden': {'kernel': jax.random.normal(keys[0], (32, 64)), 'bias': jnp.zeros(64)},
    'out': {'kernel': jax.random.normal(keys[1], (64, 1))},
  }


def wide_batch():
  x = jax.random.normal(jax.random.key(1), (16, 32))
  return {'x': x, 'y': x[:, :1], 'weight': jnp.ones((16, 1))}


_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
)


def collectives(compiled):
  """How often a program moves how many entries between devices, but for scalars."""
  found = collections.Counter()
  for match in _COLLECTIVE.finditer(compiled.as_text()):
    for shape in re.findall(r'\w+\[([\d,]*)\]', match[1]):
      size = int(np.prod([int(n) for n in shape.split(',') if n]))
      found[match[2], size] += size > 1
  return +found


@pytest.fixture(scope='module')
def of_two_gradients(mesh):
  """What the model's own two gradients move, at points that are given."""

  def gradients(params, point, batch):
    here, there = (jax.value_and_grad(loss_fn)(x, batch) for x in (params, point))
    return here[1], there[1], there[0]

  (params, _), batch, (places, _) = placed(
    mesh, optax.sgd(0.1), wide_params(), wide_batch()
  )
  out = places, places, NamedSharding(mesh, P())
  compiled = jax.jit(gradients, out_shardings=out).lower(params, params, batch)
  return collectives(compiled.compile())


def of_step(mesh, case, tx):
  carry, batch, places = placed(mesh, tx, wide_params(), wide_batch())
  step = jax.jit(functools.partial(train_step, case, tx), out_shardings=places)
  return collectives(step.lower(*carry, batch).compile())


_EXACT = ('sam', 'asam', 'gsam', 'usam', 'wsam', 'decoupled_wsam', 'trace_sam')


@over(
  [case for case in CASES if case.name in _EXACT],
  slow=[name for name in _EXACT if name not in ('sam', 'asam', 'gsam')],
)
def test_a_perturbation_adds_scalars_to_what_two_gradients_move(
  case, mesh, of_two_gradients
):
  """No leaf, and no part of one, crosses devices for a norm or for eps-hat."""
  assert of_two_gradients['all-reduce', 1024] == 2  # of each gradient over 'data'
  assert of_step(mesh, case, chain(case)) == of_two_gradients


@over(
  [case for case in CASES if case.name not in _EXACT],
  slow=[case.name for case in CASES if case.name != 'looksam'],
)
def test_no_method_gathers_the_largest_leaf(case, mesh):
  moved = of_step(mesh, case, chain(case))
  assert moved and max(size for _, size in moved) < 2048


def test_a_gathered_leaf_would_be_seen(mesh):
  """A perturbation whose norm is that of one long vector, which is a gather."""

  def update(grads, state, params=None):
    long = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    return optax.tree.scale(1 / jnp.linalg.norm(jnp.sort(long)), grads), state

  ravelled = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
  tx = optax.chain(sam_jax.sam(perturbation=ravelled), optax.sgd(0.1))
  (case,) = (case for case in CASES if case.name == 'sam')
  assert max(size for _, size in of_step(mesh, case, tx)) >= 2048


@pytest.mark.parametrize('first_rho', [0.0, 0.3])
def test_schedules_reach_the_optimizer_and_the_ascent(first_rho, mesh, x64):
  """On a quadratic every step is ``w - rate_t H (w + rho_t g / |g|)``, g = H w."""
  rates = np.array([0.0, 0.2, 0.05, 0.1])
  radii = np.array([first_rho, 0.1, 0.4, 0.0])
  curvature, start = np.linspace(0.5, 2.0, 16), np.linspace(-1.0, 1.0, 16)
  scheduled = lambda values: lambda count: jnp.asarray(values)[count]
  tx = optax.chain(
    sam_jax.sam(scheduled(radii)), optax.sgd(scheduled(rates), momentum=0.0)
  )

  def step(params, opt_state, rows):
    # The mean over the rows is one half of the quadratic form of the curvature.
    loss = lambda w: jnp.mean(rows @ (curvature * w['kernel'] ** 2)) / 2
    value_and_grad = jax.value_and_grad(loss)
    value, grads = value_and_grad(params)
    updates, opt_state = tx.update(
      grads, opt_state, params, value=value, value_and_grad_fn=value_and_grad
    )
    return optax.apply_updates(params, updates), opt_state

  carry, rows, places = placed(
    mesh, tx, {'kernel': jnp.asarray(start)}, np.ones((8, 16))
  )
  step = jax.jit(step, out_shardings=places)
  expected = start
  for rate, radius in zip(rates, radii, strict=True):
    gradient = curvature * expected
    ascended = expected + radius * gradient / np.linalg.norm(gradient)
    expected = expected - rate * curvature * ascended
    carry = step(*carry, rows)
    np.testing.assert_allclose(carry[0]['kernel'], expected, rtol=1e-12)
    np.testing.assert_allclose(optax.tree.get(carry[1], 'rho'), radius, rtol=1e-12)
