"""Universal SAM where the measures of sharpness are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax


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
