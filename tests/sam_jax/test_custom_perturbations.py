"""A perturbation of one's own in every method that takes one, against NumPy loops.

The problem is mean squared error of ``tanh(x A) b`` in float64 with gradients by hand.
The rule is ASAM's or Look-LayerSAM's, written here once more from its equation, with a
radius that grows from one call to the next, so that the rule has a state.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax
from sam_jax import perturbations

STEPS, RATE, RHO, ETA = 7, 0.1, 0.1, 0.01
RNG = np.random.default_rng(3)
X = RNG.normal(size=(10, 3))
Y = np.sin(X.sum(-1))
START = {'a': RNG.normal(size=(3, 2)), 'b': RNG.normal(size=2)}


def losses(w, rows=slice(None)):
  return (np.tanh(X[rows] @ w['a']) @ w['b'] - Y[rows]) ** 2


def grad(w, rows=slice(None)):
  x = X[rows]
  h = np.tanh(x @ w['a'])
  r = 2 / len(x) * (h @ w['b'] - Y[rows])
  return {'a': x.T @ (np.outer(r, w['b']) * (1 - h**2)), 'b': h.T @ r}


def add(u, v, scale=1.0):
  return {k: u[k] + scale * v[k] for k in u}


def norm(u):
  return np.sqrt(sum((x**2).sum() for x in u.values()))


def asam_step(w, g):
  """The matrix is a weight, the vector is none."""
  t = {'a': np.abs(w['a']) + ETA, 'b': np.ones(2)}
  length = np.sqrt(sum(((t[k] * g[k]) ** 2).sum() for k in g))
  return {k: t[k] ** 2 * g[k] / length for k in g}


def layerwise_step(w, g):
  return {k: np.linalg.norm(w[k]) / np.linalg.norm(g[k]) * g[k] for k in g}


def growth(call):
  return 1 + 0.5 * call


def growing(rule):
  return optax.chain(rule, optax.scale_by_schedule(growth))


def reference_friendly_sam(rule, sigma=0.8, decay=0.6):
  w, m = START, None
  for t in range(STEPS):
    g = grad(w)
    d = g if m is None else add(g, m, -sigma)
    m = g if m is None else {k: decay * m[k] + (1 - decay) * g[k] for k in m}
    w = add(w, grad(add(w, rule(w, d), RHO * growth(t))), -RATE)
  return w


def reference_msam(rule, momentum=0.9):
  w, v = START, {k: 0 * x for k, x in START.items()}
  for t in range(STEPS):
    at = w if t == 0 else add(w, rule(w, v), -RHO * growth(t))
    g = grad(at)
    v = {k: momentum * v[k] + g[k] for k in v}
    w = add(w, v, -RATE)
  return w


def reference_graphsam(rule, steps_per_epoch=3, beta=0.7, gamma=0.5):
  w, m, used = START, None, None
  for t in range(STEPS):
    if t % steps_per_epoch == 0:
      g = grad(w)
      m = {k: g[k] / norm(g) for k in g}
    else:
      m = {k: beta * m[k] + (1 - beta) * used[k] / norm(used) for k in m}
    radius = RHO * gamma ** (t // steps_per_epoch) * growth(t)
    used = grad(add(w, rule(w, m), radius))
    w = add(w, used, -RATE)
  return w


def reference_looksam(rule, every=3, alpha=0.7):
  w, kept, calls = START, None, 0
  for t in range(STEPS):
    g = grad(w)
    if t % every == 0:
      d = grad(add(w, rule(w, g), RHO * growth(calls)))
      calls += 1
      inner = sum((d[k] * g[k]).sum() for k in g)
      kept = add(d, g, -inner / norm(g) ** 2)
    else:
      d = add(g, kept, alpha * norm(g) / norm(kept))
    w = add(w, d, -RATE)
  return w


def reference_esam(rule, beta=0.6, gamma=0.5):
  w, key = START, jax.random.key(5)
  sample = lambda k, shape, dtype: jax.random.bernoulli(k, beta, shape)
  for t in range(STEPS):
    key, drawn = jax.random.split(key)
    mask = optax.tree.random_like(drawn, w, sample)
    eps = rule(w, grad(w))
    at = {k: w[k] + RHO * growth(t) / beta * np.asarray(mask[k]) * eps[k] for k in w}
    kept = np.argsort(losses(w) - losses(at), kind='stable')[: int(gamma * len(X))]
    w = add(w, grad(at, kept), -RATE)
  return w


def jax_losses(p):
  return (jnp.tanh(jnp.asarray(X) @ p['a']) @ p['b'] - jnp.asarray(Y)) ** 2


def jax_loss(p, rows=None):
  return (jax_losses(p) if rows is None else jax_losses(p)[rows]).mean()


def run(tx, steps=STEPS, **extra):
  """The parameters after some steps in one scan, so that states keep their type."""

  def step(carry, _):
    w, state = carry
    point = sam_jax.gradient_point(state, w)
    given = {'grad_fn': jax.grad(jax_loss)} | extra
    updates, state = tx.update(jax.grad(jax_loss)(point), state, w, **given)
    return (optax.apply_updates(w, updates), state), None

  w = jax.tree.map(jnp.asarray, START)
  return jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((w, tx.init(w)))[0]


def with_sgd(method):
  return optax.chain(method, optax.sgd(RATE))


def friendly_sam(**given):
  return with_sgd(sam_jax.friendly_sam(RHO, 0.8, 0.6, **given))


def msam(**given):
  return sam_jax.msam(optax.sgd(RATE, momentum=0.9), RHO, **given)


def graphsam(**given):
  return with_sgd(sam_jax.graphsam(RHO, 0.7, 0.5, steps_per_epoch=3, **given))


def looksam(**given):
  return with_sgd(sam_jax.looksam(RHO, 3, 0.7, **given))


def esam(**given):
  return with_sgd(sam_jax.esam(RHO, 0.6, 0.5, key=jax.random.key(5), **given))


METHODS = {
  'friendly_sam': (friendly_sam, reference_friendly_sam, {}),
  'msam': (msam, reference_msam, {}),
  'graphsam': (graphsam, reference_graphsam, {}),
  'looksam': (looksam, reference_looksam, {}),
  'esam': (esam, reference_esam, {'example_losses_fn': jax_losses}),
}
RULES = {
  'asam': (lambda: perturbations.adaptive(ETA), asam_step),
  'layerwise': (perturbations.layerwise, layerwise_step),
}


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('name', METHODS)
def test_agrees_with_straight_line_numpy(name, rule, x64):
  make, reference, extra = METHODS[name]
  make_rule, numpy_rule = RULES[rule]
  found, _ = run(make(perturbation=growing(make_rule())), **extra)
  expected = reference(numpy_rule)
  for leaf in expected:
    np.testing.assert_allclose(found[leaf], expected[leaf], rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', METHODS)
def test_a_frozen_leaf_is_not_perturbed(name):
  """Every point at which a gradient is taken has that leaf of w."""
  rule = optax.selective_transform(
    perturbations.global_norm(), freeze_mask={'a': False, 'b': True}
  )
  make, _, extra = METHODS[name]
  tx, w = make(perturbation=rule), jax.tree.map(jnp.asarray, START)
  state, grads, points = tx.init(w), jax.grad(jax_loss)(w), []
  for phase in (True, False):
    points.append(sam_jax.gradient_point(state, w))
    given = {'grad_fn': lambda at, *_: points.append(at) or grads} | extra
    given |= {'phase': phase} if name in ('looksam', 'graphsam') else {}
    _, state = tx.update(grads, state, w, **given)
  moved = [not np.array_equal(at['a'], w['a']) for at in points]
  assert any(moved)
  for at in points:
    np.testing.assert_array_equal(at['b'], w['b'])


@pytest.mark.parametrize('method', [sam_jax.msam, sam_jax.graphsam])
def test_states_of_one_perturbation_have_one_type(method):
  """Where it is injected a method is made anew at every update."""
  given = {'inner': optax.sgd(RATE, momentum=0.9)}
  if method is sam_jax.graphsam:
    given = {'beta': 0.7, 'gamma': 0.5, 'epochs_per_decay': 1, 'steps_per_epoch': 3}
  tx = optax.inject_hyperparams(method, static_args=tuple(given))(
    rho=RHO, perturbation=perturbations.adaptive(), **given
  )
  tx = tx if method is sam_jax.msam else optax.chain(tx, optax.sgd(RATE))
  w, state = run(tx)
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(w))
  assert np.isfinite(jax_loss(w))


@pytest.mark.parametrize('name', METHODS)
def test_what_is_no_perturbation_is_refused(name):
  with pytest.raises(TypeError, match='perturbation must be an optax transformation'):
    METHODS[name][0](perturbation=[perturbations.global_norm])


@pytest.mark.parametrize('name', METHODS)
def test_a_command_line_gains_no_flag(name):
  found = sam_jax.methods.hyperparameters(getattr(sam_jax, name))
  assert 'perturbation' not in found


@pytest.mark.parametrize('size', [1e-30, 1.0, 1e30])
def test_layerwise_moves_each_leaf_by_its_own_norm(size):
  """In float32, of entries whose squares it cannot hold and of zeros too."""
  params = {'a': [3.0, 4.0], 'b': [[-2.0]], 'zero': [0.0, 0.0], 'flat': [5.0]}
  grads = {'a': [6.0, -8.0], 'b': [[0.1]], 'zero': [1.0, 2.0], 'flat': [0.0]}
  expected = {'a': [3.0, -4.0], 'b': [[2.0]], 'zero': [0.0, 0.0], 'flat': [0.0]}
  to_arrays = lambda tree: {k: jnp.array(v, jnp.float32) for k, v in tree.items()}
  params = to_arrays(params)
  for w_size in (1e-30, 1.0, 1e30):
    rule, w = perturbations.layerwise(), {k: w_size * x for k, x in params.items()}
    g = {k: size * x for k, x in to_arrays(grads).items()}
    eps, _ = jax.jit(rule.update)(g, rule.init(w), w)
    for leaf, values in expected.items():
      np.testing.assert_allclose(eps[leaf] / w_size, values, rtol=1e-5, atol=0)


def test_layerwise_keeps_half_precision_and_can_share_one_radius():
  w = {'a': jnp.full(400, 0.5, jnp.bfloat16), 'b': jnp.full(3, 10.0, jnp.bfloat16)}
  g = {'a': jnp.full(400, 1e-3, jnp.bfloat16), 'b': jnp.full(3, -7.0, jnp.bfloat16)}
  eps, _ = perturbations.layerwise().update(g, optax.EmptyState(), w)
  assert {x.dtype for x in jax.tree.leaves(eps)} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_allclose(eps['a'].astype(np.float32), 0.5, rtol=4e-3)
  np.testing.assert_allclose(eps['b'].astype(np.float32), -10.0, rtol=4e-3)
  shared = optax.chain(perturbations.layerwise(), perturbations.global_norm())
  eps, _ = shared.update(g, shared.init(w), w)
  np.testing.assert_allclose(eps['a'].astype(np.float32), 0.025, rtol=1e-2)  # |w| = 20


def test_layerwise_requires_the_parameters():
  rule, g = perturbations.layerwise(), {'w': jnp.ones(2)}
  with pytest.raises(ValueError, match='layerwise perturbations scale with'):
    rule.update(g, rule.init(g))
