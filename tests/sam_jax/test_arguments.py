"""Arguments of methods: which are refused, which may be injected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax
from tests.sam_jax.reference import (
  START,
  assert_same,
  jax_loss,
)


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
