"""The central flow: its conditions, closed forms, and gradient descent's averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import edges


def test_one_eigenvalue_has_a_closed_form():
  for curved, slope in ((2.0, -3.0), (2.0, 3.0), (1e-6, -1.0), (5.0, 0.0)):
    found = edges.solve_complementarity(
      np.full((1, 1, 1, 1), curved), np.array([[slope]])
    )
    np.testing.assert_allclose(found, [[max(0.0, -slope / curved)]], rtol=1e-9)


@pytest.mark.parametrize('seed', range(8))
def test_the_conditions_hold(seed):
  """Of a random positive definite operator such as the flow meets."""
  rng = np.random.default_rng(seed)
  size = 2 + seed % 3
  slopes = rng.normal(size=(size, size, 40))
  slopes = slopes + slopes.transpose(1, 0, 2)
  quadratic = np.einsum('ija,kla->ijkl', slopes, slopes)
  linear = rng.normal(size=(size, size)) * 10.0 ** rng.integers(-3, 4)
  linear = linear + linear.T - np.diag(np.arange(1, size + 1)) * abs(linear).max()
  x = edges.solve_complementarity(quadratic, linear)
  y = np.einsum('ijkl,kl->ij', quadratic, x) + linear
  scale = abs(linear).max()
  assert np.linalg.norm(x) > 0
  np.testing.assert_allclose(x, x.T, rtol=1e-12)
  assert np.linalg.eigvalsh(x).min() >= -1e-12 * abs(x).max()
  assert np.linalg.eigvalsh(y).min() >= -1e-8 * scale
  assert abs(np.sum(x * y)) <= 1e-8 * scale * np.linalg.norm(x)


def test_a_problem_without_a_solution_is_an_error():
  with pytest.raises(ArithmeticError, match='2 eigenvalues'):
    edges.solve_complementarity(np.zeros((2, 2, 2, 2)), -np.eye(2))
  with pytest.raises(FloatingPointError):
    edges.solve_complementarity(np.full((1, 1, 1, 1), np.nan), -np.eye(1))


def scalar_product(w, _):
  return 0.25 * (w[0] * w[1] - 1) ** 2 + 0.1 * (w[2] - w[0]) ** 2


START = jnp.array([1.7, 0.0, 2.1])


def sharpness(w):
  return jnp.linalg.eigvalsh(jax.hessian(scalar_product)(w, 0))[-1]


def test_the_variance_at_the_edge_is_that_of_the_closed_form(x64):
  r"""sigma^2 = -2 <grad L, grad lambda> / |grad lambda|^2, in an Euler step's limit."""
  flow = edges.central_flow(
    scalar_product, START, jnp.zeros(()), 1.0, [12], substeps=64
  )
  (state,) = flow
  np.testing.assert_allclose(state.eigenvalues[0], 2.0, rtol=1e-3)
  slope = jax.grad(scalar_product)(state.params, 0)
  steepening = jax.grad(sharpness)(state.params)
  wanted = -2 * slope @ steepening / (steepening @ steepening)
  assert wanted > 0
  np.testing.assert_allclose(state.covariance, [[wanted]], rtol=0.05)
  loss = scalar_product(state.params, 0)
  np.testing.assert_allclose(
    state.predicted_loss, loss + state.eigenvalues[0] * state.covariance[0, 0] / 2
  )


def test_below_the_edge_it_is_gradient_flow(x64):
  settings = scalar_product, START, jnp.zeros(())
  (flow,) = edges.gradient_flow(*settings, [1.5])
  ends = []
  for substeps in (20, 40):
    (central,) = edges.central_flow(*settings, 0.3, [5], substeps=substeps)
    assert central.covariance.shape == (0, 0)
    assert central.loss == central.predicted_loss
    ends.append(np.linalg.norm(central.params - flow.params))
  assert ends[1] < 0.01 and ends[1] < 0.6 * ends[0]  # Euler steps are of order 1.


def two_products(w, _):
  return scalar_product(w[0], _) + scalar_product(w[1], _)


def test_two_eigenvalues_at_the_edge_are_held_each_by_its_own_variance(x64):
  """Of two problems that share nothing each has the central flow that it has alone."""
  starts = jnp.stack([START, START + jnp.array([0.1, 0.0, 0.02])])
  settings = jnp.zeros(()), 1.0, [8]
  (both,) = edges.central_flow(two_products, starts, *settings, num_eigenvalues=1)
  assert len(both.eigenvalues) >= 3 and both.covariance.shape == (2, 2)
  variances = []
  for index in range(2):
    (alone,) = edges.central_flow(scalar_product, starts[index], *settings)
    np.testing.assert_allclose(both.params[index], alone.params, atol=1e-6)
    variances.append(alone.covariance[0, 0])
  assert min(variances) > 0
  found = np.linalg.eigvalsh(both.covariance)
  np.testing.assert_allclose(found, sorted(variances), rtol=1e-4)


@pytest.fixture(scope='module')
def network():
  """A small network as one vector, its data, and 600 steps of gradient descent."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    width, count = 12, 20
    w = {
      'a': rng.normal(size=(2, width)),
      'b': np.zeros(width),
      'c': rng.normal(size=(width, width)) / width**0.5,
      'd': np.zeros(width),
      'e': rng.normal(size=(width, 1)) / width**0.5,
    }
    x = rng.normal(size=(count, 2))
    y = np.sin(2 * x[:, 0]) * np.cos(x[:, 1]) + 0.3 * rng.normal(size=count)
    start, unravel = ravel_pytree(jax.tree.map(jnp.array, w))

    def loss(flat, batch):
      w = unravel(flat)
      h = jnp.tanh(batch['x'] @ w['a'] + w['b'][None])
      h = jnp.tanh(h @ w['c'] + w['d'][None])
      return 0.5 * jnp.mean(((h @ w['e'])[:, 0] - batch['y']) ** 2)

    yield loss, start, {'x': jnp.array(x), 'y': jnp.array(y)}


def test_loss_and_sharpness_follow_the_time_average_of_gradient_descent(network):
  loss, start, batch = network
  rate, steps, half = 0.3, [450, 550], 40
  with jax.enable_x64(True):

    def descend(w, _):
      value, slope = jax.value_and_grad(loss)(w, batch)
      return w - rate * slope, (value, w)

    _, (losses, path) = jax.lax.scan(descend, start, length=600)
    top = lambda w: jnp.linalg.eigvalsh(jax.hessian(loss)(w, batch))[-1]
    flow = edges.central_flow(loss, start, batch, rate, steps, substeps=2)
    for state in flow:
      window = slice(state.step - half, state.step + half)
      average = path[window].mean(0)
      np.testing.assert_allclose(state.eigenvalues[0], 2 / rate, rtol=1e-5)
      np.testing.assert_allclose(top(average), state.eigenvalues[0], rtol=0.02)
      np.testing.assert_allclose(losses[window].mean(), state.predicted_loss, rtol=0.06)
      # Without the oscillation's share the loss would be a fifth too low.
      assert losses[window].mean() > 1.15 * state.loss
      moved = np.linalg.norm(average - start)
      assert np.linalg.norm(state.params - average) < 0.1 * moved


def test_a_state_goes_on_bit_for_bit():
  settings = jnp.zeros(()), 1.0
  options = {'num_eigenvalues': 1}
  follow = lambda start, steps: edges.central_flow(
    two_products, start, *settings, steps, **options
  )
  start = jnp.stack([START, START + jnp.array([0.1, 0.0, 0.02])])
  first, whole = follow(start, [5, 8])
  assert len(first.eigenvalues) > 1  # The number that it has grown to is kept.
  assert len(first.covariance)
  (rest,) = follow(first, [8])
  jax.tree.map(np.testing.assert_array_equal, rest, whole)
  with pytest.raises(ValueError, match='at step 5 already'):
    follow(first, [4])


@pytest.mark.parametrize(
  ('settings', 'sentence'),
  [
    ({'learning_rate': 0.0}, r'learning_rate=0\.0'),
    ({'substeps': 1}, 'substeps=1'),
    ({'critical': 1.5}, r'critical=1\.5'),
    ({'steps': [3, 2]}, r'steps=\[3, 2\]'),
    ({'steps': [1.5]}, r'steps=\[1.5\]: give whole numbers'),
  ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
  settings = {'learning_rate': 0.1, 'steps': [1], **settings}
  with pytest.raises(ValueError, match=sentence):
    edges.central_flow(scalar_product, START, jnp.zeros(()), **settings)


def test_a_loss_that_is_not_finite_is_an_error():
  flow = edges.central_flow(scalar_product, START * jnp.nan, jnp.zeros(()), 0.1, [1])
  with pytest.raises(FloatingPointError):
    next(flow)
