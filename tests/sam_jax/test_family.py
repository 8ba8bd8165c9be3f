"""Every method against straight-line NumPy float64, written from its equations.

The problem is mean squared error of ``tanh(x A) b`` with gradients by hand. Where a
method draws random numbers, the reference is handed the same draws.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


CASES = {
  'gsam': (reference_gsam, lambda: with_sgd(sam_jax.gsam(RHO, 0.4))),
  'wsam': (reference_wsam, lambda: with_sgd(sam_jax.wsam(RHO, 0.9))),
  'decoupled_wsam': (
    reference_decoupled_wsam,
    lambda: sam_jax.decoupled_wsam(
      optax.sgd(RATE, momentum=0.9), lambda count: RATE / (1 + count), RHO, 0.6
    ),
  ),
  'looksam': (reference_looksam, lambda: with_sgd(sam_jax.looksam(RHO, 3, 0.7))),
  'friendly_sam': (
    reference_friendly_sam,
    lambda: with_sgd(sam_jax.friendly_sam(RHO, 0.8, 0.6)),
  ),
  'msam': (
    reference_msam,
    lambda: sam_jax.msam(optax.sgd(RATE, momentum=0.9), RHO),
  ),
  'msam_adam': (
    reference_msam_adam,
    lambda: sam_jax.msam(optax.adam(RATE), RHO, momentum='mu'),
  ),
  'graphsam': (
    reference_graphsam,
    lambda: with_sgd(sam_jax.graphsam(RHO, 0.7, 0.5, 2, steps_per_epoch=4)),
  ),
  'num_ascent_steps': (
    reference_ascent_steps,
    lambda: with_sgd(sam_jax.sam(RHO, num_ascent_steps=3)),
  ),
  'periodic': (
    reference_periodic,
    lambda: with_sgd(sam_jax.periodic(sam_jax.sam(RHO), every=3, start=4, stop=20)),
  ),
  'trace_sam': (
    lambda: reference_universal(
      lambda x: x, lambda x: 1.0, lambda s: 1.0, 0.1, 0.7, 2, False
    ),
    lambda: with_sgd(sam_jax.trace_sam(0.1, 0.7, num_probes=2, key=KEY)),
  ),
  'trace_sam_antithetic': (
    lambda: reference_universal(
      lambda x: x, lambda x: 1.0, lambda s: 1.0, 0.1, 0.7, 1, True
    ),
    lambda: with_sgd(sam_jax.trace_sam(0.1, 0.7, antithetic=True, key=KEY)),
  ),
  'frob_sam': (
    lambda: reference_frob(0.1, 0.005, 2, False),
    lambda: with_sgd(sam_jax.frob_sam(0.1, 0.005, key=KEY)),
  ),
  'frob_sam_antithetic': (
    lambda: reference_frob(0.1, 0.05, 3, True),
    lambda: with_sgd(
      sam_jax.frob_sam(0.1, 0.05, num_probes=3, antithetic=True, key=KEY)
    ),
  ),
  'det_sam': (
    lambda: reference_universal(
      lambda x: np.exp(-x / 2),
      lambda x: -np.exp(-x / 2) / 2,
      lambda s: -2 / s**3,
      1.0,
      0.5,
      2,
      False,
      sam_jax.probes.uniform_cube(0.1),
    ),
    lambda: with_sgd(sam_jax.det_sam(1.0, 0.5, half_width=0.1, num_probes=2, key=KEY)),
  ),
}


@pytest.mark.parametrize('name', sorted(CASES))
def test_agrees_with_straight_line_numpy(name, x64):
  reference, make = CASES[name]
  assert_same(ours(make()), reference())


def test_esam_agrees_with_straight_line_numpy(x64):
  tx = with_sgd(sam_jax.esam(RHO, 0.6, 0.5, key=KEY))
  extra = {
    'value_and_grad_fn': jax.value_and_grad(jax_loss),
    'example_losses_fn': jax_losses,
  }
  assert_same(ours(tx, **extra), reference_esam())


def test_esam_takes_the_losses_of_the_clean_pass(x64):
  """Handed over they save a forward pass and change nothing."""
  params = jax.tree.map(jnp.asarray, START)
  calls = []

  def losses_fn(p):
    calls.append(p)
    return jax_losses(p)

  tx = sam_jax.esam(RHO, 0.6, 0.5, key=KEY)
  given = [
    tx.update(
      jax.grad(jax_loss)(params),
      tx.init(params),
      params,
      grad_fn=jax.grad(jax_loss),
      example_losses_fn=losses_fn,
      **extra,
    )[0]
    for extra in ({}, {'example_losses': jax_losses(params)})
  ]
  assert len(calls) == 3
  jax.tree.map(np.testing.assert_array_equal, *given)


def test_esam_leaves_padding_to_the_last(x64):
  """With weights, padded examples change nothing while enough real ones remain."""
  params = jax.tree.map(jnp.asarray, START)
  chosen = []

  def grad_fn(p, indices):
    chosen.append(np.asarray(indices))
    return jax.grad(jax_loss)(p, indices)

  weights = jnp.asarray([1.0] * 6 + [0.0] * 6)
  tx = sam_jax.esam(RHO, gamma=0.5)
  tx.update(
    jax.grad(jax_loss)(params),
    tx.init(params),
    params,
    grad_fn=grad_fn,
    example_losses_fn=jax_losses,
    example_weights=weights,
  )
  assert sorted(chosen[0].tolist()) == list(range(6))


# Identities between methods.


IDENTITIES = {
  'gsam with alpha 0': lambda: with_sgd(sam_jax.gsam(RHO, 0.0)),
  'looksam every update': lambda: with_sgd(sam_jax.looksam(RHO, 1)),
  'coupled wsam with gamma 1/2': lambda: with_sgd(sam_jax.wsam(RHO, 0.5)),
  'decoupled wsam with gamma 1/2 over SGD': lambda: sam_jax.decoupled_wsam(
    optax.sgd(RATE), RATE, RHO, 0.5
  ),
  'friendly sam with sigma 0': lambda: with_sgd(sam_jax.friendly_sam(RHO, 0.0)),
  'graphsam anchored every update': lambda: with_sgd(
    sam_jax.graphsam(RHO, gamma=1.0, steps_per_epoch=1)
  ),
  'periodic every update': lambda: with_sgd(sam_jax.periodic(sam_jax.sam(RHO))),
  'esam with everything kept': lambda: with_sgd(sam_jax.esam(RHO, 1.0, 1.0)),
  'm_sharpness of one group': lambda: with_sgd(
    sam_jax.m_sharpness(sam_jax.sam(RHO), 1)
  ),
}


@pytest.mark.parametrize('name', sorted(IDENTITIES))
def test_is_sam(name, x64):
  extra = {
    'value_and_grad_fn': lambda p, *_: jax.value_and_grad(jax_loss)(p),
    'example_losses_fn': jax_losses,
  }
  expected = sgd(lambda t, w: sam_gradient(w)[1])
  assert_same(ours(IDENTITIES[name](), **extra), expected)


def test_msam_without_radius_is_momentum_sgd(x64):
  tx = sam_jax.msam(optax.sgd(RATE, momentum=0.9), 0.0)
  assert_same(ours(tx), ours(optax.sgd(RATE, momentum=0.9)), atol=0)


@given(rho=st.floats(1e-3, 10.0), seed=st.integers(0, 100))
def test_the_perturbation_has_length_rho(rho, seed):
  """|eps| = rho for SAM, Friendly SAM, MSAM and GraphSAM."""
  rng = np.random.default_rng(seed)
  params = {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(4)}
  like = lambda: {
    'a': jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
    'b': jnp.asarray(rng.normal(size=4), jnp.float32),
  }
  for tx in (sam_jax.sam(rho), sam_jax.friendly_sam(rho)):
    seen, state = [], tx.init(params)
    for _ in range(2):
      g = like()
      spy = lambda p, seen=seen: seen.append(p) or p
      _, state = tx.update(g, state, params, grad_fn=spy)
    for point in seen:
      np.testing.assert_allclose(optax.tree.norm(point), rho, rtol=1e-5)
  for tx in (
    sam_jax.msam(optax.sgd(0.0, momentum=0.9), rho),
    sam_jax.graphsam(rho, gamma=1.0, steps_per_epoch=3),
  ):
    state = tx.init(params)
    _, state = tx.update(like(), state, params, grad_fn=lambda p: like())
    point = sam_jax.gradient_point(state, params)
    np.testing.assert_allclose(optax.tree.norm(point), rho, rtol=1e-5)


def test_looksam_keeps_no_rounding_noise():
  """On a quadratic along an eigenvector g_v is zero, and stays so at a tiny rho."""
  value = lambda w: jnp.sum(w**2)
  tx = sam_jax.looksam(1e-4, every=2)
  w = jax.random.normal(jax.random.key(0), (50,))
  updates, state = tx.update(
    jax.grad(value)(w), tx.init(w), w, grad_fn=jax.grad(value), phase=True
  )
  assert not np.any(state.direction)
  updates, _ = tx.update(
    jax.grad(value)(w), state, w, grad_fn=jax.grad(value), phase=False
  )
  np.testing.assert_array_equal(updates, jax.grad(value)(w))


@pytest.mark.parametrize(
  'tx',
  [
    sam_jax.looksam(0.05, every=3),
    sam_jax.graphsam(0.05, steps_per_epoch=3),
    sam_jax.periodic(sam_jax.sam(0.05), every=3),
  ],
  ids=['looksam', 'graphsam', 'periodic'],
)
def test_a_static_phase_equals_the_cond(tx, x64):
  params = jax.tree.map(jnp.asarray, START)
  by_cond, by_phase = tx.init(params), tx.init(params)
  for t in range(5):
    g = jax.grad(jax_loss)(sam_jax.gradient_point(by_cond, params))
    given = {'value_and_grad_fn': jax.value_and_grad(jax_loss)}
    first, by_cond = tx.update(g, by_cond, params, **given)
    second, by_phase = tx.update(g, by_phase, params, **given, phase=t % 3 == 0)
    assert_same(first, second, atol=1e-12)
  assert jax.tree.structure(by_cond) == jax.tree.structure(by_phase)


# Universal SAM on quadratics, where the measures are known.


def quadratic(seed=0, n=3):
  rng = np.random.default_rng(seed)
  h = rng.normal(size=(n, n))
  return h @ h.T + np.eye(n)


def universal_shift(tx_options, loss_fn, w, keys, method):
  """The mean over keys of what a universal method adds to the clean gradient."""

  def one(key):
    tx = method(key=key, **tx_options)
    g = jax.grad(loss_fn)(w)
    updates, _ = tx.update(
      g, tx.init(w), w, value_and_grad_fn=jax.value_and_grad(loss_fn)
    )
    return updates - g

  shifts = jax.jit(jax.vmap(one))(keys)
  return shifts.mean(0), shifts.std(0) / np.sqrt(len(keys))


def test_trace_and_frobenius_of_a_varying_hessian(x64):
  """L = sum exp(w_i): tr H = sum e^w_i and |H|_F^2 = sum e^2w_i, gradients known.

  Antithetic probes at a small radius: E d - g is lam rho^2 grad tr(H)/2, and
  lam rho^2 / 2 grad |H|_F^2 / 2.
  """
  value = lambda w: jnp.sum(jnp.exp(w))
  w = jnp.asarray([0.3, -0.2, 0.5])
  keys = jax.random.split(jax.random.key(0), 4000)
  rho = 1e-2
  options = {'rho': rho, 'lam': 1.0, 'antithetic': True}
  mean, error = universal_shift(options, value, w, keys, sam_jax.trace_sam)
  assert np.all(np.abs(mean - rho**2 * jnp.exp(w) / 2) < 4 * error)
  assert np.all(error < 0.1 * rho**2 * jnp.exp(w) / 2)
  mean, error = universal_shift(options, value, w, keys, sam_jax.frob_sam)
  expected = rho**2 / 2 * jnp.exp(2 * w)
  assert np.all(np.abs(mean - expected) < 4 * error)
  assert np.all(error < 0.2 * expected)


def test_a_quadratic_has_no_gradient_of_sharpness(x64):
  h = jnp.asarray(quadratic())
  value = lambda w: 0.5 * w @ h @ w
  w = jnp.asarray([1.0, -2.0, 0.5])
  keys = jax.random.split(jax.random.key(0), 4)
  for method in (sam_jax.trace_sam, sam_jax.frob_sam):
    mean, _ = universal_shift({'antithetic': True}, value, w, keys, method)
    np.testing.assert_allclose(mean, 0, atol=1e-10)


@pytest.mark.parametrize('n', [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_det_by_quadrature(n, x64):
  """Handed a grid of probes, phi(E psi) is a Gaussian integral with a closed form.

  On L = w^T H w / 2 and a wide cube, E exp(-x/2) is (4 pi)^(n/2) det(H)^(-1/2)
  exp(w^T H w / 4) / (2h)^n, so phi = s^-2 has the gradient -phi H w.
  """
  half, points = 6.0, 8
  h = np.eye(n) + 0.2 * np.ones((n, n))
  nodes = half * (2 * np.arange(points) + 1 - points) / points  # the midpoint rule
  grid = np.stack(np.meshgrid(*[nodes] * n, indexing='ij'), -1).reshape(-1, n)
  rows = iter(jnp.asarray(grid))
  tx = sam_jax.universal_sam(
    lambda x: jnp.exp(-x / 2),
    lambda s: s**-2,
    rho=1.0,
    lam=0.01,
    sampler=lambda key, params: next(rows),
    num_probes=len(grid),
  )
  w = jnp.asarray([0.5, -0.3, 0.2])[:n]
  value = lambda w: 0.5 * w @ jnp.asarray(h) @ w
  g = jax.grad(value)(w)
  updates, _ = tx.update(
    g, tx.init(w), w, value_and_grad_fn=jax.jit(jax.value_and_grad(value))
  )
  phi = (2 * half) ** (2 * n) * np.linalg.det(h) / (4 * np.pi) ** n
  phi *= np.exp(-w @ g / 2)
  np.testing.assert_allclose(updates, g - 0.01 * phi * g, rtol=1e-3)


def test_det_linearises_to_the_trace_in_a_small_cube(x64):
  """phi'(1) psi'(0) = 1: a small cube adds what the trace adds, probe by probe."""
  value = lambda w: jnp.sum(jnp.exp(w))
  w = jnp.asarray([0.3, -0.2, 0.5])
  keys = jax.random.split(jax.random.key(0), 3)
  cube = sam_jax.probes.uniform_cube(1e-3)
  det, _ = universal_shift(
    {'rho': 1.0, 'half_width': 1e-3}, value, w, keys, sam_jax.det_sam
  )
  trace, _ = universal_shift(
    {'rho': 1.0, 'sampler': cube}, value, w, keys, sam_jax.trace_sam
  )
  np.testing.assert_allclose(det, trace, rtol=1e-2)


# Arguments.


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: sam_jax.wsam(gamma=1.0), 'gamma must be in'),
    (lambda: sam_jax.looksam(every=0), 'every must be at least 1'),
    (lambda: sam_jax.friendly_sam(decay=1.5), 'decay must be in'),
    (lambda: sam_jax.esam(beta=0.0), 'beta must be in'),
    (lambda: sam_jax.esam(beta=np.float32(0)), 'beta must be in'),
    (lambda: sam_jax.esam(gamma=2.0), 'gamma must be in'),
    (lambda: sam_jax.wsam(gamma=np.float32(1)), 'gamma must be in'),
    (lambda: sam_jax.friendly_sam(decay=np.float32(2)), 'decay must be in'),
    (lambda: sam_jax.det_sam(half_width=np.float32(0)), 'half_width must be positive'),
    (lambda: sam_jax.perturbations.adaptive(np.float32(-1)), 'eta must be at least 0'),
    (lambda: sam_jax.graphsam(steps_per_epoch=0), 'steps_per_epoch'),
    (lambda: sam_jax.frob_sam(num_probes=1), 'num_probes must be at least 2'),
    (lambda: sam_jax.trace_sam(num_probes=0), 'num_probes must be at least 1'),
    (lambda: sam_jax.det_sam(half_width=0.0), 'half_width must be positive'),
    (lambda: sam_jax.periodic(sam_jax.sam(), every=0), 'every >= 1'),
    (lambda: sam_jax.m_sharpness(sam_jax.sam(), 0), 'num_groups'),
    (lambda: sam_jax.sam(num_ascent_steps=0), 'num_ascent_steps'),
    (lambda: sam_jax.msam(optax.sgd(0.1)).init(jnp.ones(2)), "named 'trace'"),
    (
      lambda: sam_jax.gsam_rho(
        lambda c: 0.1,
        learning_rate_min=0.2,
        learning_rate_max=0.1,
        rho_min=0.0,
        rho_max=0.1,
      ),
      'learning_rate_max',
    ),
  ],
)
def test_bad_arguments_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  'method',
  [
    sam_jax.sam,
    sam_jax.asam,
    sam_jax.usam,
    sam_jax.gsam,
    sam_jax.wsam,
    sam_jax.looksam,
    sam_jax.friendly_sam,
    sam_jax.graphsam,
    sam_jax.trace_sam,
    sam_jax.frob_sam,
    sam_jax.det_sam,
  ],
  ids=lambda method: method.__name__,
)
def test_every_number_may_be_injected(method, x64):
  """inject_hyperparams turns defaults into arrays too; sizes stay as they are."""
  given = {'steps_per_epoch': 3} if method is sam_jax.graphsam else {}
  injected = optax.inject_hyperparams(method)(rho=0.2, **given)
  direct = method(rho=0.2, **given)
  params = jax.tree.map(jnp.asarray, START)
  results = []
  for tx in (injected, direct):

    @jax.jit
    def update(params, tx=tx):
      return tx.update(
        jax.grad(jax_loss)(params),
        tx.init(params),
        params,
        value_and_grad_fn=jax.value_and_grad(jax_loss),
      )[0]

    results.append(update(params))
  assert_same(*results)


def test_sizes_are_not_injected_silently():
  tx = optax.inject_hyperparams(sam_jax.sam)(rho=0.1, num_ascent_steps=2)
  with pytest.raises(TypeError, match='static_args'):
    tx.init(jnp.ones(2))
  optax.inject_hyperparams(sam_jax.sam, static_args='num_ascent_steps')(
    rho=0.1, num_ascent_steps=2
  ).init(jnp.ones(2))


def test_gsam_rho_follows_the_learning_rate():
  schedule = optax.cosine_decay_schedule(0.1, 100)
  rho = sam_jax.gsam_rho(
    schedule,
    learning_rate_min=0.0,
    learning_rate_max=0.1,
    rho_min=0.02,
    rho_max=0.06,
  )
  for t in (0, 30, 100):
    np.testing.assert_allclose(rho(t), 0.02 + 0.04 * schedule(t) / 0.1, rtol=1e-6)
  constant = sam_jax.gsam_rho(
    optax.constant_schedule(0.1),
    learning_rate_min=0.1,
    learning_rate_max=0.1,
    rho_min=0.02,
    rho_max=0.06,
  )
  np.testing.assert_allclose(constant(5), 0.06, rtol=1e-6)
