"""What the stochastic estimates promise, counted over many keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import curvature

_NUM_KEYS = 100


def _diagonal_spectrum():
  """A network's: many zeros, a bulk, a few outliers."""
  rng = np.random.default_rng(0)
  bulk = rng.exponential(0.3, 115)
  return np.r_[np.zeros(80), bulk, [30.0, 25.0, 12.0, 8.0, -2.0]]


def _random_matrix():
  matrix = np.random.default_rng(1).normal(size=(200, 200))
  return (matrix + matrix.T) / np.sqrt(400)


def _network_hessian():
  """The Hessian of a tiny network, (163, 163), as a dense matrix."""
  rng = np.random.default_rng(2)
  shapes = [(8, 10), (10,), (10, 6), (6,), (6, 1), (1,)]
  sizes = np.cumsum([np.prod(shape) for shape in shapes])
  x, y = rng.normal(size=(60, 8)), rng.normal(size=(60, 1))

  def loss(flat):
    parts = jnp.split(flat, sizes[:-1])
    layers = [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]
    hidden = x
    for kernel, bias in zip(layers[::2], layers[1::2], strict=True):
      hidden = jnp.tanh(hidden) @ kernel + bias[None]
    return jnp.mean((hidden - y) ** 2)

  return np.asarray(jax.jit(jax.hessian(loss))(rng.normal(size=sizes[-1]) * 0.5))


_MATRICES = {
  'diagonal': lambda: np.diag(_diagonal_spectrum()),
  'random': _random_matrix,
  'network': _network_hessian,
}


@pytest.fixture(params=_MATRICES)
def problem(request, x64):
  """An operator and its spectrum."""
  matrix = _MATRICES[request.param]()
  values = np.linalg.eigvalsh(matrix)
  device = jnp.asarray(matrix)
  return curvature.operator(lambda v: device @ v, jnp.zeros(len(matrix))), values


def _smoothed(values, grid, sigma):
  kernels = np.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2)
  return kernels.mean(1) / (sigma * np.sqrt(2 * np.pi))


def _scores(estimates, truth):
  return np.array([abs(e.value - truth) / e.standard_error for e in estimates])


@pytest.mark.slow
def test_traces_and_norms_are_within_three_standard_errors(problem):
  operator, values = problem
  keys = [jax.random.key(i) for i in range(_NUM_KEYS)]
  traces = [curvature.trace(operator, 20, key=key) for key in keys]
  assert (_scores(traces, values.sum()) <= 3).sum() >= 95
  pairs = curvature.eigenpairs(operator, 4, tol=1e-6)
  for estimator, truth in (
    (curvature.trace, values.sum()),
    (curvature.squared_frobenius_norm, (values**2).sum()),
  ):
    found = [estimator(operator, 12, key=key, pairs=pairs) for key in keys]
    assert (_scores(found, truth) <= 3).sum() >= 95


@pytest.mark.slow
@pytest.mark.parametrize('num_probes', [1, 4])
def test_the_band_of_the_density_covers_the_truth(problem, num_probes):
  operator, values = problem
  points = np.quantile(values, np.linspace(0.02, 0.98, 20))
  covered, hits = [], np.zeros(len(points))
  for index in range(_NUM_KEYS):
    result = curvature.spectral_density(
      operator, 24, num_probes, key=jax.random.key(index)
    )
    truth = _smoothed(values, result.grid, result.sigma)
    inside = (result.lower <= truth) & (truth <= result.upper)
    covered.append(inside.mean())
    hits += inside[np.searchsorted(result.grid, points)]
  assert np.mean(covered) >= 0.9
  assert np.mean(hits) >= 90
  assert np.min(hits) >= 80  # each is a count of 100 with a standard deviation of 3


def _distance(result, values):
  """Wasserstein-1 distance of the estimated spectrum from the true one."""
  nodes = np.concatenate([result.outliers, result.nodes.ravel(), values])
  weights = np.concatenate(
    [
      np.full(len(result.outliers), 1 / result.size),
      result.weights.ravel() / len(result.nodes),
      np.full(len(values), -1 / len(values)),
    ]
  )
  order = np.argsort(nodes)
  difference = np.cumsum(weights[order])[:-1]
  return np.abs(difference) @ np.diff(nodes[order])


@pytest.mark.parametrize('shape', ['uniform', 'exponential'])
def test_the_density_nears_the_spectrum_as_its_range_over_the_steps(x64, shape):
  uniform = (np.arange(4000) + 0.5) / 4000
  values = uniform if shape == 'uniform' else -np.log(uniform)
  device = jnp.asarray(values)
  operator = curvature.operator(lambda v: device * v, device)
  steps = np.array([10, 20, 40, 80])
  distances = np.array(
    [
      _distance(
        curvature.spectral_density(operator, m, 6, key=jax.random.key(1)), values
      )
      for m in steps
    ]
  )
  assert (distances * steps / np.ptp(values) <= 1).all()
  slope = np.polyfit(np.log(steps), np.log(distances), 1)[0]
  assert slope < -0.7
