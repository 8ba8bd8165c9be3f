"""The state of every method can be donated, from the first step on."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import sam_jax

PARAMS = {'w': jnp.array([[0.5, -1.0]]), 'b': jnp.array([2.0, 3.0])}
SGD = optax.sgd(0.1, momentum=0.9)


def build(method, key=0):
  provided = {'learning_rate': 0.1, 'steps_per_epoch': 2, 'key': key}
  wanted = inspect.signature(method).parameters
  options = {k: v for k, v in provided.items() if k in wanted}
  return method(SGD, **options) if 'inner' in wanted else method(**options)


def buffers(tree):
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  raw = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
  return [x.unsafe_buffer_pointer() for x in raw]


@pytest.mark.parametrize('name', sam_jax.methods.find())
def test_no_two_leaves_share_a_buffer(name):
  tx = build(sam_jax.methods.find()[name])
  found = buffers((PARAMS, tx.init(PARAMS), tx.init(PARAMS)))
  assert len(set(found)) == len(found)


def test_the_state_is_donated_and_made_again():
  """The key that a method was given outlives the state that was made of it."""
  key = jax.random.key(3)
  tx = sam_jax.trace_sam(key=key)
  loss = lambda p: sum(jnp.sum(x**4) for x in jax.tree.leaves(p))

  @jax.jit
  def step(params, opt_state):
    take = jax.value_and_grad(loss)
    return tx.update(take(params)[1], opt_state, params, value_and_grad_fn=take)

  donating = jax.jit(step, donate_argnums=1)
  first, _ = donating(PARAMS, tx.init(PARAMS))
  again, _ = donating(PARAMS, tx.init(PARAMS))
  jax.tree.map(lambda a, b: (a == b).all() or pytest.fail('another key'), first, again)
