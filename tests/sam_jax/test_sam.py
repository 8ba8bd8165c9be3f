"""SAM against independent implementations: optax's, by hand, and NumPy's float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import sam_jax

RHO, LEARNING_RATE = 0.05, 0.1


class BatchNormNet(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(8)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return nn.Dense(3)(nn.relu(x))


@functools.cache
def problem():
  """Parameters, statistics, 20 batches, and the loss with new statistics as aux."""
  model = BatchNormNet()
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (20, 16, 4))
  y = (x.sum(-1) > 0).astype(jnp.int32) + (x[..., 0] > 1).astype(jnp.int32)
  variables = model.init(keys[1], x[0], train=False)

  def loss_fn(params, stats, batch):
    logits, new = model.apply(
      {'params': params, 'batch_stats': stats},
      batch[0],
      train=True,
      mutable=['batch_stats'],
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    return loss, new['batch_stats']

  return variables['params'], variables['batch_stats'], (x, y), loss_fn


def run(step, carry):
  batches = problem()[2]
  carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, batches))(carry)
  return carry


@functools.cache
def ours():
  params, stats, _, loss_fn = problem()
  tx = optax.chain(sam_jax.sam(RHO), optax.sgd(LEARNING_RATE, momentum=0.9))

  def step(carry, batch):
    params, stats, state = carry
    grad_fn = lambda p: jax.grad(loss_fn, has_aux=True)(p, stats, batch)
    grads, new_stats = grad_fn(params)
    updates, state = tx.update(grads, state, params, grad_fn=lambda p: grad_fn(p)[0])
    return (optax.apply_updates(params, updates), new_stats, state), None

  return run(step, (params, stats, tx.init(params)))


def assert_close(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


def test_agrees_with_optax_contrib_over_20_steps_of_a_batch_norm_network():
  params, stats, _, loss_fn = problem()
  tx = optax.contrib.sam(
    optax.sgd(LEARNING_RATE, momentum=0.9),
    optax.chain(optax.contrib.normalize(), optax.sgd(RHO)),
    sync_period=2,
    opaque_mode=True,
  )

  def step(carry, batch):
    params, stats, state = carry
    grad_fn = lambda p: jax.grad(loss_fn, has_aux=True)(p, stats, batch)
    grads, new_stats = grad_fn(params)
    updates, state = tx.update(grads, state, params, grad_fn=lambda p, _: grad_fn(p)[0])
    return (optax.apply_updates(params, updates), new_stats, state), None

  theirs = run(step, (params, stats, tx.init(params)))
  assert_close(ours()[:2], theirs[:2])
  moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), ours()[0], params)
  assert max(jax.tree.leaves(moved)) > 0.1  # twenty steps that went somewhere


def test_agrees_with_a_step_written_by_hand():
  params, stats, _, loss_fn = problem()

  def step(carry, batch):
    params, stats, velocity = carry
    grad = jax.grad(loss_fn, has_aux=True)
    g, new_stats = grad(params, stats, batch)
    length = jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(g)))
    ascended = jax.tree.map(lambda w, x: w + RHO * x / length, params, g)
    g_p, _ = grad(ascended, stats, batch)
    velocity = jax.tree.map(lambda v, x: 0.9 * v + x, velocity, g_p)
    params = jax.tree.map(lambda w, v: w - LEARNING_RATE * v, params, velocity)
    return (params, new_stats, velocity), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  by_hand = run(step, (params, stats, zeros))
  assert_close(ours()[:2], by_hand[:2])


X = np.random.default_rng(0).normal(size=(12, 3))
Y = np.sin(X.sum(-1, keepdims=True))


def numpy_loss_grad(w, x=X, y=Y):
  """Mean squared error of tanh(x A) b and its gradient, by hand, in float64."""
  h = np.tanh(x @ w['a'])
  r = h @ w['b'] - y
  scale = 2 / len(x)
  dh = scale * r @ w['b'].T * (1 - h**2)
  return (r**2).mean(), {'a': x.T @ dh, 'b': scale * h.T @ r}


def numpy_norm(tree):
  return np.sqrt(sum((v**2).sum() for v in tree.values()))


def numpy_eps(kind, w, g, rho):
  if kind == 'sam':
    return {k: rho * g[k] / numpy_norm(g) for k in g}
  if kind == 'usam':
    return {k: rho * g[k] for k in g}
  eta = 0.01 if kind == 'asam' else 0.0
  t = {k: np.abs(w[k]) + eta for k in w}  # every leaf here is a weight
  tg = numpy_norm({k: t[k] * g[k] for k in g})
  return {k: rho * t[k] ** 2 * g[k] / tg for k in g}


@pytest.mark.parametrize(
  ('kind', 'make'),
  [
    ('sam', sam_jax.sam),
    ('usam', sam_jax.usam),
    ('asam', sam_jax.asam),
    ('asam_all', lambda rho: sam_jax.asam(rho, 0.0, weights=True)),
    ('m_sharpness', lambda rho: sam_jax.m_sharpness(sam_jax.sam(rho), 3)),
  ],
)
def test_agrees_with_straight_line_numpy_over_25_steps(kind, make):
  rho, rate = 0.1, 0.2
  rng = np.random.default_rng(1)
  initial = {'a': rng.normal(size=(3, 4)), 'b': rng.normal(size=(4, 1))}

  w = dict(initial)
  for _ in range(25):
    groups = np.split(np.arange(12), 3) if kind == 'm_sharpness' else [np.arange(12)]
    updates = []
    for rows in groups:
      _, g = numpy_loss_grad(w, X[rows], Y[rows])
      eps = numpy_eps(kind.replace('m_sharpness', 'sam'), w, g, rho)
      _, g_p = numpy_loss_grad({k: w[k] + eps[k] for k in w}, X[rows], Y[rows])
      updates.append(g_p)
    w = {k: w[k] - rate * np.mean([u[k] for u in updates], axis=0) for k in w}

  with jax.enable_x64(True):
    x, y = jnp.asarray(X).reshape(3, 4, 3), jnp.asarray(Y).reshape(3, 4, 1)

    def loss_fn(p, x, y):
      return jnp.mean((jnp.tanh(x @ p['a']) @ p['b'] - y) ** 2)

    if kind == 'm_sharpness':
      grad_fn = lambda p, group: jax.grad(loss_fn)(p, x[group], y[group])
    else:
      grad_fn = lambda p: jax.grad(loss_fn)(p, x.reshape(12, 3), y.reshape(12, 1))
    tx = optax.chain(make(rho), optax.sgd(rate))

    @jax.jit
    def step(params, state):
      clean = params if kind == 'm_sharpness' else grad_fn(params)
      updates, state = tx.update(clean, state, params, grad_fn=grad_fn)
      return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, initial)
    state = tx.init(params)
    for _ in range(25):
      params, state = step(params, state)
    for name in w:
      np.testing.assert_allclose(params[name], w[name], rtol=0, atol=1e-10)


def test_escapes_the_sharp_minimum():
  """The 2-D loss with a sharp minimum at (0, 0) and a flat one at (2, 0)."""

  def loss(w):
    x, y = w
    return -jnp.exp(-((x - 2) ** 2) - y**2) - jnp.exp(-(x**2 + 100 * y**2))

  def end(rho):
    tx = optax.chain(sam_jax.sam(rho), optax.sgd(0.01))

    def step(carry, _):
      w, state = carry
      updates, state = tx.update(jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
      return (optax.apply_updates(w, updates), state), None

    start = jnp.array([-0.4, -0.4])
    return jax.lax.scan(step, (start, tx.init(start)), length=8000)[0][0]

  np.testing.assert_allclose(jax.jit(end, static_argnums=0)(0.0), [0.0425, 0], atol=0.1)
  np.testing.assert_allclose(jax.jit(end, static_argnums=0)(0.1), [2.0, 0], atol=0.1)


def test_the_loss_of_the_ascent_point_is_recorded():
  loss = lambda p: jnp.sum(p**2)
  params = jnp.array([3.0, 4.0])
  tx = sam_jax.sam(1.0)
  grads = jax.grad(loss)(params)
  _, state = tx.update(
    grads, tx.init(params), params, value_and_grad_fn=jax.value_and_grad(loss)
  )
  np.testing.assert_allclose(state.perturbed_loss, 36.0, rtol=1e-6)
  np.testing.assert_allclose(state.gradient_norm, 10.0, rtol=1e-6)
