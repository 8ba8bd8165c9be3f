"""`jax.shard_map` with its default check_vma: the true mean, or one sentence.

The oracle is the same step under ``jax.vmap(axis_name=)``, where nothing is tracked.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sam_jax

AXIS, REPLICAS = 'data', 2
MESH = jax.make_mesh(
  (REPLICAS,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:REPLICAS]
)
PARAMS = {'w': jnp.array([0.3, -0.5, 0.8]), 'b': jnp.array(0.1)}
X = jax.random.normal(jax.random.key(0), (REPLICAS * 4, 3))
MEAN = sam_jax.cross_replica_mean(AXIS)
SGD = optax.sgd(0.1, momentum=0.9)


def losses(params, x):
  return (jnp.tanh(x @ params['w'] + params['b']) - x[:, 0]) ** 2


def loss(params, x):
  return losses(params, x).mean()


def build(method, axis_name=AXIS, **options):
  provided = {'learning_rate': 0.1, 'steps_per_epoch': 2, 'axis_name': axis_name}
  base = optax.chain(MEAN, SGD)
  wanted = inspect.signature(method).parameters
  options |= {k: v for k, v in provided.items() if k in wanted and k not in options}
  if 'inner' in wanted:
    return method(base, **options)
  return optax.chain(method(**options), base)


def functions(kind, x):
  rows = {
    None: lambda: x,
    'indices': lambda i: x[i],
    'group': lambda group: x.reshape(2, -1, 3)[group],
  }[kind]
  at = lambda p: local(p) if kind == 'group' else p
  given = {'value_and_grad_fn': lambda p, *i: jax.value_and_grad(loss)(at(p), rows(*i))}
  if kind == 'indices':
    given['example_losses_fn'] = lambda p: losses(p, x)
  return given


def local(params):
  """The parameters as values of each replica, where that is tracked."""
  if AXIS not in jax.typeof(jax.lax.axis_index(AXIS)).manual_axis_type.varying:
    return params
  varies = lambda x: AXIS in jax.typeof(x).manual_axis_type.varying
  cast = lambda x: x if varies(x) else jax.lax.pcast(x, AXIS, to='varying')
  return jax.tree.map(cast, params)


def step(tx, kind, recipe, params, opt_state, x):
  point = sam_jax.gradient_point(opt_state, params)
  grads = jax.grad(loss)(local(point) if recipe else point, x)
  updates, opt_state = tx.update(grads, opt_state, params, **functions(kind, x))
  return optax.apply_updates(params, updates), opt_state


def run(tx, mapped, kind=None, recipe=True, num_steps=3):
  """Parameters and state after three updates, which have both phases of a period."""
  body = functools.partial(step, tx, kind, recipe)
  carry = (PARAMS, tx.init(PARAMS))

  def steps(params, opt_state, x):
    one = lambda carry, _: (mapped(body)(*carry, x), None)
    return jax.lax.scan(one, (params, opt_state), length=num_steps)[0]

  return jax.jit(steps)(*carry, X)


def on_mesh(body, **options):
  return jax.shard_map(
    body, mesh=MESH, in_specs=(P(), P(), P(AXIS)), out_specs=P(), **options
  )


def on_one(body):
  def mapped(params, opt_state, x):
    shards = x.reshape(REPLICAS, -1, 3)
    both = jax.vmap(body, in_axes=(None, None, 0), axis_name=AXIS)
    return jax.tree.map(lambda leaf: leaf[0], both(params, opt_state, shards))

  return mapped


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def case(method, **options):
  kind = 'indices' if method.traits.chooses_examples else None
  if method.traits.period == 'every':
    options['every'] = 2
  return build(method, **options), kind


CASES = {
  name: functools.partial(case, method)
  for name, method in sam_jax.methods.find().items()
} | {
  'sam_off': lambda: case(sam_jax.sam, rho=0.0),
  'periodic': lambda: (
    optax.chain(
      sam_jax.periodic(sam_jax.sam(axis_name=AXIS), every=2, axis_name=AXIS), MEAN, SGD
    ),
    None,
  ),
  'm_sharpness': lambda: (
    optax.chain(sam_jax.m_sharpness(sam_jax.sam(axis_name=AXIS), 2), MEAN, SGD),
    'group',
  ),
  'common_perturbation': lambda: (
    optax.chain(
      sam_jax.cross_replica_mean(AXIS, keep_varying=True),
      sam_jax.usam(0.5, axis_name=AXIS),
      MEAN,
      SGD,
    ),
    None,
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_the_recipe_gives_the_true_mean(name):
  tx, kind = CASES[name]()
  assert_same(run(tx, on_mesh, kind), run(tx, on_one, kind))


def growing_signs():
  """A rule of one's own with a state: signs, at a radius that grows with each call."""

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    radius = 1 + state / 4
    return jax.tree.map(lambda g: radius * jnp.sign(g), updates), state + 1

  return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), update)


LAYOUT = sam_jax.layouts.rule(
  lambda p: sam_jax.layouts.Leaf(True) if p.path == 'w' else sam_jax.layouts.Leaf(False)
)
CUSTOM = {
  'asam_layout': lambda: build(sam_jax.asam, rho=0.5, weights=LAYOUT),
} | {
  method.__name__: functools.partial(build, method, perturbation=growing_signs())
  for method in (sam_jax.gsam, sam_jax.friendly_sam, sam_jax.msam, sam_jax.graphsam)
}


def on_devices(tx, num_steps=3):
  """As `run`, under `jax.pmap`; the parameters and the state of the first replica."""
  mapped = jax.pmap(
    functools.partial(step, tx, None, True),
    axis_name=AXIS,
    in_axes=(None, None, 0),
    devices=jax.devices()[:REPLICAS],
  )
  carry = PARAMS, tx.init(PARAMS)
  for _ in range(num_steps):
    replicas = mapped(*carry, X.reshape(REPLICAS, -1, 3))
    carry, other = (jax.tree.map(lambda x, i=i: x[i], replicas) for i in (0, 1))
    assert_same(carry, other)
  return carry


@pytest.mark.parametrize('name', CUSTOM)
def test_rules_of_ones_own_run_under_shard_map_and_pmap(name):
  tx = CUSTOM[name]()
  expected = run(tx, on_one)
  assert_same(run(tx, on_mesh), expected)
  assert_same(on_devices(tx), expected)


def test_without_tracking_nothing_has_to_be_cast():
  tx, _ = CASES['gsam']()
  unchecked = functools.partial(on_mesh, check_vma=False)
  assert_same(run(tx, unchecked, recipe=False), run(tx, on_one, recipe=False))


SUMMED = r"does not vary over 'data'.*jax.lax.pcast\(params, 'data', to=\"varying\"\)"


@pytest.mark.parametrize(
  'make',
  [
    lambda: build(sam_jax.gsam),
    lambda: build(sam_jax.gsam, axis_name=None),
    lambda: build(sam_jax.msam),
    lambda: build(sam_jax.graphsam),
    lambda: build(sam_jax.trace_sam, axis_name=None),
    lambda: optax.chain(MEAN, SGD),
    lambda: optax.chain(MEAN, sam_jax.sam(), SGD),
  ],
)
def test_gradients_that_are_sums_are_refused(make):
  with pytest.raises(ValueError, match=SUMMED):
    run(make(), on_mesh, recipe=False, num_steps=1)


def test_a_mean_before_a_method_is_told_to_keep_varying():
  tx = optax.chain(MEAN, sam_jax.sam(axis_name=AXIS), MEAN, SGD)
  with pytest.raises(ValueError, match='before a method needs keep_varying=True'):
    run(tx, on_mesh, num_steps=1)


def test_branches_without_an_axis_name_may_differ():
  """The state is then one of each replica; the loss recorded is that of its own."""
  tx = sam_jax.periodic(sam_jax.sam(0.1), every=2)

  def body(params, x):
    grads = jax.grad(loss)(local(params), x)
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(grads, state, params, **functions(None, x))
    return jax.tree.map(lambda leaf: leaf[None], (updates, grads))

  mapped = jax.shard_map(body, mesh=MESH, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
  updates, grads = jax.jit(mapped)(PARAMS, X)  # the second update passes through
  assert_same(updates, grads)
  assert not np.allclose(grads['w'][0], grads['w'][1])
