"""Every method, and what a test of all of them has to know of each.

One small regression network (a weight matrix, a bias, an output layer) serves all; each
method's step is compiled once per dtype and shared by the checks.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax

RHO = 0.1
GROUPS = 2
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Case:
  """One method: how to build it, and what sets it apart from the rest.

  Attributes:
    make: ``(rho, axis_name=None) -> transformation``; for a method that wraps the base
      chain ``(base, rho, axis_name=None)``.
    arguments: what its gradient function takes besides params: '', 'group', 'indices'.
    off_tolerance: 0 if rho = 0 is the base optimizer bit for bit.
    needs_value: whether a plain grad_fn is refused.
    needs_function: whether it takes a gradient of its own.
    sampled: whether it draws random numbers, which differ between dtypes.
  """

  name: str
  make: Callable
  arguments: str = ''
  off_tolerance: float = 0.0
  needs_value: bool = False
  needs_function: bool = True
  wraps_base: bool = False
  sampled: bool = False


def keyword(method, **options):
  """A maker that hands rho, the axis and some options to a method."""
  return lambda rho, axis_name=None: method(rho=rho, axis_name=axis_name, **options)


# What a method is called with here, and what the checks have to know of it, where a
# new method needs nothing: its gradient may be plain, and it draws no random numbers
# unless it takes a key.
_OPTIONS = {
  'looksam': {'every': 2},
  'graphsam': {'gamma': 1.0},
  'frob_sam': {'antithetic': True},
}
_NEEDS_VALUE = ('trace_sam', 'frob_sam', 'det_sam')
_LOOP = {'learning_rate': 0.1, 'steps_per_epoch': 2}


def declared_case(name, method):
  """The case of a method, from its traits and its signature."""
  wanted = inspect.signature(method).parameters
  options = _OPTIONS.get(name, {}) | {
    key: value
    for key, value in _LOOP.items()
    if key in wanted and wanted[key].default is inspect.Parameter.empty
  }
  traits = method.traits

  def wrapping(base, rho, axis_name=None):
    return method(base, rho=rho, axis_name=axis_name, **options)

  return Case(
    name,
    wrapping if traits.wraps_base else keyword(method, **options),
    arguments='indices' if traits.chooses_examples else '',
    needs_value=name in _NEEDS_VALUE,
    needs_function=not traits.one_gradient or traits.period is not None,
    wraps_base=traits.wraps_base,
    sampled='key' in wanted,
  )


# Methods with other options, and wrappers of a method.
VARIANTS = [
  Case('sam_two_ascent_steps', keyword(sam_jax.sam, num_ascent_steps=2)),
  Case('asam_every_parameter', keyword(sam_jax.asam, eta=0.0, weights=True)),
  Case(
    'periodic',
    lambda rho, axis_name=None: sam_jax.periodic(
      sam_jax.sam(rho, axis_name=axis_name), every=2, axis_name=axis_name
    ),
  ),
  Case(
    'm_sharpness',
    lambda rho, axis_name=None: sam_jax.m_sharpness(
      sam_jax.sam(rho, axis_name=axis_name), GROUPS
    ),
    arguments='group',
    off_tolerance=1e-6,
  ),
  Case(
    'm_sharpness_of_looksam',
    lambda rho, axis_name=None: sam_jax.m_sharpness(
      sam_jax.looksam(rho, every=2, axis_name=axis_name), GROUPS
    ),
    arguments='group',
    off_tolerance=1e-6,
  ),
]
CASES = [declared_case(*item) for item in sam_jax.methods.find().items()] + VARIANTS

# Instances of what others show already; they run with the slow tests.
_SLOW = ('frob_sam', 'det_sam', 'm_sharpness_of_looksam')


# One of each kind; the costly checks of the others run with the slow tests.
_KINDS = ('sam', 'gsam', 'esam', 'msam', 'graphsam', 'trace_sam', 'decoupled_wsam')
_KINDS += ('periodic', 'm_sharpness')


def over(cases, slow=_SLOW):
  """Parametrizes a test over cases."""
  return pytest.mark.parametrize(
    'case',
    [
      pytest.param(
        case, id=case.name, marks=[pytest.mark.slow] if case.name in slow else []
      )
      for case in cases
    ],
  )


each_method = over(CASES)
each_kind = over(CASES, [case.name for case in CASES if case.name not in _KINDS])


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
  y = jnp.sin(x.sum(-1, keepdims=True))
  return {'x': x, 'y': y, 'weight': jnp.ones((size, 1), dtype)}


def loss_fn(params, batch):
  hidden = params['hidden']
  hidden = jnp.tanh(batch['x'] @ hidden['kernel'] + hidden['bias'][None])
  errors = (hidden @ params['out']['kernel'] - batch['y']) ** 2
  return jnp.mean(batch['weight'] * errors)


def functions(case, batch, kind='value_and_grad_fn', loss=None):
  """The extra arguments of ``tx.update`` for one batch."""
  loss = loss_fn if loss is None else loss
  take = jax.value_and_grad if kind == 'value_and_grad_fn' else jax.grad
  groups = jax.tree.map(lambda x: x.reshape(GROUPS, -1, *x.shape[1:]), batch)
  rows = {
    '': lambda: batch,
    'group': lambda group: jax.tree.map(lambda x: x[group], groups),
    'indices': lambda indices: jax.tree.map(lambda x: x[indices], batch),
  }[case.arguments]
  arguments = {kind: lambda params, *which: take(loss)(params, rows(*which))}
  if case.arguments == 'indices':
    each = lambda params, x: loss(params, jax.tree.map(lambda leaf: leaf[None], x))
    arguments['example_losses_fn'] = lambda params: jax.vmap(each, (None, 0))(
      params, batch
    )
  return arguments


BASE = optax.sgd(0.1, momentum=0.9)


def chain(case, rho=RHO, axis_name=None):
  mean = [] if axis_name is None else [sam_jax.cross_replica_mean(axis_name)]
  if case.wraps_base:
    return case.make(optax.chain(*mean, BASE), rho, axis_name=axis_name)
  return optax.chain(case.make(rho, axis_name=axis_name), *mean, BASE)


def train_step(case, tx, params, opt_state, batch):
  point = sam_jax.gradient_point(opt_state, params)
  grads = jax.grad(loss_fn)(point, batch)
  updates, opt_state = tx.update(
    grads, opt_state, params, **functions(case, batch), unknown='ignored'
  )
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


def as_numpy(x):
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x, np.float64)


def assert_trees_equal(a, b, rtol=0.0, atol=0.0):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(as_numpy(x), as_numpy(y), rtol=rtol, atol=atol)


def spec(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)
