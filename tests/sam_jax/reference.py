"""Straight-line NumPy float64 of every method, written from its equations.

The problem is mean squared error of ``tanh(x A) b`` with gradients by hand. Where a
method draws random numbers, the reference is handed the same draws.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sam_jax

STEPS, RATE, RHO = 25, 0.1, 0.1
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3))
Y = np.sin(X.sum(-1, keepdims=True))
START = {'a': RNG.normal(size=(3, 4)), 'b': RNG.normal(size=(4, 1))}


# The reference: dictionaries of float64 arrays, one small function per equation.


def losses(w, rows=slice(None)):
  return ((np.tanh(X[rows] @ w['a']) @ w['b'] - Y[rows]) ** 2)[:, 0]


def loss(w, rows=slice(None)):
  return losses(w, rows).mean()


def grad(w, rows=slice(None)):
  x, y = X[rows], Y[rows]
  h = np.tanh(x @ w['a'])
  r = 2 / len(x) * (h @ w['b'] - y)
  return {'a': x.T @ (r @ w['b'].T * (1 - h**2)), 'b': h.T @ r}


def add(u, v, scale=1.0):
  return {k: u[k] + scale * v[k] for k in u}


def times(scale, u):
  return {k: scale * u[k] for k in u}


def dot(u, v):
  return sum((u[k] * v[k]).sum() for k in u)


def norm(u):
  return np.sqrt(dot(u, u))


def sam_gradient(w, rho=RHO):
  g = grad(w)
  return g, grad(add(w, g, rho / norm(g)))


def sgd(direction):
  """Runs plain SGD with ``direction(t, w) -> d``."""
  w = START
  for t in range(STEPS):
    w = add(w, direction(t, w), -RATE)
  return w


def reference_gsam(alpha=0.4):
  def direction(t, w):
    g, g_p = sam_gradient(w)
    u = times(1 / norm(g_p), g_p)
    return add(g_p, add(g, u, -dot(g, u)), -alpha)

  return sgd(direction)


def reference_wsam(gamma=0.9):
  def direction(t, w):
    g, g_p = sam_gradient(w)
    return add(g, add(g_p, g, -1), gamma / (1 - gamma))

  return sgd(direction)


def reference_decoupled_wsam(gamma=0.6, momentum=0.9):
  w, v = START, times(0, START)
  for t in range(STEPS):
    g, g_p = sam_gradient(w)
    v = add(times(momentum, v), g)
    rate = RATE / (1 + t)
    w = add(w, v, -RATE)
    w = add(w, add(g_p, g, -1), -rate * gamma / (1 - gamma))
  return w


def reference_looksam(every=3, alpha=0.7):
  kept = {}

  def direction(t, w):
    if t % every == 0:
      g, g_p = sam_gradient(w)
      u = times(1 / norm(g), g)
      kept['g_v'] = add(g_p, u, -dot(g_p, u))
      return g_p
    g = grad(w)
    return add(g, kept['g_v'], alpha * norm(g) / norm(kept['g_v']))

  return sgd(direction)


def reference_friendly_sam(sigma=0.8, decay=0.6):
  w, m = START, None
  for _ in range(STEPS):
    g = grad(w)
    d = g if m is None else add(g, m, -sigma)
    m = g if m is None else add(times(decay, m), g, 1 - decay)
    w = add(w, grad(add(w, d, RHO / norm(d))), -RATE)
  return w


def reference_msam(momentum=0.9):
  w, v = START, times(0, START)
  for t in range(STEPS):
    at = w if t == 0 else add(w, v, -RHO / norm(v))
    v = add(times(momentum, v), grad(at))
    w = add(w, v, -RATE)
  return w


def reference_msam_adam(b1=0.9, b2=0.999, eps=1e-8):
  w, m, s = START, times(0, START), times(0, START)
  for t in range(STEPS):
    at = w if t == 0 else add(w, m, -RHO / norm(m))
    g = grad(at)
    m = add(times(b1, m), g, 1 - b1)
    s = {k: b2 * s[k] + (1 - b2) * g[k] ** 2 for k in s}
    m_hat, s_hat = times(1 / (1 - b1 ** (t + 1)), m), times(1 / (1 - b2 ** (t + 1)), s)
    w = {k: w[k] - RATE * m_hat[k] / (np.sqrt(s_hat[k]) + eps) for k in w}
  return w


def reference_graphsam(steps_per_epoch=4, beta=0.7, gamma=0.5, lam=2):
  m, previous = None, None

  def direction(t, w):
    nonlocal m, previous
    rho = RHO * gamma ** ((t // steps_per_epoch) // lam)
    if t % steps_per_epoch == 0:
      g = grad(w)
      m = times(1 / norm(g), g)
    else:
      m = add(times(beta, m), previous, (1 - beta) / norm(previous))
    previous = grad(add(w, m, rho / norm(m)))
    return previous

  return sgd(direction)


def reference_ascent_steps(k=3):
  def direction(t, w):
    at = w
    for _ in range(k):
      g = grad(at)
      at = add(at, g, RHO / k / norm(g))
    return grad(at)

  return sgd(direction)


def reference_periodic(every=3, start=4, stop=20):
  def direction(t, w):
    active = start <= t < stop and (t - start) % every == 0
    return sam_gradient(w)[1] if active else grad(w)

  return sgd(direction)


KEY = 7


def draws(sample, count):
  """What a sampled method draws: one list of ``count`` trees an update."""
  with jax.enable_x64(True):
    key, all_draws = jax.random.key(KEY), []
    for _ in range(STEPS):
      key, *used = jax.random.split(key, count + 1)
      trees = [sample(k, jax.tree.map(jnp.asarray, START)) for k in used]
      all_draws.append([jax.tree.map(np.asarray, tree) for tree in trees])
  return all_draws


def reference_esam(beta=0.6, gamma=0.5):
  def bernoulli(key, tree):
    sample = lambda k, shape, dtype: jax.random.bernoulli(k, beta, shape).astype(dtype)
    return optax.tree.random_like(key, tree, sample)

  masks = draws(bernoulli, 1)

  def direction(t, w):
    g = grad(w)
    ((mask,),) = (masks[t],)
    at = {k: w[k] + RHO / beta * mask[k] * g[k] / norm(g) for k in w}
    rise = losses(at) - losses(w)
    kept = np.argsort(-rise, kind='stable')[: int(gamma * len(rise))]
    return grad(at, kept)

  return sgd(direction)


def reference_universal(psi, d_psi, d_phi, rho, lam, n, antithetic, sample=None):
  probes = draws(sample or sam_jax.probes.gaussian, n)

  def direction(t, w):
    x, slopes = [], []
    for u in probes[t]:
      signs = (1, -1) if antithetic else (1,)
      x.append(np.mean([loss(add(w, u, s * rho)) - loss(w) for s in signs]) / rho**2)
      gradients = [add(grad(add(w, u, s * rho)), grad(w), -1) for s in signs]
      slopes.append({k: np.mean([g[k] for g in gradients], axis=0) for k in w})
    mean_psi = np.mean([psi(xi) for xi in x], axis=0)
    result = grad(w)
    for xi, slope in zip(x, slopes, strict=True):
      # lam rho^2 d phi/dx_i dx_i/dw, with dx_i/dw = slope / rho^2.
      weight = np.dot(np.atleast_1d(d_phi(mean_psi)), np.atleast_1d(d_psi(xi))) / n
      result = add(result, slope, lam * weight)
    return result

  return sgd(direction)


def reference_frob(rho, lam, n, antithetic):
  """g + (lam / rho^2) Cov_{n-1}(L_i, grad L_i), as the covariance itself."""
  probes = draws(sam_jax.probes.gaussian, n)

  def direction(t, w):
    signs = (1, -1) if antithetic else (1,)
    values, gradients = [], []
    for u in probes[t]:
      points = [add(w, u, s * rho) for s in signs]
      values.append(np.mean([loss(p) for p in points]))
      gradients.append({k: np.mean([grad(p)[k] for p in points], axis=0) for k in w})
    mean_gradient = {k: np.mean([g[k] for g in gradients], axis=0) for k in w}
    result = grad(w)
    for value, g in zip(values, gradients, strict=True):
      factor = lam / rho**2 * (value - np.mean(values)) / (n - 1)
      result = add(result, add(g, mean_gradient, -1), factor)
    return result

  return sgd(direction)


# Ours, in float64, one compiled step a method.


def jax_losses(p, rows=None):
  x, y = jnp.asarray(X), jnp.asarray(Y)
  if rows is not None:
    x, y = x[rows], y[rows]
  return ((jnp.tanh(x @ p['a']) @ p['b'] - y) ** 2)[:, 0]


def jax_loss(p, rows=None):
  return jax_losses(p, rows).mean()


def ours(tx, steps=STEPS, **extra):
  @jax.jit
  def step(params, state):
    point = sam_jax.gradient_point(state, params)
    given = {'value_and_grad_fn': jax.value_and_grad(jax_loss)} | extra
    updates, state = tx.update(jax.grad(jax_loss)(point), state, params, **given)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.asarray, START)
  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params


def with_sgd(method):
  return optax.chain(method, optax.sgd(RATE))


def assert_same(actual, expected, atol=1e-10):
  for name in expected:
    np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=atol)
