"""What cannot work says so, by name, before or at the first update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax

_PARAMS = {'w': jnp.array([1.0, -2.0, 0.5])}
_X = jax.random.normal(jax.random.key(0), (12, 3))


def _losses(params):
  return (_X @ params['w'] - 1) ** 2


def _loss(params, chosen=slice(None)):
  return _losses(params)[chosen].mean()


def _update(tx, **extra):
  given = {'value_and_grad_fn': jax.value_and_grad(_loss)} | extra
  return tx.update(jax.grad(_loss)(_PARAMS), tx.init(_PARAMS), _PARAMS, **given)


_SGD = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize(
  ('make', 'error', 'words'),
  [
    (lambda: sam_jax.sam(np.array(-0.05)), ValueError, 'rho must be at least 0'),
    (lambda: sam_jax.sam(np.array([0.05, 0.1])), ValueError, r'got shape \(2,\)'),
    (lambda: sam_jax.sam(jnp.array([0.05, 0.1])), ValueError, 'rho must be a scalar'),
    (lambda: sam_jax.sam(True), TypeError, 'rho must be a number'),
    (lambda: sam_jax.sam(num_ascent_steps=True), TypeError, 'a whole number'),
    (lambda: sam_jax.looksam(every=2.5), TypeError, 'every must be a whole number'),
    (lambda: sam_jax.graphsam(steps_per_epoch='a'), TypeError, 'steps_per_epoch must'),
    (lambda: sam_jax.periodic(sam_jax.sam(), start=1.5), TypeError, 'start must be'),
    (lambda: sam_jax.m_sharpness(sam_jax.sam(), None), TypeError, 'num_groups must'),
    (lambda: sam_jax.msam(0.3), TypeError, 'inner must be an optax'),
    (lambda: sam_jax.decoupled_wsam(0.3, 0.1), TypeError, 'inner must be an optax'),
    (
      lambda: sam_jax.sam(perturbation=sam_jax.perturbations.global_norm),
      TypeError,
      'perturbation must be an optax transformation',
    ),
  ],
)
def test_arguments_are_named(make, error, words):
  with pytest.raises(error, match=words):
    make()


def test_numpy_numbers_are_numbers():
  assert sam_jax.sam(np.float32(0.05), num_ascent_steps=np.int64(2))


@pytest.mark.parametrize(
  'wrap',
  [lambda tx: sam_jax.m_sharpness(tx, 2), lambda tx: sam_jax.periodic(tx, every=2)],
)
@pytest.mark.parametrize(
  ('inner', 'words'),
  [
    (lambda: sam_jax.msam(_SGD), 'MsamState'),
    (lambda: sam_jax.graphsam(steps_per_epoch=2), 'GraphSamState'),
    (lambda: sam_jax.decoupled_wsam(_SGD, 0.1), 'DecoupledWsamState'),
    (lambda: optax.chain(sam_jax.sam(), _SGD), 'takes one method'),
    (lambda: _SGD, 'takes one method'),
  ],
)
def test_wrappers_take_methods_that_start_from_the_clean_gradient(wrap, inner, words):
  with pytest.raises(TypeError, match=words):
    wrap(inner()).init(_PARAMS)


def test_a_period_in_a_period_is_refused():
  with pytest.raises(TypeError, match='looksam'):
    sam_jax.periodic(sam_jax.looksam(every=2), every=2).init(_PARAMS)


def test_groups_do_not_go_with_chosen_examples():
  with pytest.raises(TypeError, match='does not go with esam'):
    sam_jax.m_sharpness(sam_jax.esam(), 3).init(_PARAMS)


def test_groups_go_with_keys_in_the_state_outside_jit():
  def of_group(params, group):
    return _losses(params).reshape(3, 4)[group].mean()

  tx = sam_jax.m_sharpness(sam_jax.trace_sam(), 3)
  updates, state = _update(tx, value_and_grad_fn=jax.value_and_grad(of_group))
  assert jnp.isfinite(updates['w']).all()
  assert jax.dtypes.issubdtype(state.key.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize(
  ('extra', 'words'),
  [
    ({'example_losses_fn': lambda p: _losses(p)[:, None]}, 'example_losses_fn must'),
    ({'example_losses_fn': _loss}, 'example_losses_fn must'),
    ({'example_losses': jnp.zeros((12, 1))}, 'example_losses must'),
    ({'example_losses': jnp.zeros(())}, 'example_losses must'),
    ({'example_losses': jnp.zeros(5)}, r'got \(5,\) beside \(12,\)'),
    ({'example_weights': jnp.ones((12, 1))}, 'example_weights must'),
    ({'example_losses_fn': jnp.zeros(12)}, 'example_losses_fn'),
  ],
)
def test_esam_names_wrong_shapes(extra, words):
  with pytest.raises(ValueError, match=words):
    _update(sam_jax.esam(), **({'example_losses_fn': _losses} | extra))


@pytest.mark.parametrize('name', ['count', 'rho'])
def test_a_name_that_others_use_too_is_found_by_whose_it_is(name):
  """The recipe of docs/methods.md."""
  tx = optax.chain(optax.inject_hyperparams(sam_jax.sam)(rho=0.05), optax.adam(0.1))
  state = _update(tx)[1]
  found = optax.tree.get(state, name, filtering=lambda path, _: 'SamState' in str(path))
  assert float(found) == pytest.approx({'count': 1, 'rho': 0.05}[name])
