"""Each edge parts the curvatures at which its optimizer converges from the others."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import sam_jax
from sam_jax import edges

ETA, RHO, NORM = 0.37, 0.21, 0.6
MOMENTA = [0.0, 0.3, 0.9]


def grows(tx, curvature, gradient=lambda h, w: h * w, size=1.0, steps=600):
  """Whether the iterates of an optimizer grow on h w^2 / 2; in float64."""

  def step(carry, _):
    w, state = carry
    grad = gradient(curvature, w)
    updates, state = tx.update(grad, state, w, grad_fn=lambda p: gradient(curvature, p))
    return (w + updates, state), jnp.abs(w)

  start = jnp.array(size)
  _, sizes = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  early, late = sizes[steps // 6 : steps // 3].max(), sizes[-steps // 6 :].max()
  return bool(late > early) or not np.isfinite(late)


def parts(tx, edge, gradient=lambda h, w: h * w, size=1.0):
  """A half per cent below the edge the optimizer converges, above it diverges."""
  edge = float(edge)
  below, above = (grows(tx, f * edge, gradient, size) for f in (0.995, 1.005))
  return above and not below


def perturbed(h, w):
  """SAM's gradient on h w^2 / 2 with the norm of the gradient held fixed."""
  return h * (w + RHO * h * w / NORM)


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('momentum', MOMENTA)
def test_edges_of_gradient_descent_with_momentum(x64, momentum, nesterov):
  edge = edges.nesterov_edge if nesterov else edges.heavy_ball_edge
  tx = optax.sgd(ETA, momentum, nesterov=nesterov)
  assert parts(tx, edge(ETA, momentum))
  if momentum == 0:
    assert parts(tx, edges.gd_edge(ETA))


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('momentum', MOMENTA)
def test_edges_of_sam_with_momentum(x64, momentum, nesterov):
  tx = optax.sgd(ETA, momentum, nesterov=nesterov)
  settings = {'momentum': momentum, 'nesterov': nesterov}
  assert parts(tx, edges.sam_edge(NORM, ETA, RHO, **settings), perturbed)
  usam = optax.chain(sam_jax.usam(RHO), tx)
  assert parts(usam, edges.usam_edge(ETA, RHO, **settings))


def test_sam_itself_holds_its_gradient_norm_at_the_edge(x64):
  """Steps of `sam` on a quadratic end in a cycle, on which the edge is the curvature.

  The norm is constant there, and what linear stability says of it is exact.
  """
  curvature, rho = 3.0, 0.4
  tx = optax.chain(sam_jax.sam(rho), optax.sgd(0.5))
  gradient = lambda w: curvature * w

  def step(carry, _):
    w, state = carry
    updates, state = tx.update(gradient(w), state, w, grad_fn=gradient)
    return (w + updates, state), jnp.abs(gradient(w))

  start = jnp.array(1.7)
  _, norms = jax.lax.scan(step, (start, tx.init(start)), length=200)
  np.testing.assert_allclose(norms[-9:], norms[-1], rtol=1e-9)
  edge = edges.sam_edge(norms[-1], 0.5, rho)
  np.testing.assert_allclose(edge, curvature, rtol=1e-9)


@pytest.mark.parametrize('nesterov', [False, True])
def test_edge_of_adam_over_a_frozen_preconditioner(x64, nesterov):
  rate, b1, b2, scale = 0.02, 0.9, 0.5, 0.7
  tx = optax.adam(rate, b1, b2, nesterov=nesterov)

  def init(w):
    return optax.tree.set(tx.init(w), count=10**6)  # Both corrections of biases are 1.

  def update(grad, state, params=None, **extra_args):
    del params, extra_args
    # The gradients are too small to move a second moment that is set anew.
    return tx.update(grad, optax.tree.set(state, nu=jnp.array(scale**2 / b2)))

  frozen = optax.GradientTransformationExtraArgs(init, update)
  # The preconditioned Hessian of h w^2 / 2 is h / scale.
  edge = float(edges.adam_edge(rate, b1, nesterov=nesterov))
  assert parts(frozen, edge * scale, size=1e-60)
  np.testing.assert_allclose(edges.adam_edge(rate), 38 / rate, rtol=1e-12)


def closed_form(norm, rate, rho):
  """The SAM-edge of decimal numbers, from the textbook form."""
  if rho == 0:
    return 2 / rate
  if norm == 0:
    return Decimal(0)
  return norm / (2 * rho) * ((1 + 8 * rho / (rate * norm)).sqrt() - 1)


def exact(*at):
  """The SAM-edge to 60 digits and more."""
  with localcontext() as context:
    context.prec = 200
    return float(closed_form(*(Decimal(float(x)) for x in at)))


_SIZES = st.floats(-30, 30).map(lambda e: float(np.float32(10**e)))


@given(_SIZES, _SIZES, st.one_of(st.just(0.0), _SIZES))
@example(float(np.float32(1e-30)), float(np.float32(1e-30)), float(np.float32(1e30)))
@example(float(np.float32(3e38)), float(np.float32(1e37)), float(np.float32(1e-30)))
def test_float32_loses_no_digit_at_any_size(norm, rate, rho):
  edge = edges.sam_edge(norm, rate, rho)
  assert edge.dtype == jnp.float32
  wanted = exact(norm, rate, rho)
  if 1e-37 < wanted < 1e38:
    np.testing.assert_allclose(edge, wanted, rtol=2e-6)


def slope(argument, at):
  """The derivative of `closed_form` by one argument, from a difference."""
  with localcontext() as context:
    context.prec = 200
    low, high = ([Decimal(x) for x in at] for _ in range(2))
    step = high[argument] * Decimal('1e-30')
    high[argument] += step
    return float((closed_form(*high) - closed_form(*low)) / step)


@pytest.mark.parametrize('at', [(0.3, 0.5, 0.1), (2.0, 0.1, 1e-4), (1e-3, 4.0, 20.0)])
def test_derivatives_are_those_of_the_closed_form(at):
  found = jax.jit(jax.grad(edges.sam_edge, (0, 1, 2)))(*at)
  at = [float(np.float32(x)) for x in at]
  wanted = [slope(argument, at) for argument in range(3)]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_derivatives_without_a_perturbation_are_finite():
  """lambda = E - E^2 rho / |g| + 2 E^3 rho^2 / |g|^2 - ..., and of norm 0 it is E."""
  by_rho = jax.grad(edges.sam_edge, 2)
  np.testing.assert_allclose(by_rho(0.3, 0.5, 0.0), -(4**2) / 0.3, rtol=1e-6)
  again = jax.grad(by_rho, 2)(0.3, 0.5, 0.0)
  np.testing.assert_allclose(again, 4 * 4**3 / 0.3**2, rtol=1e-5)
  of_usam = jax.grad(edges.usam_edge, 1)(0.5, 0.0)
  np.testing.assert_allclose(of_usam, -(4**2), rtol=1e-6)
  found = jax.grad(edges.sam_edge, (0, 1, 2))(0.3, 0.5, 0.0)
  np.testing.assert_allclose(found[:2], [0, -8], rtol=1e-6)
  assert np.isfinite(jax.grad(edges.sam_edge, (0, 1, 2))(0.0, 0.5, 0.1)).all()


def test_lists_are_arrays():
  np.testing.assert_allclose(edges.gd_edge([0.1, 0.2]), [20, 10])
  found = edges.sam_edge([0.1, 0.2], 0.4, (0.03, 0.1))
  wanted = [edges.sam_edge(0.1, 0.4, 0.03), edges.sam_edge(0.2, 0.4, 0.1)]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_limits():
  assert float(edges.sam_edge(0.0, 0.5, 0.1)) == 0
  assert float(edges.sam_edge(0.3, 0.5, 0.0)) == 4
  assert float(edges.sam_edge(0.0, 0.5, 0.0)) == 4
  assert infinite(edges.sam_edge(0.3, 0.0, 0.1)) and infinite(edges.gd_edge(0.0))
  assert infinite(edges.usam_edge(0.0, 0.1))
  assert np.isnan(edges.sam_edge(np.nan, 0.5, 0.1))
  assert np.isnan(edges.sam_edge(np.nan, 0.5, 0.0))
  small = [float(edges.sam_edge(0.3, 0.5, rho)) for rho in (1e-4, 1e-8, 1e-30)]
  np.testing.assert_allclose(small, [exact(0.3, 0.5, r) for r in (1e-4, 1e-8, 1e-30)])


def infinite(x):
  return np.isposinf(float(x))


def test_arguments_broadcast_and_compile():
  norms, rhos = jnp.array([0.1, 0.0, 3.0]), jnp.array([[0.0], [0.05]])
  edge = edges.sam_edge(norms, 0.4, rhos)
  assert edge.shape == (2, 3)
  inside = jax.jit(edges.sam_edge)(norms, 0.4, rhos)
  np.testing.assert_allclose(inside, edge, rtol=1e-6)
  each = jax.vmap(jax.vmap(edges.sam_edge, (0, None, None)), (None, None, 0))
  np.testing.assert_allclose(each(norms, 0.4, rhos[:, 0]), edge, rtol=1e-6)
  compiled = jax.jit(edges.sam_edge, static_argnames='nesterov')
  np.testing.assert_allclose(
    compiled(0.3, 0.4, 0.1, momentum=0.9, nesterov=True),
    edges.sam_edge(0.3, 0.4, 0.1, momentum=0.9, nesterov=True),
    rtol=1e-6,
  )
  assert edges.gd_edge(jnp.bfloat16(0.5)).dtype == jnp.float32
  assert edges.heavy_ball_edge(np.array([0.1, 0.2]), 0.9).shape == (2,)


def test_plateaus_meet_the_edges():
  small, full = edges.batch_sharpness_plateaus(0.1, jnp.array([0.0, 0.9]))
  np.testing.assert_allclose(small, [20, 2], rtol=1e-5)
  np.testing.assert_allclose(full, edges.heavy_ball_edge(0.1, jnp.array([0.0, 0.9])))


@pytest.mark.parametrize(
  ('call', 'sentence'),
  [
    (lambda: edges.gd_edge(-0.1), 'learning_rate=-0.1: give'),
    (lambda: edges.heavy_ball_edge(0.1, 1.0), 'momentum=1.0: .* below 1'),
    (lambda: edges.adam_edge(0.1, 1.5), 'b1=1.5: .* below 1'),
    (lambda: edges.sam_edge(-1, 0.1, 0.1), 'gradient_norm=-1: give'),
    (lambda: edges.usam_edge(0.1, -2.0), 'rho=-2.0: give'),
  ],
)
def test_numbers_out_of_range_are_refused(call, sentence):
  with pytest.raises(ValueError, match=sentence):
    call()


def test_alignment_is_the_absolute_cosine():
  rng = np.random.default_rng(0)
  u, v = rng.normal(size=(2, 7)).astype(np.float32)
  tree = lambda x: {'a': jnp.array(x[:4].reshape(2, 2)), 'b': jnp.array(x[4:])}
  wanted = abs(u @ v) / np.linalg.norm(u) / np.linalg.norm(v)
  for factor in (1.0, -1e-30, 1e30):
    found = jax.jit(edges.alignment)(tree(np.float32(factor) * u), tree(v))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert float(edges.alignment(tree(0 * u), tree(v))) == 0
  assert float(edges.alignment(tree(u), tree(0 * v))) == 0
  assert float(edges.alignment(tree(u), tree(-u))) <= 1
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(u))
  assert edges.alignment(narrow, tree(v)).dtype == jnp.float32
  np.testing.assert_allclose(edges.alignment(narrow, tree(v)), wanted, atol=1e-2)


def test_alignment_with_several_vectors_at_once_is_refused():
  with pytest.raises(ValueError, match='of several eigenvectors take one'):
    edges.alignment(jnp.ones(3), jnp.ones((2, 3)))
