"""Parameters of other kinds than float32 arrays: right, or one sentence."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax

METHODS = sam_jax.methods.find()
SGD = optax.sgd(0.1, momentum=0.9)


def build(method, **options):
  provided = {'learning_rate': 0.1, 'steps_per_epoch': 2, 'every': 2}
  wanted = inspect.signature(method).parameters
  options |= {k: v for k, v in provided.items() if k in wanted}
  if 'inner' in wanted:
    return method(SGD, **options)
  return optax.chain(method(**options), SGD)


def losses(params, indices=slice(None)):
  total = sum(jnp.sum(x**4) for x in jax.tree.leaves(params))
  return (total - jnp.arange(3.0)[indices].astype(jnp.result_type(total))) ** 2


def loss(params, *indices):
  return jnp.mean(losses(params, *indices))


def step(tx, params, opt_state):
  """One update, with gradients as they come from the gradient point."""
  point = sam_jax.gradient_point(opt_state, params)
  return tx.update(
    jax.grad(loss)(point),
    opt_state,
    params,
    value_and_grad_fn=jax.value_and_grad(loss),
    example_losses_fn=losses,
  )


each = pytest.mark.parametrize('name', METHODS)


@each
def test_what_is_not_real_is_refused(name):
  tx = build(METHODS[name])
  real = jnp.ones(2)
  with pytest.raises(TypeError, match=r"complex64 at \['z'\]: hold the real and the"):
    tx.init({'a': real, 'z': jnp.ones(2, jnp.complex64)})
  for leaf in (jnp.arange(3), 3, True, jax.random.key(0)):
    with pytest.raises(TypeError, match=r"at \['z'\]: keep what is not trained out"):
      tx.init({'a': real, 'z': leaf})


@each
def test_python_floats_and_none_are_leaves_like_others(name):
  """The same updates as with arrays; the state keeps its types."""
  tx = build(METHODS[name])
  arrays = {'a': jnp.array([0.5, -0.3]), 'b': jnp.array(0.7)}
  odd = {'a': arrays['a'], 'b': 0.7, 'none': None}
  expected, _ = step(tx, arrays, tx.init(arrays))
  updates, state = step(tx, odd, tx.init(odd))
  assert updates['none'] is None
  if 'sampler' not in inspect.signature(METHODS[name]).parameters and name != 'esam':
    for key in arrays:  # the random numbers of a tree depend on its structure
      np.testing.assert_allclose(updates[key], expected[key], rtol=1e-5)
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert types(state) == types(tx.init(odd))


@each
def test_an_empty_tree_has_nothing_to_update(name):
  tx = build(METHODS[name])
  nothing = lambda params, *indices: (jnp.float32(0), {})
  updates, state = tx.update(
    {},
    tx.init({}),
    {},
    value_and_grad_fn=nothing,
    example_losses_fn=lambda params: jnp.zeros(3),
  )
  assert updates == {}
  assert optax.tree.get(state, 'gradient_norm') == 0


@each
def test_params_are_asked_for(name):
  tx, params = build(METHODS[name]), {'a': jnp.ones(2)}
  if name == 'msam':  # follows a buffer in its state
    return
  with pytest.raises(ValueError, match='the perturbation starts from the parameters'):
    tx.update(
      params,
      tx.init(params),
      value_and_grad_fn=jax.value_and_grad(loss),
      example_losses_fn=losses,
    )


@pytest.mark.parametrize('name', ['msam', 'graphsam'])
@pytest.mark.parametrize('base', [SGD, optax.adam(0.1)], ids=['sgd', 'adam'])
def test_one_gradient_methods_scan_over_bfloat16(name, base):
  """Their gradients are taken at a float32 point; the state keeps its types."""
  params = {'a': jnp.array([0.5, -0.3], jnp.bfloat16)}
  if name == 'msam':
    tx = sam_jax.msam(base)
  else:
    tx = optax.chain(sam_jax.graphsam(steps_per_epoch=2), base)

  def body(carry, _):
    params, opt_state = carry
    updates, opt_state = step(tx, params, opt_state)
    return (optax.apply_updates(params, updates), opt_state), updates

  (params, _), updates = jax.lax.scan(body, (params, tx.init(params)), length=3)
  assert params['a'].dtype == updates['a'].dtype == jnp.bfloat16
  assert jnp.abs(updates['a']).min() > 0


def bfloat16_problem():
  """A network whose clean bfloat16 gradient is off by several percent."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (64, 8))
  params = {
    'hidden': jax.random.normal(keys[1], (8, 16), jnp.bfloat16),
    'out': jax.random.normal(keys[2], (16,), jnp.bfloat16) / 4,
  }

  def loss(params):
    hidden = jnp.tanh(x.astype(params['hidden'].dtype) @ params['hidden'])
    return jnp.mean((hidden @ params['out'] - jnp.sin(x[:, 0])) ** 2)

  return params, loss


@pytest.mark.parametrize('name', ['wsam', 'decoupled_wsam', 'looksam'])
def test_differences_of_half_precision_gradients_are_taken_in_float32(name):
  """Against the same method on the same numbers in float32."""
  params, loss = bfloat16_problem()
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  tx = {
    'wsam': lambda: sam_jax.wsam(0.01, 0.9),
    'decoupled_wsam': lambda: sam_jax.decoupled_wsam(optax.sgd(1.0), 1.0, 0.01, 0.9),
    'looksam': lambda: sam_jax.looksam(0.05, every=2, alpha=1.0),
  }[name]()

  def sharpness_part(params):
    """What the method adds to the clean gradient."""
    state, grads = tx.init(params), jax.grad(loss)(params)
    for _ in range(1 + (name == 'looksam')):
      updates, state = tx.update(grads, state, params, grad_fn=jax.grad(loss))
    sign = -1 if name == 'decoupled_wsam' else 1
    flat = lambda tree: jnp.concatenate(
      [x.ravel().astype(jnp.float32) for x in jax.tree.leaves(tree)]
    )
    return flat(updates) - sign * flat(grads)

  expected = sharpness_part(wide)
  error = jnp.linalg.norm(sharpness_part(params) - expected)
  assert error < 0.05 * jnp.linalg.norm(expected)


def test_widened_gradients_of_half_precision_parameters_are_not_subtracted():
  """A gradient at bfloat16 weights is rounded, whatever it is cast to afterwards."""
  keys = jax.random.split(jax.random.key(0))
  inputs = jax.random.normal(keys[0], (64, 200))
  half = (0.1 * jax.random.normal(keys[1], (200,))).astype(jnp.bfloat16)
  loss = lambda w: jnp.mean(jnp.tanh(inputs @ w.astype(jnp.float32)) ** 2)

  def update(params, grads):
    tx = sam_jax.wsam(1e-3, 0.99)
    return tx.update(grads, tx.init(params), params, grad_fn=jax.grad(loss))[0]

  wide = half.astype(jnp.float32)
  expected = update(wide, jax.grad(loss)(wide))
  found = update(half, jax.grad(loss)(half).astype(jnp.float32))
  error = jnp.linalg.norm(found.astype(jnp.float32) - expected)
  assert error < 0.01 * jnp.linalg.norm(expected)
