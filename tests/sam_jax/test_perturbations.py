"""Perturbations: norms, rescaling, masks, groups, and the bfloat16 trap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sam_jax
from sam_jax import ascent, perturbations

VALUES = st.floats(-1e3, 1e3, width=32).map(lambda v: 0.0 if abs(v) < 1e-3 else v)
ARRAYS = hnp.arrays(np.float32, (3, 2), elements=VALUES)
VECTORS = hnp.arrays(np.float32, (4,), elements=VALUES)


def eps_hat(perturbation, grads, params=None):
  return perturbation.update(grads, perturbation.init(params), params)[0]


def flat(tree):
  leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


@given(ARRAYS, VECTORS)
def test_global_norm_has_unit_norm_and_the_gradients_direction(a, b):
  grads = {'a': a, 'b': b}
  eps, g = flat(eps_hat(perturbations.global_norm(), grads)), flat(grads)
  if not g.any():
    assert not eps.any()
  else:
    np.testing.assert_allclose(eps, g / np.linalg.norm(g), rtol=1e-5, atol=1e-7)


@given(ARRAYS, VECTORS, st.sampled_from([None, True]), st.sampled_from([0.0, 0.01]))
def test_adaptive_has_unit_norm_in_its_own_metric(a, b, weights, eta):
  """|T^-1 eps| = 1 with T = |w| + eta on weights and 1 elsewhere."""
  rng = np.random.default_rng(0)
  params = {
    'a': rng.uniform(0.5, 2, a.shape).astype(np.float32),
    'b': -rng.uniform(0.5, 2, b.shape).astype(np.float32),
  }
  grads = {'a': a, 'b': b}
  perturbation = perturbations.adaptive(eta, weights=weights)
  eps = flat(eps_hat(perturbation, grads, params))
  ones = np.ones(b.size)
  scale = {
    None: np.concatenate([np.abs(params['a']).ravel() + eta, ones]),
    True: np.abs(flat(params)) + eta,
  }[weights]
  g = flat(grads)
  if not g.any():
    assert not eps.any()
  else:
    np.testing.assert_allclose(np.linalg.norm(eps / scale), 1, rtol=1e-5)
    np.testing.assert_allclose(
      eps, scale**2 * g / np.linalg.norm(scale * g), rtol=1e-4, atol=1e-6
    )


def test_the_every_parameter_rule_is_invariant_to_rescaling():
  """Two layers rescaled by c and 1/c: the same function, the same perturbed loss."""
  x = jax.random.normal(jax.random.key(0), (5, 3))
  loss = lambda p: jnp.mean((jax.nn.relu(x @ p[0]) @ p[1]) ** 2)
  keys = jax.random.split(jax.random.key(1), 2)
  params = (jax.random.normal(keys[0], (3, 4)), jax.random.normal(keys[1], (4, 2)))
  rescaled = (params[0] * 4.0, params[1] / 4.0)

  def perturbed_loss(perturbation, params):
    eps = eps_hat(perturbation, jax.grad(loss)(params), params)
    return loss(ascent.perturb(params, perturbations.scale_tree(eps, 0.1)))

  adaptive = perturbations.adaptive(0.0, weights=True)
  np.testing.assert_allclose(
    perturbed_loss(adaptive, params), perturbed_loss(adaptive, rescaled), rtol=1e-5
  )
  plain = perturbations.global_norm()
  assert not np.isclose(
    perturbed_loss(plain, params), perturbed_loss(plain, rescaled), rtol=1e-2
  )


def test_frozen_leaves_are_not_perturbed_and_leave_the_norm():
  grads = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([12.0])}
  params = jax.tree.map(jnp.ones_like, grads)
  perturbation = optax.selective_transform(
    perturbations.global_norm(), freeze_mask={'a': False, 'b': True}
  )
  eps = eps_hat(perturbation, grads, params)
  np.testing.assert_allclose(eps['a'], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(eps['b'], [0.0])

  seen = []
  tx = sam_jax.sam(0.5, perturbation=perturbation)
  tx.update(grads, tx.init(params), params, grad_fn=lambda p: seen.append(p) or grads)
  np.testing.assert_allclose(seen[0]['a'], [1.3, 1.4], rtol=1e-6)
  np.testing.assert_array_equal(seen[0]['b'], params['b'])


def test_groups_have_their_own_norm_and_radius():
  grads = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([12.0, 5.0])}
  params = jax.tree.map(jnp.ones_like, grads)
  perturbation = optax.multi_transform(
    {
      'one': perturbations.global_norm(),
      'ten': optax.chain(perturbations.global_norm(), optax.scale(10.0)),
    },
    {'a': 'one', 'b': 'ten'},
  )
  eps = eps_hat(perturbation, grads, params)
  np.testing.assert_allclose(eps['a'], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(eps['b'], [120 / 13, 50 / 13], rtol=1e-6)
  tx = sam_jax.sam(0.5, perturbation=perturbation)
  state = tx.init(params)
  _, after = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=lambda p: p))(
    grads, state, params
  )
  assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_schedule_composes_with_a_perturbation():
  perturbation = optax.chain(
    perturbations.global_norm(), optax.scale_by_schedule(lambda count: 1.0 + count)
  )
  grads = {'a': jnp.array([3.0, 4.0])}
  state = perturbation.init(grads)
  for expected in (1.0, 2.0, 3.0):
    eps, state = perturbation.update(grads, state, grads)
    np.testing.assert_allclose(np.linalg.norm(flat(eps)), expected, rtol=1e-6)


def test_bfloat16_parameters_move_by_the_whole_perturbation():
  """At 1e7 bfloat16 weights the displacement is eps-hat, not a rounded 18 % of it."""
  size, rho = 10_000_000, 0.05
  keys = jax.random.split(jax.random.key(0), 2)
  params = {'w': 0.05 * jax.random.normal(keys[0], (size,), jnp.bfloat16)}
  grads = {'w': jax.random.normal(keys[1], (size,), jnp.bfloat16)}
  displacement = []

  def grad_fn(at):
    moved = at['w'].astype(jnp.float32) - params['w'].astype(jnp.float32)
    displacement.append(float(jnp.linalg.norm(moved)))
    return {'w': at['w'].astype(jnp.bfloat16)}

  tx = sam_jax.sam(rho)
  tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  np.testing.assert_allclose(displacement[0], rho, rtol=1e-2)
  direction = eps_hat(perturbations.global_norm(), grads)['w']
  rounded = (params['w'] + rho * direction).astype(jnp.bfloat16)
  eaten = float(jnp.linalg.norm((rounded - params['w']).astype(jnp.float32)))
  assert abs(eaten / rho - 1) > 0.3  # the trap is real at this size


def test_norm_is_taken_in_float32():
  grads = {'w': jnp.full((1000, 1000), 1e-3, jnp.bfloat16)}
  expected = np.linalg.norm(np.asarray(grads['w'], np.float64))
  assert perturbations.norm(grads).dtype == jnp.float32
  np.testing.assert_allclose(perturbations.norm(grads), expected, rtol=1e-5)


@pytest.mark.parametrize('rho', [-0.1, float('nan'), -1, float('inf')])
@pytest.mark.parametrize('method', [sam_jax.sam, sam_jax.asam, sam_jax.usam])
def test_a_negative_rho_is_refused(method, rho):
  with pytest.raises(ValueError, match='rho must be at least 0'):
    method(rho)


def test_a_negative_eta_is_refused():
  with pytest.raises(ValueError, match='eta must be at least 0'):
    sam_jax.asam(0.5, eta=-0.01)


def test_params_are_required():
  tx, grads = sam_jax.asam(0.5), {'w': jnp.ones((2, 2))}
  with pytest.raises(ValueError, match='params'):
    tx.update(grads, tx.init(grads), grad_fn=lambda p: p)
  with pytest.raises(ValueError, match='parameters'):
    eps_hat(perturbations.adaptive(), grads)


def test_a_value_that_is_not_a_scalar_is_refused():
  tx, params = sam_jax.sam(0.5), {'w': jnp.ones((2, 2))}
  with pytest.raises(TypeError, match='scalar'):
    tx.update(
      params, tx.init(params), params, value_and_grad_fn=lambda p: (jnp.ones(3), p)
    )


@pytest.mark.parametrize('rho', ['0.05', None, [0.1]])
def test_what_is_no_radius_is_refused(rho):
  with pytest.raises(TypeError, match='rho must be a number'):
    sam_jax.sam(rho)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'grad_fn': {'w': 1.0}}, 'grad_fn must be a function'),
    ({'value_and_grad_fn': lambda p: p}, 'as jax.value_and_grad'),
    ({'value_and_grad_fn': lambda p: ((0.0, 'aux'), p)}, 'has_aux'),
    ({'grad_fn': lambda p: {'w': jnp.ones(3)}}, r"at \['w'\] expected \(2, 2\)"),
  ],
)
def test_a_wrong_function_is_named(given, message):
  tx, params = sam_jax.sam(0.5), {'w': jnp.ones((2, 2))}
  with pytest.raises(TypeError, match=message):
    tx.update(params, tx.init(params), params, **given)
