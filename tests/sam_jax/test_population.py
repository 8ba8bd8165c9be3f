"""Every method with its hyperparameters as traced numbers, one value a member.

The chain of each member is built inside the mapped function, as a population does, and
is compared in float64 with a chain built from Python numbers.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax
from sam_jax import methods

METHODS = methods.find()
TOTAL_STEPS = 3  # of the schedules
STEPS = 2  # of the test: one a phase
PERIOD = 2
# One row a member: radius, peak learning rate, weight decay.
MEMBERS = ((0.0, 0.1, 1e-2), (0.2, 0.3, 1e-3))
REPLICAS = 2


def loss(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['kernel'] + params['bias'][None])
  return jnp.mean((hidden.sum(axis=1) - batch['y']) ** 2)


def problem():
  keys = jax.random.split(jax.random.key(0), 3)
  draw = lambda key, shape: jax.random.normal(key, shape, jnp.float64)
  params = {'kernel': draw(keys[0], (3, 2)), 'bias': jnp.full(2, 0.1, jnp.float64)}
  x = draw(keys[1], (REPLICAS, 4, 3))
  return params, {'x': x, 'y': draw(keys[2], (REPLICAS, 4))}


def build(method, rho, peak, decay, options):
  """mean over replicas, weight decay and SGD, with the method before or around them."""
  # In float64 for Python numbers too: int32 / int would be float32.
  rate = lambda count: peak * (1 - jnp.asarray(count, jnp.float64) / (TOTAL_STEPS + 1))
  base = optax.inject_hyperparams(lambda learning_rate: optax.sgd(learning_rate, 0.9))
  after = optax.chain(
    sam_jax.cross_replica_mean('replicas'),
    optax.add_decayed_weights(decay),
    base(learning_rate=rate),
  )
  provided = {
    'inner': after,
    'learning_rate': rate,
    'total_steps': TOTAL_STEPS,
    'steps_per_epoch': PERIOD,
    'axis_name': 'replicas',
    'key': 3,
  }
  wanted = inspect.signature(method).parameters
  given = {name: value for name, value in provided.items() if name in wanted}
  built = method(**options | {'rho': rho} | given)
  return built if method.traits.wraps_base else optax.chain(built, after)


def functions(method, batch):
  """The extra arguments of an update."""
  if not method.traits.chooses_examples:
    return {'value_and_grad_fn': lambda w: jax.value_and_grad(loss)(w, batch)}
  rows = lambda indices: jax.tree.map(lambda leaf: leaf[indices], batch)
  one = lambda w, row: loss(w, jax.tree.map(lambda leaf: leaf[None], row))
  return {
    'value_and_grad_fn': lambda w, i: jax.value_and_grad(loss)(w, rows(i)),
    'example_losses_fn': lambda w: jax.vmap(one, (None, 0))(w, batch),
  }


def train(method, options, rho, peak, decay, params, batch):
  """Two steps of one member on one replica: parameters, and the recorded radii."""
  tx = build(method, rho, peak, decay, options)
  opt_state, radii = tx.init(params), []
  for step in range(STEPS):
    point = sam_jax.gradient_point(opt_state, params)
    updates, opt_state = tx.update(
      jax.grad(loss)(point, batch),
      opt_state,
      params,
      **functions(method, batch),
      phase=step % PERIOD == 0,
    )
    params = optax.apply_updates(params, updates)
    radii.append(optax.tree.get(opt_state, 'rho'))
  return params, jnp.stack(radii)


def assert_members_equal_static_chains(method, **options):
  """The population against one chain of Python numbers a member, all in one program."""
  period = method.traits.period
  if period and period not in methods.PROVIDED:
    options = {period: PERIOD} | options
  run = lambda *arguments: train(method, options, *arguments)

  @jax.jit
  def both(columns, params, shards):
    members = jax.vmap(run, (0, 0, 0, None, None), axis_name='members')
    replicas = lambda function: jax.vmap(
      function, (None,) * 4 + (0,), axis_name='replicas'
    )
    population = replicas(members)(*columns, params, shards)
    static = [
      replicas(lambda *rest, values=values: run(*values, *rest[3:]))(
        0, 0, 0, params, shards
      )
      for values in MEMBERS
    ]
    return population, static

  with jax.enable_x64(True):
    columns = tuple(jnp.asarray(column) for column in zip(*MEMBERS, strict=True))
    population, static = both(columns, *problem())
    for member, alone in enumerate(static):
      mine = jax.tree.map(lambda leaf, i=member: leaf[:, i], population)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        mine,
        alone,
      )
  return jax.tree.map(np.asarray, population)


# Instances of what trace_sam shows already; they run with the slow tests.
_SLOW = ('frob_sam', 'det_sam')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else [])
    for name in METHODS
  ],
)
def test_a_population_equals_static_chains(name):
  params, radii = assert_members_equal_static_chains(METHODS[name])
  # The members differ, and the replicas do not.
  kernels = params['kernel']
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert abs(kernels[0, 0] - kernels[0, 1]).max() > 1e-3
  assert radii[0].max(axis=1).tolist() == pytest.approx([0.0, 0.2])


def test_a_population_ties_the_radius_of_gsam_to_the_learning_rate():
  _, radii = assert_members_equal_static_chains(METHODS['gsam'], rho_min=0.0)
  # The rate falls linearly over three steps, so rho does: from 0.2 to 0.
  np.testing.assert_allclose(radii[0, 1], [0.2, 0.1], atol=1e-12)
