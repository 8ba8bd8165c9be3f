"""Sharded parameters under plain jit: scalars cross the devices, and no leaf does."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_jax

DEVICES = 8
PARAMS = {
  'w': jnp.linspace(-1.0, 1.0, 64).reshape(16, 4),
  'v': jnp.linspace(0.5, 2.0, 8),
}
SPECS = {'w': P('model', None), 'v': P('model')}
SGD = optax.sgd(0.1, momentum=0.9)


def losses(params, indices=slice(None)):
  """Three examples, whose losses are sums over the entries: one scalar to reduce."""
  targets = jnp.arange(3.0)[indices]
  total = sum(jnp.sum(x**4 / 4) for x in jax.tree.leaves(params))
  return (total - targets) ** 2 / 100


def loss(params, *indices):
  return losses(params, *indices).mean()


def build(method):
  provided = {'learning_rate': 0.1, 'steps_per_epoch': 2, 'every': 2}
  wanted = inspect.signature(method).parameters
  options = {k: v for k, v in provided.items() if k in wanted}
  if 'inner' in wanted:
    return method(SGD, **options)
  return optax.chain(method(**options), SGD)


TRANSFORMATIONS = {
  name: functools.partial(build, method)
  for name, method in sam_jax.methods.find().items()
} | {
  'm_sharpness': lambda: optax.chain(sam_jax.m_sharpness(sam_jax.sam(), 3), SGD),
  'periodic': lambda: optax.chain(sam_jax.periodic(sam_jax.gsam(), every=2), SGD),
}


def step(tx, params, opt_state):
  point = sam_jax.gradient_point(opt_state, params)
  updates, opt_state = tx.update(
    jax.grad(loss)(point),
    opt_state,
    params,
    value_and_grad_fn=jax.value_and_grad(loss),
    example_losses_fn=losses,
  )
  return optax.apply_updates(params, updates), opt_state


@functools.cache
def on_one_device(name):
  tx = TRANSFORMATIONS[name]()
  return jax.jit(functools.partial(step, tx))(PARAMS, tx.init(PARAMS))


COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
)


def entries(shape):
  """The number of entries of the largest array in an HLO type."""
  sizes = re.findall(r'\w+\[([\d,]*)\]', shape)
  return max(int(np.prod([int(n) for n in s.split(',') if n])) for s in sizes)


# Methods whose reductions are those of another one, and the second kind of mesh for
# those that only take a norm.
_SLOW = ('asam', 'usam', 'wsam', 'frob_sam', 'det_sam')
_SLOW_AUTO = ('decoupled_wsam', 'msam', 'trace_sam', 'm_sharpness', 'periodic')


def meshes():
  for name in TRANSFORMATIONS:
    for kind in ('explicit', 'auto'):
      slow = name in _SLOW or (name in _SLOW_AUTO and kind == 'auto')
      marks = [pytest.mark.slow] if slow else []
      yield pytest.param(name, kind, marks=marks, id=f'{name}-{kind}')


@pytest.mark.parametrize(('name', 'kind'), list(meshes()))
def test_only_scalars_are_reduced(name, kind):
  types = (AxisType.Auto if kind == 'auto' else AxisType.Explicit,)
  mesh = jax.make_mesh((DEVICES,), ('model',), axis_types=types)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  params = jax.tree.map(put, PARAMS, SPECS)
  tx = TRANSFORMATIONS[name]()
  with jax.set_mesh(mesh):
    opt_state = tx.init(params)
    for leaf in jax.tree.leaves(opt_state):
      if leaf.shape and leaf.size > 3:  # directions and averages lie as the parameters
        assert leaf.sharding.spec == SPECS['w' if leaf.ndim == 2 else 'v']
    compiled = jax.jit(functools.partial(step, tx)).lower(params, opt_state).compile()
    text = compiled.as_text()
    carry = compiled(params, opt_state)
  found = [(match[2], entries(match[1])) for match in COLLECTIVE.finditer(text)]
  assert any(kind == 'all-reduce' for kind, _ in found)
  # Three losses of examples, for esam; what XLA joins into one reduction is a tuple.
  assert all(kind == 'all-reduce' and size <= 3 for kind, size in found), found
  expected = on_one_device(name)
  for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
