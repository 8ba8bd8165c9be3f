"""Experiments of the literature whose outcome is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax

# The sizes are the published experiment's (see reference in the test).
EXAMPLES, FEATURES, STEPS, SEEDS = 20, 30, 10_000, 20


def test_loss_of_the_diagonal_network_by_hand():
  """The vectorised 1-SAM update equals m_sharpness(usam) on the same loss."""
  x, y, _ = problem(0)
  u, v = 0.5 * np.ones(FEATURES), 0.1 * np.ones(FEATURES)
  by_library = library_step((jnp.asarray(u), jnp.asarray(v)), x, y, 0.1)
  by_hand = np_step(u, v, np.asarray(x), np.asarray(y), 0.1)
  for a, b in zip(by_library, by_hand, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def problem(seed):
  """n = 20 Gaussian examples, a target with three ones, and 1,000 test examples."""
  # The generator of the figures in the test below; another one's draws order 18 of 20.
  rng = np.random.RandomState(seed)
  target = np.zeros(FEATURES)
  target[:3] = 1
  x = rng.randn(EXAMPLES, FEATURES)
  x_test = rng.randn(1000, FEATURES)
  return jnp.asarray(x), jnp.asarray(x @ target), (x_test, x_test @ target)


def np_step(u, v, x, y, rho):
  """One full-batch step of 1-SAM, example by example: unnormalised, averaged."""
  gu, gv = np.zeros_like(u), np.zeros_like(v)
  for xi, yi in zip(x, y, strict=True):
    r = xi @ (u * v) - yi
    up, vp = u + rho * r * xi * v, v + rho * r * xi * u
    r = xi @ (up * vp) - yi
    gu, gv = gu + r * xi * vp / len(x), gv + r * xi * up / len(x)
  rate = 5 / FEATURES
  return u - rate * gu, v - rate * gv


def library_step(params, x, y, rho):
  def loss(p, group):
    return 0.5 * (x[group] @ (p[0] * p[1]) - y[group]) ** 2

  method = sam_jax.m_sharpness(sam_jax.usam(rho), EXAMPLES)
  tx = optax.chain(method, optax.sgd(5 / FEATURES))
  updates, _ = tx.update(params, tx.init(params), params, grad_fn=jax.grad(loss))
  return optax.apply_updates(params, updates)


@pytest.mark.slow
def test_diagonal_linear_network():
  """The more 1-SAM perturbs, the sparser its solution: paired ratios to GD.

  Andriushchenko and Flammarion, 2022, section 4 (arXiv:2206.06232), w = u * v from
  u = .02, v = 0: medians over 20 seeds of the test loss over GD's are .81, .52 and .075
  for rho .01, .03 and .1, ordered in every seed.
  """
  rhos = np.array([0.0, 0.01, 0.03, 0.1])

  @jax.jit
  def end(x, y, rho):
    start = (0.02 * jnp.ones(FEATURES), jnp.zeros(FEATURES))
    step = lambda params, _: (library_step(params, x, y, rho), None)
    (u, v), _ = jax.lax.scan(step, start, length=STEPS)
    return u * v

  problems = [problem(seed) for seed in range(SEEDS)]
  x, y = (jnp.stack([p[i] for p in problems]) for i in (0, 1))
  over_rho = jax.vmap(end, (None, None, 0))
  weights = np.asarray(jax.jit(jax.vmap(over_rho, (0, 0, None)))(x, y, rhos))
  losses = np.array(
    [
      [np.mean((x_test @ w - y_test) ** 2) / 2 for w in row]
      for row, (_, _, (x_test, y_test)) in zip(weights, problems, strict=True)
    ]
  )
  assert np.all(np.diff(losses, axis=1) < 0), losses
  ratios = np.median(losses[:, 1:] / losses[:, :1], axis=0)
  print('median ratios to gradient descent', ratios)
  np.testing.assert_allclose(ratios[:2], [0.81, 0.52], rtol=0.15)
  np.testing.assert_allclose(ratios[2], 0.075, rtol=0.3)
