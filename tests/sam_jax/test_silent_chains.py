"""Chains that train all the same, and what goes wrong in them: docs/methods.md."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax

SGD = optax.sgd(0.1, momentum=0.9)
PARAMS = {'w': jnp.array([[1.0, -2.0], [0.5, 3.0]]), 'b': jnp.array([0.3])}
METHODS = sam_jax.methods.find()


def build(method):
  provided = {'learning_rate': 0.1, 'steps_per_epoch': 2, 'axis_name': 'batch'}
  wanted = inspect.signature(method).parameters
  options = {k: v for k, v in provided.items() if k in wanted}
  base = optax.chain(
    sam_jax.cross_replica_mean('batch'),
    optax.clip_by_global_norm(1.0),
    optax.add_decayed_weights(0.1),
    SGD,
  )
  if 'inner' in wanted:
    return method(base, **options)
  return optax.chain(method(**options), base)


@pytest.mark.parametrize('name', METHODS)
def test_check_finds_nothing_in_the_documented_chains(name):
  assert sam_jax.check(build(METHODS[name]), PARAMS, axis_name='batch') == []


@pytest.mark.parametrize(
  'tx',
  [
    optax.chain(sam_jax.m_sharpness(sam_jax.sam(), 2), SGD),
    optax.chain(sam_jax.periodic(sam_jax.sam(), every=2), optax.adam(0.1)),
    optax.chain(optax.inject_hyperparams(sam_jax.sam)(rho=0.1), SGD),
    optax.chain(sam_jax.sam(), optax.apply_if_finite(SGD, 3)),
    optax.chain(sam_jax.sam(), optax.MultiSteps(SGD, 2).gradient_transformation()),
    optax.chain(sam_jax.sam(), SGD, optax.contrib.reduce_on_plateau()),
    optax.chain(sam_jax.frob_sam(), optax.polyak_sgd()),
  ],
)
def test_check_finds_nothing_in_wrappers_that_do_no_harm(tx):
  assert sam_jax.check(tx, PARAMS) == []


SAM = sam_jax.sam(0.1)


@pytest.mark.parametrize(
  ('tx', 'words'),
  [
    (SGD, 'holds 0 methods'),
    (optax.chain(SAM, sam_jax.gsam(), SGD), 'holds 2 methods'),
    (sam_jax.msam(optax.chain(SAM, SGD)), 'holds 2 methods'),
    (optax.chain(SGD, SAM), 'put the base optimizer after the method'),
    (SAM, 'put the base optimizer after the method'),
    (optax.chain(optax.add_decayed_weights(0.1), SAM, SGD), 'weight decay after'),
    (optax.MultiSteps(optax.chain(SAM, SGD), 2), 'optax.MultiSteps stands around'),
    (
      optax.MultiSteps(optax.chain(SAM, SGD), 2).gradient_transformation(),
      'optax.MultiSteps stands around',
    ),
    (optax.apply_if_finite(optax.chain(SAM, SGD), 3), 'apply_if_finite stands around'),
  ],
)
def test_check_names_the_fault_and_the_mend(tx, words):
  (fault,) = sam_jax.check(tx, PARAMS)
  assert words in fault


CLIP = optax.clip_by_global_norm(1.0)


@pytest.mark.parametrize(
  'tx',
  [
    optax.chain(CLIP, sam_jax.wsam(), SGD),
    optax.chain(CLIP, sam_jax.wsam(), optax.adam(0.1)),
    optax.chain(optax.scale(0.5), sam_jax.gsam(), SGD),
    optax.chain(optax.trace(0.9), sam_jax.gsam(), optax.adam(0.1)),
    optax.chain(CLIP, sam_jax.decoupled_wsam(SGD, 0.1)),
    optax.chain(CLIP, sam_jax.looksam(), SGD),
    optax.chain(CLIP, sam_jax.graphsam(steps_per_epoch=3), SGD),
    optax.chain(CLIP, sam_jax.periodic(sam_jax.sam(), every=3), SGD),
    optax.chain(CLIP, sam_jax.frob_sam(antithetic=True), SGD),
  ],
)
def test_check_finds_scaling_before_a_method_that_mixes_gradients(tx):
  (fault,) = sam_jax.check(tx, PARAMS)
  assert 'put clipping and scaling after the method' in fault


@pytest.mark.parametrize(
  'tx',
  [
    optax.chain(sam_jax.wsam(), CLIP, SGD),
    sam_jax.decoupled_wsam(optax.chain(CLIP, SGD), 0.1),
    optax.chain(CLIP, sam_jax.usam(), SGD),
    optax.chain(CLIP, sam_jax.friendly_sam(), SGD),
    optax.chain(CLIP, sam_jax.esam(), SGD),
    optax.chain(CLIP, sam_jax.msam(SGD)),
    optax.chain(CLIP, sam_jax.wsam(gamma=0.0), SGD),
    optax.chain(CLIP, sam_jax.m_sharpness(sam_jax.wsam(), 2), SGD),
  ],
)
def test_check_lets_scaling_pass_where_nothing_is_mixed(tx):
  assert sam_jax.check(tx, PARAMS) == []


def test_clipping_before_wsam_leaves_a_difference_of_two_scales():
  """g + 9 (g_p - g / |g|) in place of a gradient of norm 1."""
  method, sgd = sam_jax.wsam(0.1, gamma=0.9), optax.sgd(1.0)
  g = np.array([20.0, -30.0])
  w = g / np.array([2.0, 6.0])
  perturbed = np.array([2.0, 6.0]) * (w + 0.1 * g / np.linalg.norm(g))
  clipped = g / np.linalg.norm(g)
  moved = []
  for tx in (optax.chain(CLIP, method, sgd), optax.chain(method, CLIP, sgd)):
    at, _ = run(tx, jnp.array(w), 1.0)
    moved.append(w - np.asarray(at))
  np.testing.assert_allclose(moved[0], clipped + 9 * (perturbed - clipped), rtol=1e-4)
  np.testing.assert_allclose(np.linalg.norm(moved[1]), 1.0, rtol=1e-4)


RULE = sam_jax.perturbations.global_norm()
ONLY_W = {'w': True, 'b': False}
ONE_BY_ONE = {'w': 'a', 'b': 'b'}


@pytest.mark.parametrize(
  'method',
  [
    lambda **rule: optax.chain(sam_jax.sam(**rule), SGD),
    lambda **rule: optax.chain(sam_jax.friendly_sam(**rule), SGD),
    lambda **rule: sam_jax.msam(SGD, **rule),
  ],
  ids=['sam', 'friendly_sam', 'msam'],
)
def test_check_finds_a_masked_perturbation(method):
  (fault,) = sam_jax.check(method(perturbation=optax.masked(RULE, ONLY_W)), PARAMS)
  assert 'use optax.selective_transform' in fault
  parts = optax.multi_transform({'a': RULE, 'b': optax.set_to_zero()}, ONE_BY_ONE)
  assert sam_jax.check(method(perturbation=parts), PARAMS) == []


def test_a_masked_perturbation_passes_raw_gradients():
  w = {'w': jnp.array(1.0), 'b': jnp.array(30.0)}
  eps, _ = optax.masked(RULE, ONLY_W).update(w, optax.masked(RULE, ONLY_W).init(w), w)
  assert (float(eps['w']), float(eps['b'])) == (1.0, 30.0)


@pytest.mark.parametrize(
  'tx',
  [
    optax.inject_hyperparams(lambda rho: sam_jax.msam(SGD, rho))(rho=0.1),
    optax.chain(
      optax.inject_hyperparams(sam_jax.graphsam)(rho=0.1, steps_per_epoch=3), SGD
    ),
  ],
)
def test_check_finds_an_injected_radius_that_lags(tx):
  (fault,) = sam_jax.check(tx, PARAMS)
  assert 'an injected rho lags' in fault


def test_check_lets_an_injected_learning_rate_pass():
  make = lambda rate: sam_jax.msam(optax.sgd(rate, momentum=0.9), rho=0.1)
  assert sam_jax.check(optax.inject_hyperparams(make)(rate=0.1), PARAMS) == []


AROUND = {
  'masked': lambda tx: optax.masked(tx, ONLY_W),
  'multi_transform': lambda tx: optax.multi_transform({'a': tx, 'b': SGD}, ONE_BY_ONE),
}


@pytest.mark.parametrize('tx', [optax.chain(SAM, SGD), sam_jax.msam(SGD)])
@pytest.mark.parametrize('name', AROUND)
def test_a_method_around_which_leaves_are_masked_says_so(tx, name):
  tx = AROUND[name](tx)
  (fault,) = sam_jax.check(tx, PARAMS)
  assert 'sees a part of the parameters only' in fault
  with pytest.raises(ValueError, match='put the method before that'):
    tx.init(PARAMS)


def test_parts_of_the_base_are_right():
  """A group of all leaves is no part; base optimizers may have theirs."""
  whole = optax.multi_transform({'a': optax.chain(SAM, SGD)}, {'w': 'a', 'b': 'a'})
  parts = optax.multi_transform({'a': SGD, 'b': optax.adam(0.1)}, ONE_BY_ONE)
  assert sam_jax.check(whole, PARAMS) == []
  assert sam_jax.check(optax.chain(SAM, parts), PARAMS) == []


@pytest.mark.parametrize('tx', [optax.chain(SAM, SGD), sam_jax.msam(SGD)])
def test_check_finds_flatten_around_a_method(tx):
  (fault,) = sam_jax.check(optax.flatten(tx), PARAMS)
  assert 'optax.flatten' in fault and 'around the base optimizer' in fault
  assert sam_jax.check(optax.chain(SAM, optax.flatten(SGD)), PARAMS) == []


def test_a_point_of_flattened_parameters_says_so():
  tx = optax.flatten(sam_jax.msam(SGD))
  with pytest.raises(ValueError, match='does not see the tree of the parameters'):
    sam_jax.gradient_point(tx.init(PARAMS), PARAMS)


def quadratic(w):
  return jnp.sum(jnp.array([1.0, 3.0]) * w**2)


def run(tx, w, *batches, loss=quadratic, jump=True):
  state = tx.init(w)
  for batch in batches:
    scaled = lambda p, batch=batch: batch * loss(p)
    point = sam_jax.gradient_point(state, w) if jump else w
    updates, state = tx.update(
      jax.grad(scaled)(point), state, w, grad_fn=jax.grad(scaled)
    )
    w = optax.apply_updates(w, updates)
  return w, state


W = jnp.array([1.0, -0.5])


def test_multi_steps_around_a_chain_takes_the_last_microbatch():
  """Two microbatches of gradients 1 and 3 times that of the loss: mean 2, last 3."""
  method = sam_jax.sam(0.1)
  sgd = optax.sgd(0.1)
  around, _ = run(optax.MultiSteps(optax.chain(method, sgd), 2), W, 1.0, 3.0)
  last, _ = run(optax.chain(method, sgd), W, 3.0)
  right, _ = run(optax.chain(method, sgd), W, 2.0)
  np.testing.assert_allclose(around, last, rtol=1e-6)
  assert not np.allclose(around, right, rtol=1e-2)
  inside = optax.chain(method, optax.MultiSteps(sgd, 2).gradient_transformation())
  np.testing.assert_allclose(run(inside, W, 1.0, 3.0)[0], right, rtol=1e-6)


def test_apply_if_finite_belongs_around_the_base():
  """The clean gradient is finite, that at w + eps is not."""
  loss = lambda w: jnp.sum(jnp.sqrt(1.05 - w))
  w = jnp.array([1.0])
  tx = sam_jax.sam(0.1)
  grads = jax.grad(lambda w: -loss(w))
  moved = []
  for chain in (
    optax.apply_if_finite(optax.chain(tx, SGD), 3),
    optax.chain(tx, optax.apply_if_finite(SGD, 3)),
  ):
    updates, _ = chain.update(grads(w), chain.init(w), w, grad_fn=grads)
    moved.append(float(updates[0]))
  assert np.isfinite(grads(w)).all()
  assert np.isnan(moved[0]) and moved[1] == 0.0


@pytest.mark.parametrize(
  'method',
  [
    sam_jax.friendly_sam(0.1),
    sam_jax.graphsam(0.1, gamma=1.0, steps_per_epoch=9),
    sam_jax.looksam(0.1, every=2),
  ],
  ids=['friendly_sam', 'graphsam', 'looksam'],
)
@pytest.mark.parametrize('batches', [(jnp.nan, 1.0, 1.0), (1.0, jnp.nan, 1.0, 1.0)])
def test_one_gradient_that_is_not_finite_does_not_stay(method, batches):
  """Its update is left out by the base, and the next ones are finite again."""
  tx = optax.chain(method, optax.apply_if_finite(optax.sgd(0.01), 9))
  w, state = run(tx, W, *batches)
  finite = [np.isfinite(x).all() for x in jax.tree.leaves(state)]
  assert all(finite) and not np.allclose(w, W)


def test_the_first_finite_gradient_starts_the_average():
  tx = sam_jax.friendly_sam(0.1)
  chain = optax.chain(tx, optax.apply_if_finite(optax.sgd(0.1), 9))
  _, state = run(chain, W, jnp.nan, 1.0)
  np.testing.assert_allclose(
    optax.tree.get(state, 'average'), jax.grad(quadratic)(W), rtol=1e-6
  )


@pytest.mark.parametrize('name', ['msam', 'graphsam'])
def test_without_the_gradient_point_there_is_no_perturbation(name):
  """What is recorded as the radius is then one that nobody went."""
  if name == 'msam':
    tx, num = sam_jax.msam(SGD, rho=0.3), 3
  else:
    tx, num = optax.chain(sam_jax.graphsam(0.3, gamma=1.0, steps_per_epoch=9), SGD), 3
  momentum, _ = run(optax.with_extra_args_support(SGD), W, *[1.0] * num)
  ignored, state = run(tx, W, *[1.0] * num, jump=False)
  proper, _ = run(tx, W, *[1.0] * num)
  assert optax.tree.get(state, 'rho') == pytest.approx(0.3)
  if name == 'msam':
    np.testing.assert_allclose(ignored, momentum, rtol=1e-6)
  assert not np.allclose(proper, ignored, rtol=1e-2)


def test_an_injected_radius_lags_one_update_where_the_next_point_is_known():
  """A schedule of the count in rho itself does not."""
  schedule = optax.piecewise_constant_schedule(0.1, {2: 3.0})  # 0.1, 0.1, 0.3, ...
  make = functools.partial(sam_jax.msam, SGD)
  radii = []
  for tx in (
    optax.inject_hyperparams(lambda rho: make(rho))(rho=schedule),
    make(schedule),
  ):
    state, found = tx.init(W), []
    for _ in range(4):
      _, state = tx.update(W, state, W)
      found.append(float(jnp.linalg.norm(sam_jax.gradient_point(state, W) - W)))
    radii.append(found)
  np.testing.assert_allclose(radii[0], [0.1, 0.1, 0.3, 0.3], rtol=1e-5)
  np.testing.assert_allclose(radii[1], [0.1, 0.3, 0.3, 0.3], rtol=1e-5)


def test_groups_compare_with_their_own_loss():
  """universal_sam in m_sharpness: the caller's value is that of the whole batch."""
  targets = jnp.array([0.0, 4.0])
  loss = lambda w, group: (w - targets[group]) ** 2
  tx = sam_jax.m_sharpness(
    sam_jax.universal_sam(lambda x: x**3, lambda s: s, rho=0.1), 2
  )
  w = jnp.array(1.0)
  given = {'value_and_grad_fn': jax.value_and_grad(loss)}
  plain, _ = tx.update(w, tx.init(w), w, **given)
  told, _ = tx.update(w, tx.init(w), w, value=jnp.array(5.0), **given)
  assert told == plain
