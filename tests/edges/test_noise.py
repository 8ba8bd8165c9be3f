"""The noise kernel norm against dense matrices and SGD's own second moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import edges

D, B = 64, 4


def hadamard(size):
  matrix = np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.kron([[1, 1], [1, -1]], matrix)
  return matrix


def linear(w, batch):
  return batch['x'] @ w


def half_square(f, batch):
  return 0.5 * jnp.mean((f - batch['y']) ** 2)


def data(x, y=0.0):
  return {'x': jnp.asarray(x), 'y': jnp.zeros(x.shape[0]) + y}


def closed_form(theta, rate, batch_size, examples):
  values = np.linalg.eigvalsh(theta)
  return (1 / batch_size - 1 / examples) * np.sum(rate * values / (2 - rate * values))


def rate_at(norm, theta, batch_size, examples):
  low, high = 0.0, 2 / np.linalg.eigvalsh(theta).max()
  for _ in range(80):
    middle = (low + high) / 2
    below = closed_form(theta, middle, batch_size, examples) < norm
    low, high = (middle, high) if below else (low, middle)
  return low


def design():
  """Features for which each example has the same share of each eigenvector.

  The approximation behind the norm is exact for them.
  """
  return hadamard(D)[:, 1:25] * np.geomspace(1, 0.3, 24)


@pytest.mark.parametrize('norm', [0.9, 1.1])
def test_1_parts_growth_from_decay_of_the_exact_second_moment(x64, norm):
  """Each example is drawn by itself with the probability B / D."""
  x = design()
  rate = rate_at(norm, x.T @ x / D, B, D)
  found = edges.noise_kernel_norm(
    linear, half_square, jnp.zeros(24), [data(x)], learning_rate=rate, batch_size=B
  )
  np.testing.assert_allclose(found.value, norm, rtol=1e-9)
  assert found.standard_error == 0
  moment = np.eye(24)
  step = np.eye(24) - rate * x.T @ x / D
  errors = []
  for _ in range(400):
    noise = x.T * np.einsum('ia,ab,ib->i', x, moment, x) @ x
    noise *= rate**2 / B**2 * (B / D) * (1 - B / D)
    moment = step @ moment @ step + noise
    errors.append(np.trace(x @ moment @ x.T))
  assert (errors[-1] > errors[-100]) == (norm > 1)


@pytest.mark.parametrize('momentum', [0.5, 0.9])
@pytest.mark.parametrize('norm', [0.9, 1.1])
def test_1_parts_growth_from_decay_under_momentum(norm, momentum):
  """The second moment of the parameters and the velocity of heavy ball, exactly."""
  x = design()
  hessian, eye = x.T @ x / D, np.eye(24)
  values = np.linalg.eigvalsh(hessian)
  low, high = 0.0, 2 * (1 + momentum) / values.max()
  found = lambda rate: edges.noise_kernel_norm_of_spectrum(
    values, learning_rate=rate, batch_size=B, num_examples=D, momentum=momentum
  )
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if found(middle) < norm else (low, middle)
  # v = b v + H w + noise, w = w - rate v.
  step = np.block(
    [[eye - low * hessian, -low * momentum * eye], [hessian, momentum * eye]]
  )
  into = np.array([[low**2, -low], [-low, 1.0]])
  moment, errors = np.eye(48), []
  for _ in range(600):
    noise = x.T * np.einsum('ia,ab,ib->i', x, moment[:24, :24], x) @ x
    noise *= (B / D) * (1 - B / D) / B**2
    moment = step @ moment @ step.T + np.kron(into, noise)
    errors.append(np.trace(x @ moment[:24, :24] @ x.T))
  assert (errors[-1] > errors[-100]) == (norm > 1)


def test_a_spectrum_gives_the_norm_of_its_matrix(x64):
  w, batch = small_network(3)
  values = np.linalg.eigvalsh(theta_of(w, batch))
  for momentum in (0.0, 0.6):
    settings = {
      'learning_rate': 1.3 / values.max(),
      'batch_size': 5,
      'momentum': momentum,
    }
    wanted = edges.noise_kernel_norm_of_spectrum(
      values, num_examples=30, num_outputs=3, **settings
    )
    found = edges.noise_kernel_norm(network, sum_of_squares, w, [batch], **settings)
    np.testing.assert_allclose(found.value, wanted, rtol=1e-9)
  error = edges.squared_error(network, mean_of_squares, w, [batch])
  np.testing.assert_allclose(error, (3, 2 / 3))


@jax.jit
def runs_of_sgd(x, rate, start, keys):
  """The mean squared error over many runs of SGD on least squares."""

  def step(w, key):
    features = x[jax.random.randint(key, (len(w), B), 0, len(x))]
    errors = jnp.einsum('rbp,rp->rb', features, w)
    w = w - rate / B * jnp.einsum('rb,rbp->rp', errors, features)
    return w, jnp.mean((w @ x.T) ** 2)

  return jax.lax.scan(step, start, keys)[1]


def test_sgd_falls_below_1_and_diverges_above():
  """Batches of 4 of 200 examples, random features; the mean of 500 runs."""
  x = np.random.default_rng(0).normal(size=(200, 80))
  start = jax.random.normal(jax.random.key(1), (500, 80))
  keys = jax.random.split(jax.random.key(2), 300)
  growth = []
  for norm in (0.9, 1.1):
    rate = rate_at(norm, x.T @ x / 200, B, 200)
    errors = runs_of_sgd(jnp.array(x, jnp.float32), rate, start, keys)
    growth.append(float(np.mean(errors[-30:]) / np.mean(errors[20:50])))
  below, above = growth
  assert below < 0.7 and above > 1.4


def network(w, batch):
  return jnp.tanh(batch['x'] @ w['in']) @ w['out']


def small_network(outputs):
  keys = jax.random.split(jax.random.key(0), 4)
  w = {
    'in': jax.random.normal(keys[0], (5, 8)) / 2,
    'out': jax.random.normal(keys[1], (8, outputs)) / 2,
  }
  batch = {
    'x': jax.random.normal(keys[2], (30, 5)),
    'y': jax.random.normal(keys[3], (30, outputs)),
  }
  return w, batch


def rows(batch, which):
  return jax.tree.map(lambda leaf: leaf[which], batch)


def theta_of(w, batch):
  jacobian = jax.jacobian(network)(w, batch)
  rows = [np.asarray(leaf).reshape(batch['y'].size, -1) for leaf in jacobian.values()]
  rows = np.concatenate(rows, 1)
  return rows @ rows.T / len(batch['x'])


def sum_of_squares(f, batch):
  return 0.5 * jnp.sum((f - batch['y']) ** 2) / len(f)


def mean_of_squares(f, batch):
  return jnp.mean((f - batch['y']) ** 2)


def test_three_outputs_and_means_over_them_agree_with_the_dense_kernel(x64):
  w, batch = small_network(3)
  theta = theta_of(w, batch)
  batches = [rows(batch, slice(i, i + 13)) for i in (0, 13, 26)]
  rate = 1.3 / np.linalg.eigvalsh(theta).max()
  wanted = closed_form(theta, rate, 5, 30) / 3
  found = edges.noise_kernel_norm(
    network, sum_of_squares, w, batches, learning_rate=rate, batch_size=5
  )
  np.testing.assert_allclose(found.value, wanted, rtol=1e-9)
  # Of a mean over C outputs without the factor 1/2 the rate counts 2 / C times.
  found = edges.noise_kernel_norm(
    network, mean_of_squares, w, batches, learning_rate=rate * 3 / 2, batch_size=5
  )
  np.testing.assert_allclose(found.value, wanted, rtol=1e-9)


def test_the_estimate_for_large_networks_agrees_within_its_error():
  w, batch = small_network(3)
  theta = theta_of(w, batch)
  rate = 1.9 / np.linalg.eigvalsh(theta).max()
  wanted = closed_form(theta, rate, 5, 30) / 3
  found = edges.noise_kernel_norm(
    network,
    sum_of_squares,
    w,
    [batch],
    learning_rate=rate,
    batch_size=5,
    exact_up_to=0,
    num_pairs=3,
    num_probes=8,
  )
  assert 0 < found.standard_error < 0.1 * wanted
  assert abs(found.value - wanted) < 4 * found.standard_error
  assert found.num_matvecs < 400


@pytest.mark.parametrize('exact_up_to', [0, 500])
def test_the_norm_is_infinite_from_the_edge_on(exact_up_to):
  x = np.eye(8, 4, dtype=np.float32) * np.array([2.0, 1.0, 0.5, 0.1], np.float32)
  settings = {'batch_size': 2, 'exact_up_to': exact_up_to, 'num_pairs': 1}
  norm = lambda rate: edges.noise_kernel_norm(
    linear, half_square, jnp.zeros(4), [data(x)], learning_rate=rate, **settings
  )
  assert np.isfinite(norm(0.99 * 4).value)  # the largest eigenvalue is 4 / 8
  assert norm(1.01 * 4).value == np.inf
  assert norm(1.01 * 4).standard_error == 0
  assert norm(0.0).value == 0


def test_padding_has_no_part():
  w, batch = small_network(1)
  rate = 1.0 / np.linalg.eigvalsh(theta_of(w, batch)).max()
  padded = jax.tree.map(
    lambda leaf: jnp.concatenate([leaf, jnp.ones((2, *leaf.shape[1:]))]), batch
  )
  mask = jnp.arange(32) < 30

  def masked(f, batch):
    squares = 0.5 * jnp.where(batch['mask'][:, None], (f - batch['y']) ** 2, 0)
    return jnp.sum(squares) / jnp.sum(batch['mask'])

  settings = {'learning_rate': rate, 'batch_size': 5}
  found = edges.noise_kernel_norm(
    network, masked, w, [{**padded, 'mask': mask}], weight=lambda b: 30, **settings
  )
  plain = edges.noise_kernel_norm(network, sum_of_squares, w, [batch], **settings)
  np.testing.assert_allclose(found.value, plain.value, rtol=1e-4)


def cross_entropy(f, batch):
  return -jnp.mean(jax.nn.log_softmax(f)[:, 0])


def summed_over_examples(f, batch):
  return 0.5 * jnp.sum((f - batch['y']) ** 2)


def fourth_power(f, batch):
  return jnp.mean((f - batch['y']) ** 4)


@pytest.mark.parametrize(
  'loss', [cross_entropy, fourth_power, summed_over_examples, lambda f, b: jnp.mean(f)]
)
def test_other_losses_are_refused(loss):
  w, batch = small_network(3)
  halves = [rows(batch, slice(10)), rows(batch, slice(10, 30))]
  with pytest.raises(ValueError, match='not a squared error'):
    edges.noise_kernel_norm(network, loss, w, halves, learning_rate=0.1, batch_size=2)


@pytest.mark.parametrize(
  ('settings', 'sentence'),
  [
    ({'batch_size': 31}, 'batch_size=31: .* the examples, 30'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'learning_rate': -1.0}, 'learning_rate=-1.0'),
    ({'num_probes': 1}, 'num_probes=1'),
    ({'momentum': 1.0}, 'momentum=1.0'),
  ],
)
def test_arguments_out_of_range_are_refused(settings, sentence):
  w, batch = small_network(3)
  settings = {'learning_rate': 0.1, 'batch_size': 2, **settings}
  with pytest.raises(ValueError, match=sentence):
    edges.noise_kernel_norm(network, sum_of_squares, w, [batch], **settings)


def test_a_nan_among_eigenvalues_is_refused():
  """It is no eigenvalue beyond the edge, of which K would be infinite."""
  with pytest.raises(ValueError, match='NaN is among them'):
    edges.noise_kernel_norm_of_spectrum(
      [1.0, np.nan], learning_rate=0.1, batch_size=1, num_examples=4
    )
