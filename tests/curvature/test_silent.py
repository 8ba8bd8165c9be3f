"""Operators that broke a solver without a word: repeated spectra, types, asymmetry."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sam_jax.landscape
from sam_jax import curvature

_SIZE = 60  # one size, so that little is compiled


@functools.cache
def _rotation(size):
  return np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]


def _operator(values, dtype=np.float32):
  """A dense symmetric operator with these eigenvalues."""
  q = _rotation(len(values))
  matrix = jnp.asarray(q * values @ q.T, dtype)
  product = lambda v: jnp.matmul(matrix, v, precision='highest')
  return curvature.operator(product, jnp.zeros(len(values), dtype))


def _mass(result, value, tol=1e-3):
  """What the density puts at an eigenvalue, for each probe."""
  placed = (np.abs(result.outliers - value) < tol).sum() / result.size
  at = np.abs(result.nodes - value) < tol
  return placed + (result.weights * at).sum(1)


def _mass_error(count, size, num_probes):
  """Standard deviation of a random unit vector's part in some dimensions; beta."""
  return np.sqrt(2 * count * (size - count) / (size**2 * (size + 2)) / num_probes)


@st.composite
def _spectra(draw):
  """Eigenvalues, at least .5 apart, with multiplicities that add up to the size."""
  distinct = draw(st.lists(st.integers(-6, 20), min_size=1, max_size=5, unique=True))
  cuts = st.lists(st.integers(1, _SIZE - 1), min_size=len(distinct) - 1,
                  max_size=len(distinct) - 1, unique=True)  # fmt: skip
  counts = np.diff([0, *sorted(draw(cuts)), _SIZE])
  return np.array(distinct) / 2, counts


@given(_spectra(), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_a_density_of_few_distinct_eigenvalues_is_that_of_the_spectrum(
  spectrum, num_probes, seed
):
  distinct, counts = spectrum
  values = np.repeat(distinct, counts)
  result = curvature.spectral_density(
    _operator(values), 10, num_probes, key=jax.random.key(seed)
  )
  assert np.trapezoid(result.density, result.grid) == pytest.approx(1, abs=1e-3)
  assert np.isfinite(result.upper).all()
  assert (result.lower <= result.density).all()
  assert (result.density <= result.upper).all()
  for value, count in zip(distinct, counts, strict=True):
    # No more copies are placed than there are, and the probes weigh the others.
    assert (np.abs(result.outliers - value) < 1e-3).sum() <= count
    error = 6 * _mass_error(count, _SIZE, num_probes)
    assert _mass(result, value).mean() == pytest.approx(count / _SIZE, abs=error + 1e-5)
  for power in (1, 2):
    powers = values**power
    error = _SIZE * np.sqrt(2 / (_SIZE + 2) * powers.var() / num_probes)
    rounding = 1e-4 * np.abs(powers).max() * _SIZE
    found = result.moment(power).value
    assert found == pytest.approx(powers.sum(), abs=6 * error + rounding)


@pytest.mark.parametrize('num_probes', [1, 2])
@pytest.mark.parametrize(
  'counts',
  [
    pytest.param({1: 20, 2: 20, 5: 20}, id='three-of-20'),
    pytest.param({0: 50, 2: 8, 7: 2}, id='repeated-outliers'),
    pytest.param({0: 14, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}, id='six-examples'),
  ],
)
def test_weights_of_repeated_eigenvalues_are_unbiased(counts, num_probes):
  """Over many keys; a single run could be right by chance."""
  values = np.repeat(list(counts), list(counts.values())).astype(float)
  operator = _operator(values)
  results = [
    curvature.spectral_density(operator, 10, num_probes, key=jax.random.key(seed))
    for seed in range(40)
  ]
  for value, count in counts.items():
    found = np.mean([_mass(result, value).mean() for result in results])
    error = 4 * _mass_error(count, len(values), 40 * num_probes)
    assert found == pytest.approx(count / len(values), abs=error + 1e-5)


@pytest.mark.parametrize('size', [1, 2, 20])
@pytest.mark.parametrize('value', [0.0, 3.0, -1e6, 1e-12])
@pytest.mark.parametrize('num_probes', [1, 3])
def test_a_density_of_one_eigenvalue_is_one_kernel(size, value, num_probes):
  operator = curvature.operator(lambda v: value * v, jnp.zeros(size))
  result = curvature.spectral_density(operator, 5, num_probes)
  kernel = np.exp(-0.5 * ((result.grid - value) / result.sigma) ** 2)
  kernel /= result.sigma * np.sqrt(2 * np.pi)
  np.testing.assert_allclose(result.density, kernel, atol=1e-3 * kernel.max())
  assert np.trapezoid(result.density, result.grid) == pytest.approx(1, abs=1e-3)
  for power in (1, 2):
    found = result.moment(power)
    assert found.value == pytest.approx(size * value**power, rel=1e-5)


def test_a_density_of_a_regression_with_fewer_examples_than_weights():
  """Rank 6 of 20, and the Fisher matrix of 8 examples, against dense spectra."""
  x = np.random.default_rng(0).normal(size=(6, 20))
  y = jnp.zeros(6)
  loss = lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)
  operator = curvature.hessian(loss, jnp.ones(20), [(jnp.asarray(x, jnp.float32), y)])
  z = np.random.default_rng(1).normal(size=(8, 20))
  losses = lambda w, batch: jnp.sin(batch @ w)
  fisher = curvature.empirical_fisher(
    losses, jnp.zeros(20), [jnp.asarray(z, jnp.float32)]
  )
  for op, dense in ((operator, x.T @ x / 6), (fisher, z.T @ z / 8)):
    for num_probes, seed in itertools.product((1, 4), range(5)):
      result = curvature.spectral_density(op, 30, num_probes, key=jax.random.key(seed))
      assert np.trapezoid(result.density, result.grid) == pytest.approx(1, abs=1e-3)
      # The single eigenvalues and the zeros are resolved entirely.
      assert result.moment(1).value == pytest.approx(np.trace(dense), rel=1e-4)
      assert result.moment(2).value == pytest.approx((dense**2).sum(), rel=1e-4)


def test_a_kernel_that_no_grid_can_show_is_named():
  operator = _operator(np.linspace(-1, 1, _SIZE))
  with pytest.raises(ValueError, match='sigma=1e-09: no grid .* give at least'):
    curvature.spectral_density(operator, 5, 1, sigma=1e-9)


def test_moments_of_a_density_that_known_pairs_make_complete(x64):
  values = np.array([4.0, 3.0, 3.0, -1.0])
  operator = curvature.operator(lambda v: jnp.asarray(values) * v, jnp.zeros(4))
  pairs = curvature.eigenpairs(operator, 2, tol=1e-10)
  result = curvature.spectral_density(operator, 4, 2, pairs=pairs)
  assert result.moment(2).value == pytest.approx(35, rel=1e-10)
  assert result.moment(2).standard_error == 0
  assert np.trapezoid(result.density, result.grid) == pytest.approx(1, abs=1e-3)


_SEPARATED = np.r_[9.0, 7.0, -6.0, np.linspace(-1, 1, _SIZE - 3)]


def test_float32_parameters_where_float64_is_enabled(x64):
  operator = _operator(_SEPARATED)
  # A small basis, so that it restarts.
  pairs = curvature.eigenpairs(operator, 2, max_basis_size=14, tol=1e-5)
  np.testing.assert_allclose(pairs.eigenvalues, [9, 7, -1, -6], atol=1e-4)
  assert pairs.converged.all() and pairs.verified
  warm = curvature.eigenpairs(operator, 2, start=pairs, tol=1e-3)
  np.testing.assert_allclose(warm.eigenvalues, pairs.eigenvalues, atol=1e-4)
  density = curvature.spectral_density(operator, 12, 2)
  estimates = [
    density.moment(1),
    curvature.trace(operator, 40),
    curvature.trace(operator, 20, pairs=pairs),
    curvature.diagonal(operator, 20).leaf_traces[''],
  ]
  for estimate in estimates:
    assert abs(estimate.value - _SEPARATED.sum()) < 4 * estimate.standard_error
  result = jax.jit(lambda: curvature.tridiagonalize(operator.matvec, 3, jnp.ones(60)))()
  assert result.size.dtype == jnp.int32
  for vector in (pairs.eigenvectors[0], curvature.diagonal(operator, 2).value):
    assert vector.dtype == jnp.float32


def test_a_landscape_of_float32_parameters_where_float64_is_enabled(x64):
  params = jnp.ones(2, jnp.float32)
  loss = lambda w, x: jnp.mean(x * jnp.array([[3, -1.5]]) * w[None] ** 2)
  directions = sam_jax.landscape.random_directions(
    jax.random.key(0), params, include_vectors=True
  )
  ratio = sam_jax.landscape.eigen_ratio(
    loss, params, directions, [0.0], [0.0], [jnp.ones((4, 2), jnp.float64)]
  )
  assert ratio.loss.item() == pytest.approx(0.5, rel=1e-4)


def _of_matrix(matrix, dtype=np.float32):
  matrix = jnp.asarray(matrix, dtype)
  product = lambda v: jnp.matmul(matrix, v, precision='highest')
  return curvature.operator(product, jnp.zeros(len(matrix), dtype))


def _asymmetric(kind):
  random = np.random.default_rng(3).normal(size=(_SIZE, _SIZE))
  if kind == 'antisymmetric-part':
    return random + random.T + 0.2 * (random - random.T)
  if kind == 'triangular':
    return np.triu(random)
  matrix = np.diag(np.linspace(0, 1, _SIZE))
  matrix[0, 1] = 0.5
  return matrix


_ASYMMETRIC = ['antisymmetric-part', 'triangular', 'one-entry']


@pytest.mark.parametrize('kind', _ASYMMETRIC)
def test_an_operator_that_is_not_symmetric_is_refused(kind):
  operator = _of_matrix(_asymmetric(kind))
  for solve in (
    lambda: curvature.eigenpairs(operator, 2),
    lambda: curvature.eigenpairs(operator, 2, max_num_matvecs=9),
    lambda: curvature.spectral_density(operator, 10, 1),
    lambda: curvature.spectral_density(operator, 5, 1),
  ):
    before = operator.num_matvecs
    with pytest.raises(ValueError, match='not symmetric: .* check_symmetry=False'):
      solve()
    assert operator.num_matvecs - before <= 20


def test_eigenpairs_that_did_not_converge_are_not_verified():
  operator = _of_matrix(_asymmetric('antisymmetric-part'))
  pairs = curvature.eigenpairs(operator, 2, check_symmetry=False)
  assert not pairs.converged.all()
  assert not pairs.verified
  density = curvature.spectral_density(operator, 10, 1, check_symmetry=False)
  assert np.trapezoid(density.density, density.grid) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize('kind', _ASYMMETRIC)
def test_traces_and_norms_need_no_symmetry(kind):
  matrix = _asymmetric(kind)
  operator = _of_matrix(matrix)
  pairs = curvature.eigenpairs(operator, 2, check_symmetry=False, tol=0.5)
  estimates = [
    (curvature.trace(operator, 40), np.trace(matrix)),
    (curvature.trace(operator, 40, pairs=pairs), np.trace(matrix)),
    (curvature.diagonal(operator, 40).leaf_traces[''], np.trace(matrix)),
    (curvature.squared_frobenius_norm(operator, 40), (matrix**2).sum()),
    (curvature.squared_frobenius_norm(operator, 40, pairs=pairs), (matrix**2).sum()),
  ]
  for estimate, truth in estimates:
    assert abs(estimate.value - truth) < 4 * estimate.standard_error + 1e-4


def test_data_that_change_from_product_to_product_are_refused():
  class Augmented:
    def __init__(self):
      self.rng = np.random.default_rng(0)

    def __iter__(self):
      yield jnp.asarray(self.rng.normal(size=(8, 20)), jnp.float32)

  loss = lambda w, x: jnp.mean(jnp.cos(x @ w))
  operator = curvature.hessian(loss, jnp.ones(20), Augmented(), max_cache_gib=0)
  with pytest.raises(curvature.AsymmetryError, match='the same data at each product'):
    curvature.eigenpairs(operator, 1)


@pytest.mark.parametrize('scale', [1e-20, 1.0, 1e20])
def test_rounding_is_not_taken_for_asymmetry(scale):
  """Networks in bfloat16, restarts, repeated eigenvalues, and extreme scales."""

  def loss(params, x):
    hidden = jnp.tanh(x.astype(jnp.bfloat16) @ params['in'].astype(jnp.bfloat16))
    out = hidden @ params['out'].astype(jnp.bfloat16)
    return scale * jnp.mean(out.astype(jnp.float32) ** 2)

  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'in': jax.random.normal(keys[0], (8, 12)) / 3,
    'out': jax.random.normal(keys[1], (12, 3)) / 3,
  }
  operator = curvature.hessian(loss, params, [jax.random.normal(keys[2], (16, 8))])
  for candidate in (operator, _operator(scale * np.repeat([1.0, 2.0, 5.0], 20))):
    curvature.eigenpairs(candidate, 2, max_basis_size=14, max_num_matvecs=80)
    curvature.spectral_density(candidate, 20, 1)


def test_arrays_of_a_batch_that_differ_in_length_need_a_weight():
  loss = lambda w, batch: jnp.mean(w * batch['x'].sum()) + batch['y'].sum()
  batches = [{'x': jnp.ones((4, 2)), 'y': jnp.ones(3)}]
  with pytest.raises(ValueError, match=r'leading dimensions \[3, 4\]: mend the batch'):
    curvature.hessian(loss, jnp.ones(()), batches)
  assert curvature.hessian(loss, jnp.ones(()), batches, weight=lambda b: 4).size == 1


@pytest.mark.parametrize('x', [[], [0.0, np.nan], [[0.0, 1.0]], [np.inf]])
def test_axes_that_are_none_are_refused(x):
  loss = lambda w, batch: (w * batch).sum()
  at = jnp.ones(2)
  with pytest.raises(ValueError, match='x must be a vector of finite coordinates'):
    sam_jax.landscape.line(loss, at, at, x, [jnp.ones(2)])
  for make in (sam_jax.landscape.surface, sam_jax.landscape.eigen_ratio):
    with pytest.raises(ValueError, match='y must be a vector of finite coordinates'):
      make(loss, at, (at, at), [0.0], x, [jnp.ones(2)])
