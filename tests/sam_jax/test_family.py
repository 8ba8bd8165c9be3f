"""Every method against straight-line NumPy float64, and identities between methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sam_jax
from tests.sam_jax.reference import (
  KEY,
  RATE,
  RHO,
  START,
  assert_same,
  jax_loss,
  jax_losses,
  ours,
  reference_ascent_steps,
  reference_decoupled_wsam,
  reference_esam,
  reference_friendly_sam,
  reference_frob,
  reference_graphsam,
  reference_gsam,
  reference_looksam,
  reference_msam,
  reference_msam_adam,
  reference_periodic,
  reference_universal,
  reference_wsam,
  sam_gradient,
  sgd,
  with_sgd,
)

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
