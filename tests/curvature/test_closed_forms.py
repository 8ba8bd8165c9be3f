"""Hessians that are known: closed forms, prescribed spectra, whole networks dense."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from models import GCN, Attention, Conv
from sam_jax import curvature

pytestmark = pytest.mark.usefixtures('x64')


def _parts(data, *bounds):
  """Data cut into batches at some places."""
  slices = [slice(i, j) for i, j in zip((0, *bounds), (*bounds, None), strict=True)]
  return [jax.tree.map(lambda a, s=s: a[s], data) for s in slices]


def _assert_ends(operator, values, k):
  """Eigenpairs at both ends, to 1e-6 of the largest |theta|."""
  result = curvature.eigenpairs(operator, k, tol=1e-7)
  values = np.sort(values)[::-1]
  np.testing.assert_allclose(
    result.eigenvalues,
    np.r_[values[:k], values[-k:]],
    atol=1e-6 * np.abs(values).max(),
  )
  assert result.converged.all() and result.verified


def test_linear_regression_is_the_second_moment_of_the_inputs():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(50, 8)), rng.normal(size=50)
  loss = lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)
  operator = curvature.hessian(loss, rng.normal(size=8), _parts((x, y), 20, 23))
  _assert_ends(operator, np.linalg.eigvalsh(x.T @ x / 50), 3)


def test_softmax_regression_is_a_sum_of_kronecker_products():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(30, 5)), rng.integers(0, 4, 30)
  w = rng.normal(size=(5, 4))

  def loss(w, batch):
    log_probs = jax.nn.log_softmax(batch[0] @ w)
    return -jnp.mean(jnp.take_along_axis(log_probs, batch[1][:, None], axis=1))

  logits = x @ w
  probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  expected = sum(
    np.kron(np.outer(row, row), np.diag(p) - np.outer(p, p))
    for row, p in zip(x, probs, strict=True)
  )
  operator = curvature.hessian(loss, w, _parts((x, y), 11))
  columns = [operator.matvec(e.reshape(5, 4)).ravel() for e in np.eye(20)]
  np.testing.assert_allclose(np.stack(columns), expected / 30, atol=1e-14)
  _assert_ends(operator, np.linalg.eigvalsh(expected / 30), 4)


_RNG = np.random.default_rng(2)


@pytest.mark.parametrize(
  'values',
  [
    pytest.param(np.r_[[7.0] * 4, [-3.0] * 3, _RNG.uniform(-1, 1, 53)], id='repeated'),
    pytest.param(np.r_[5 + 1e-3 * np.arange(6), -2 * np.ones(54)], id='clustered'),
    pytest.param(-np.geomspace(1e-3, 10, 60), id='negative'),
    pytest.param(np.r_[np.zeros(50), _RNG.uniform(0, 2, 10)], id='mostly-zero'),
    pytest.param(np.zeros(60), id='zero'),
  ],
)
def test_quadratics_with_prescribed_spectra(values):
  rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(60, 60)))[0]
  matrix = (rotation * values) @ rotation.T
  # A third and two thirds of the examples, whose mean is the matrix.
  shift = np.diag(np.arange(60.0))
  batches = [np.stack([matrix + 2 * shift]), np.stack([matrix - shift] * 2)]

  def loss(params, batch):
    w = jnp.concatenate([params['a'].ravel(), params['b']])
    return 0.5 * jnp.mean(jnp.einsum('nij,i,j->n', batch, w, w))

  rng = np.random.default_rng(4)
  params = {'a': rng.normal(size=(10, 4)), 'b': rng.normal(size=20)}
  _assert_ends(curvature.hessian(loss, params, batches), values, 4)


def _cross_entropy(apply):
  """The loss of a network given by its logits, ``apply(params, inputs)``."""

  def loss(params, batch):
    log_probs = jax.nn.log_softmax(apply(params, batch[0]))
    return -jnp.mean(jnp.take_along_axis(log_probs, batch[1][:, None], axis=1))

  return loss


def _attention():
  """Softmax attention and layer normalization."""
  model = Attention(num_classes=3, features=4, hidden_features=4, head_features=(5,))
  rng = np.random.default_rng(5)
  data = rng.uniform(size=(7, 5)), rng.integers(0, 3, 7)
  params = jax.jit(model.init)(jax.random.key(0), data[0])['params']
  return params, lambda p, x: model.apply({'params': p}, x), _parts(data, 4)


def _graphs(sizes, seed):
  """Random graphs, their edges sorted by receiver."""
  rng = np.random.default_rng(seed)
  n_node, n_edge = np.array(sizes).T
  first = np.repeat(np.cumsum(n_node) - n_node, n_edge)
  ends = rng.integers(0, np.repeat(n_node, n_edge), size=(2, n_edge.sum())) + first
  order = np.argsort(ends[1], kind='stable')
  return jraph.GraphsTuple(
    nodes=rng.normal(size=(n_node.sum(), 3)),
    edges=None,
    senders=ends[0][order],
    receivers=ends[1][order],
    n_node=n_node,
    n_edge=n_edge,
    globals=None,
  )


def _gcn():
  """Sums over neighbours and means over graphs, in batches of unlike shapes."""
  model = GCN(num_classes=2, features=(4, 4, 3), hidden_features=4)
  batches = [
    (_graphs([(4, 9), (2, 3), (5, 8)], 0), np.array([0, 1, 0])),
    (_graphs([(3, 5), (6, 11)], 1), np.array([1, 0])),
  ]
  params = jax.jit(model.init)(jax.random.key(1), batches[0][0])['params']
  return params, lambda p, x: model.apply({'params': p}, x), batches


class _Convolutions(nn.Module):
  """Two strided convolutions, each with batch normalization."""

  @nn.compact
  def __call__(self, x, *, train):
    for features in (3, 4):
      x = Conv(features, stride=2)(x)
      x = nn.softplus(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(2)(x.mean((1, 2)))


def _convolutions(train):
  model = _Convolutions()
  rng = np.random.default_rng(6)
  data = rng.normal(size=(7, 6, 5, 2)), rng.integers(0, 2, 7)
  init = jax.jit(model.init, static_argnames='train')
  variables = init(jax.random.key(2), data[0], train=False)
  # Not the 0 and 1 of the start, which would say little.
  stats = jax.tree.map(lambda s: 0.7 * s + 0.2, variables['batch_stats'])

  def apply(params, inputs):
    every = {'params': params, 'batch_stats': stats}
    return model.apply(every, inputs, train=train, mutable=['batch_stats'])[0]

  return variables['params'], apply, _parts(data, 4)


@pytest.mark.parametrize(
  'network',
  [
    pytest.param(_attention, id='attention', marks=pytest.mark.slow),
    pytest.param(_gcn, id='gcn', marks=pytest.mark.slow),
    pytest.param(lambda: _convolutions(False), id='batch-norm-eval'),
    pytest.param(
      lambda: _convolutions(True), id='batch-norm-train', marks=pytest.mark.slow
    ),
  ],
)
def test_networks_equal_their_dense_hessian(network):
  params, apply, batches = network()
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  loss = _cross_entropy(apply)
  flat, unravel = ravel_pytree(params)
  counts = [len(labels) for _, labels in batches]

  def whole(w):
    parts = zip(batches, counts, strict=True)
    return sum(count * loss(unravel(w), batch) for batch, count in parts) / sum(counts)

  values = np.linalg.eigvalsh(jax.jit(jax.hessian(whole))(flat))
  operator = curvature.hessian(
    loss, params, batches, weight=lambda batch: len(batch[1])
  )
  _assert_ends(operator, values, 3)
