"""Gradients of any size, and numbers that are none: right, or NaN, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax
from sam_jax import ascent, perturbations

RHO = 0.5
WEIGHTS = {'w': jnp.array([[3.0, -4.0]]), 'b': jnp.array([2.0])}
CURVATURES = {'w': jnp.array([[1.0, 3.0]]), 'b': jnp.array([0.5])}
SIZES = (1e-36, 1e-25, 1.0, 1e25, 3e36)


def scaled(tree, factor):
  return jax.tree.map(lambda x: factor * x, tree)


def assert_close(a, b, rtol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


METHODS = {
  'sam': lambda: sam_jax.sam(RHO),
  'asam': lambda: sam_jax.asam(RHO),
  'asam_all': lambda: sam_jax.asam(RHO, eta=0.0, weights=True),
  'gsam': lambda: sam_jax.gsam(RHO),
  'wsam': lambda: sam_jax.wsam(RHO),
  'looksam': lambda: sam_jax.looksam(RHO, every=2),
  'friendly_sam': lambda: sam_jax.friendly_sam(RHO, sigma=0.5),
  'graphsam': lambda: sam_jax.graphsam(RHO, gamma=1.0, steps_per_epoch=2),
  'msam': lambda: sam_jax.msam(optax.trace(0.9), RHO),
}


@pytest.mark.parametrize('name', METHODS)
def test_the_size_of_the_gradient_cancels(name):
  """A loss times c has gradients times c: two updates, divided by c, do not change."""
  tx = METHODS[name]()

  @jax.jit
  @jax.vmap
  def two_updates(size):
    # Of a quadratic, whose gradient is exact at any scale.
    grad_fn = lambda w: scaled(jax.tree.map(jnp.multiply, CURVATURES, w), size)
    state, results = tx.init(WEIGHTS), []
    for _ in range(2):
      grads = grad_fn(sam_jax.gradient_point(state, WEIGHTS))
      updates, state = tx.update(grads, state, WEIGHTS, grad_fn=grad_fn)
      results.append((scaled(updates, 1 / size), state.gradient_norm / size))
    return results

  each = two_updates(jnp.array(SIZES, jnp.float32))
  pick = lambda i: jax.tree.map(lambda x: x[i], each)
  plain = pick(SIZES.index(1.0))
  clean = jax.tree.map(jnp.multiply, CURVATURES, WEIGHTS)
  moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), plain[1][0], clean)
  assert max(jax.tree.leaves(moved)) > 0.05  # the perturbation tells
  for i in range(len(SIZES)):
    assert_close(pick(i), plain)


def test_norms_of_ordinary_entries_are_the_plain_ones_bit_for_bit():
  tree = {'a': jax.random.normal(jax.random.key(0), (50,)), 'b': jnp.array(1e-3)}
  assert perturbations.norm(tree) == optax.tree.norm(tree)
  factor = 1 / optax.tree.norm(tree)
  assert_close(perturbations.on_sphere(tree), scaled(tree, factor), rtol=0)


@pytest.mark.parametrize('size', [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_norms_in_float64(x64, size):
  tree = {'a': jnp.array([3.0, 4.0]) * size, 'b': jnp.zeros(0)}
  np.testing.assert_allclose(perturbations.norm(tree), 5 * size, rtol=1e-15)
  np.testing.assert_allclose(perturbations.on_sphere(tree)['a'], [0.6, 0.8], rtol=1e-15)


def test_norms_of_constants():
  """XLA rewrites products of constants; zeros stay zeros, and nothing is silent."""
  length = jax.jit(lambda x: perturbations.norm(jnp.full(4, x)), static_argnums=0)
  unit = jax.jit(lambda: perturbations.on_sphere(jnp.zeros(3)))
  assert [float(length(value)) for value in (0.0, 1.0)] == [0.0, 2.0]
  np.testing.assert_array_equal(unit(), 0)
  assert length(1e-25) == pytest.approx(2e-25) or np.isnan(length(1e-25))


def test_norms_have_a_derivative():
  """Whoever differentiates through a method gets the derivative of the norm."""
  for size in (1e-30, 1.0, 1e30):
    gradient = jax.grad(perturbations.norm)(size * jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(gradient, [0.6, 0.8], rtol=1e-6)


def test_rejection_at_any_size():
  x = jnp.array([3.0, 4.0])
  for a, b in ((1e-30, 1e30), (1e30, 1e-30), (1e-36, 1e-36), (1e36, 1e36)):
    rest = ascent.reject(a * jnp.array([5.0, 0.0]), b * x)
    np.testing.assert_allclose(rest / a, [3.2, -2.4], rtol=1e-5)


def test_nan_in_the_gradient_is_not_silent():
  eps = perturbations.on_sphere({'a': jnp.array([jnp.nan, 1.0]), 'b': jnp.ones(1)})
  assert all(jnp.isnan(x).all() for x in jax.tree.leaves(eps))


STEPS = {
  'sam': lambda rho: sam_jax.sam(rho),
  'gsam': lambda rho: sam_jax.gsam(rho),
  'wsam': lambda rho: sam_jax.wsam(rho),
  'decoupled_wsam': lambda rho: sam_jax.decoupled_wsam(optax.sgd(0.1), 0.1, rho),
  'looksam': lambda rho: sam_jax.looksam(rho, every=2),
  'friendly_sam': lambda rho: sam_jax.friendly_sam(rho),
  'graphsam': lambda rho: sam_jax.graphsam(rho, gamma=1.0, steps_per_epoch=2),
  'msam': lambda rho: sam_jax.msam(optax.trace(0.9), rho),
  'trace_sam': lambda rho: sam_jax.trace_sam(rho),
  'm_sharpness': lambda rho: sam_jax.m_sharpness(sam_jax.sam(rho), 2),
}


@pytest.mark.parametrize('name', STEPS)
def test_a_traced_radius_that_is_none_gives_nan(name):
  """Of a linear loss, whose gradient is finite wherever it is taken."""
  params = jnp.array([1.0, 2.0])

  def value_and_grad_fn(w, *group):
    return jnp.sum(3 * w), jnp.full_like(w, 3.0)

  @jax.jit
  @jax.vmap
  def second_update(rho):
    tx, state = STEPS[name](rho), None
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(
        jnp.full(2, 3.0), state, params, value_and_grad_fn=value_and_grad_fn
      )
    return updates

  updates = second_update(jnp.array([0.1, 0.0, jnp.nan, -0.1, -jnp.inf]))
  assert np.isfinite(updates[:2]).all()
  assert np.isnan(updates[2:]).all()


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: sam_jax.gsam(alpha=NAN), 'alpha must be finite, got nan'),
    (lambda: sam_jax.gsam(alpha=np.float32(INF)), 'alpha must be finite, got inf'),
    (lambda: sam_jax.looksam(alpha=NAN), 'alpha must be finite'),
    (lambda: sam_jax.friendly_sam(sigma=NAN), 'sigma must be finite'),
    (lambda: sam_jax.friendly_sam(decay=NAN), 'decay must be in'),
    (lambda: sam_jax.graphsam(beta=NAN, steps_per_epoch=2), 'beta must be finite'),
    (lambda: sam_jax.graphsam(gamma=-INF, steps_per_epoch=2), 'gamma must be finite'),
    (lambda: sam_jax.trace_sam(lam=NAN), 'lam must be finite'),
    (lambda: sam_jax.det_sam(half_width=INF), 'half_width must be positive and finite'),
    (lambda: sam_jax.wsam(gamma=NAN), 'gamma must be in'),
    (lambda: sam_jax.esam(beta=NAN), 'beta must be in'),
    (lambda: sam_jax.asam(eta=INF), 'eta must be at least 0 and finite'),
    (lambda: sam_jax.asam(eta=NAN), 'eta must be at least 0 and finite'),
    (
      lambda: sam_jax.decoupled_wsam(optax.sgd(0.1), NAN),
      'learning_rate must be finite',
    ),
    (
      lambda: sam_jax.gsam_rho(
        optax.constant_schedule(1.0),
        learning_rate_min=NAN,
        learning_rate_max=1.0,
        rho_min=0.1,
        rho_max=0.2,
      ),
      'learning_rate_min must be finite',
    ),
  ],
)
def test_numbers_that_are_none_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_texts_are_no_numbers():
  with pytest.raises(TypeError, match="alpha must be a number, got '0.4'"):
    sam_jax.gsam(alpha='0.4')


@pytest.mark.parametrize(
  ('gamma', 'kept'), [(0.29, 29), (0.57, 57), (0.5, 50), (1, 100)]
)
def test_esam_keeps_the_share_that_it_is_told(gamma, kept):
  """In binary .29 * 100 is just below 29."""
  seen = []

  def grad_fn(w, indices):
    seen.append(len(indices))
    return w

  tx = sam_jax.esam(0.1, gamma=gamma, key=0)
  w = jnp.ones(3)
  losses = lambda w: jnp.arange(100.0) * w.sum()
  tx.update(w, tx.init(w), w, grad_fn=grad_fn, example_losses_fn=losses)
  assert seen[-1] == kept
