"""Gauss-Newton and the empirical Fisher matrix against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import curvature

pytestmark = pytest.mark.usefixtures('x64')


def _params():
  rng = np.random.default_rng(0)
  return {
    'in': {'kernel': jnp.asarray(rng.normal(size=(3, 4))), 'bias': jnp.ones(4)},
    'out': jnp.asarray(rng.normal(size=(4, 3))),
  }


def _network(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['in']['kernel'] + params['in']['bias'][None])
  return {'logits': hidden @ params['out']}


def _losses(outputs, batch):
  log_probs = jax.nn.log_softmax(outputs['logits'])
  return -jnp.take_along_axis(log_probs, batch['y'][:, None], axis=1)[:, 0]


def _mean_loss(outputs, batch):
  return jnp.mean(_losses(outputs, batch))


def _squares(outputs, batch):
  return 0.5 * jnp.mean((outputs['logits'] - batch['target']) ** 2)


def _data(count, seed=1):
  rng = np.random.default_rng(seed)
  return {
    'x': jnp.asarray(rng.normal(size=(count, 3))),
    'y': jnp.asarray(rng.integers(0, 3, count)),
  }


def _parts(data, *bounds):
  return [
    jax.tree.map(lambda a, i=i, j=j: a[i:j], data)
    for i, j in zip((0, *bounds), (*bounds, len(data['x'])), strict=True)
  ]


def _columns(operator, params):
  flat, unravel = ravel_pytree(params)
  columns = [operator.matvec(unravel(row)) for row in jnp.eye(flat.size)]
  return np.stack([ravel_pytree(column)[0] for column in columns])


def _dense_hessian(loss, params):
  flat, unravel = ravel_pytree(params)
  return np.asarray(jax.hessian(lambda w: loss(unravel(w)))(flat))


def _dense_jacobian(function, params):
  flat, unravel = ravel_pytree(params)
  return np.asarray(jax.jacobian(lambda w: function(unravel(w)))(flat))


@pytest.mark.parametrize(
  'room',
  [
    pytest.param(2.0, marks=pytest.mark.slow),
    pytest.param(0.0, marks=pytest.mark.slow),
  ],
)
def test_gauss_newton_is_j_transposed_h_j_over_batches_of_any_size(room):
  params, data = _params(), _data(9)
  operator = curvature.gauss_newton(
    _network, _mean_loss, params, _parts(data, 4, 6), max_cache_gib=room
  )
  jacobian = _dense_jacobian(lambda p: _network(p, data)['logits'], params)
  probs = np.asarray(jax.nn.softmax(_network(params, data)['logits']))
  # The Hessian of softmax cross-entropy by one example's logits, diag(p) - p p^T.
  blocks = np.einsum('nc,cd->ncd', probs, np.eye(3)) - np.einsum(
    'nc,nd->ncd', probs, probs
  )
  expected = np.einsum('ncp,ncd,ndq->pq', jacobian, blocks, jacobian) / 9
  matrix = _columns(operator, params)
  np.testing.assert_allclose(matrix, expected, atol=1e-13)
  assert operator.num_examples == 9
  values = np.linalg.eigvalsh(matrix)
  assert values.min() > -1e-14
  dense = _dense_hessian(lambda p: _mean_loss(_network(p, data), data), params)
  assert np.linalg.eigvalsh(dense).min() < -1e-3  # which the Hessian is not


def test_gauss_newton_is_the_fisher_matrix_of_the_models_own_labels():
  params, data = _params(), _data(7)
  expected = 0
  for index in range(7):
    one = jax.tree.map(lambda a, i=index: a[i : i + 1], data)
    probs = jax.nn.softmax(_network(params, one)['logits'])[0]
    for label in range(3):
      labelled = {**one, 'y': jnp.array([label])}
      gradient = _dense_jacobian(
        lambda p, b=labelled: _mean_loss(_network(p, b), b), params
      )
      expected = expected + probs[label] * np.outer(gradient, gradient) / 7
  operator = curvature.gauss_newton(_network, _mean_loss, params, [data])
  np.testing.assert_allclose(_columns(operator, params), expected, atol=1e-13)


def test_gauss_newton_is_the_hessian_of_a_linear_model():
  params, data = (
    {'out': jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)))},
    _data(8),
  )
  linear = lambda params, batch: {'logits': batch['x'] @ params['out']}
  loss = lambda params, batch: _mean_loss(linear(params, batch), batch)
  operator = curvature.gauss_newton(linear, _mean_loss, params, _parts(data, 5))
  hessian = curvature.hessian(loss, params, _parts(data, 5))
  np.testing.assert_allclose(
    _columns(operator, params), _columns(hessian, params), atol=1e-14
  )


def test_gauss_newton_is_the_hessian_where_all_squared_errors_are_0():
  params, data = _params(), _data(6)
  data['target'] = _network(params, data)['logits']
  loss = lambda params, batch: _squares(_network(params, batch), batch)
  operator = curvature.gauss_newton(_network, _squares, params, [data])
  matrix = _columns(operator, params)
  np.testing.assert_allclose(
    matrix, _dense_hessian(lambda p: loss(p, data), params), atol=1e-13
  )
  data['target'] = data['target'] + 1.0
  moved = curvature.gauss_newton(_network, _squares, params, [data])
  np.testing.assert_allclose(_columns(moved, params), matrix, atol=1e-14)
  dense = _dense_hessian(lambda p: loss(p, data), params)
  assert np.abs(dense - matrix).max() > 1e-2


def _weighted_losses(params, batch):
  return batch['weights'] * _losses(_network(params, batch), batch)


@pytest.mark.parametrize('room', [2.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_empirical_fisher_is_the_mean_outer_product_of_gradients(room):
  params, data = _params(), _data(9)
  data['weights'] = jnp.array([1.0, 1, 1, 1, 0, 1, 1, 0, 0])
  operator = curvature.empirical_fisher(
    _weighted_losses,
    params,
    _parts(data, 5, 7),
    weight=lambda batch: float(batch['weights'].sum()),
    max_cache_gib=room,
  )
  gradients = _dense_jacobian(lambda p: _losses(_network(p, data), data), params)
  real = gradients[np.asarray(data['weights']) > 0]
  assert operator.num_examples == len(real) == 6
  np.testing.assert_allclose(_columns(operator, params), real.T @ real / 6, atol=1e-13)


def test_a_mean_loss_is_no_loss_an_example():
  params, data = _params(), _data(2)
  operator = curvature.empirical_fisher(
    lambda p, batch: _mean_loss(_network(p, batch), batch), params, [data]
  )
  with pytest.raises(ValueError, match=r'shape \(\): give one loss'):
    operator.matvec(params)


def test_equal_functions_are_compiled_once():
  params, traces = _params(), []

  def network(params, batch):
    traces.append(1)
    return _network(params, batch)

  for _ in range(2):
    operator = curvature.gauss_newton(network, _mean_loss, params, [_data(4)])
    operator.matvec(params)
    counted = len(traces)
    operator.matvec(params)
    assert len(traces) == counted
  repeated = curvature.gauss_newton(network, _mean_loss, params, [_data(4)])
  repeated.matvec(params)
  assert len(traces) == counted
