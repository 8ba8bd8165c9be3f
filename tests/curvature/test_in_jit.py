"""Products, eigenpairs and tridiagonalizations inside compiled functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import curvature

_SIZE = 60
_BULK = np.random.default_rng(0).uniform(-0.5, 1, _SIZE)


def _spectrum(*ends):
  return np.r_[ends, _BULK[len(ends) :]]


def _tree(flat):
  return {'a': flat[:42].reshape(6, 7), 'b': [flat[42:43].reshape(()), flat[43:]]}


def _flat(tree):
  return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def _matrix(values, seed=0):
  """A dense symmetric matrix with these eigenvalues."""
  random = np.random.default_rng(seed).normal(size=(len(values), len(values)))
  q = np.linalg.qr(random)[0]
  return jnp.asarray(q * values @ q.T)


def _matvec(matrix):
  return lambda v: _tree(jnp.matmul(matrix, _flat(v), precision='highest'))


@functools.partial(jax.jit, static_argnames=('k', 'which'))
def _top(matrix, start=None, key=None, k=3, which='largest'):
  like = jax.tree.map(jnp.zeros_like, _tree(matrix[0]))
  return curvature.top_eigenpairs(
    _matvec(matrix),
    like,
    k,
    which,
    start=start,
    key=key,
    tol=1e-7,
    max_num_matvecs=400,
  )


def _check_pairs(result, matrix, expected, tol=1e-7):
  scale = np.abs(expected).max() or 1
  vectors = np.stack([_flat(jax.tree.map(lambda x, i=i: x[i], result.eigenvectors))
                      for i in range(len(expected))])  # fmt: skip
  rest = vectors @ matrix - result.eigenvalues[:, None] * vectors
  residuals = np.linalg.norm(rest, axis=1)
  np.testing.assert_allclose(result.eigenvalues, expected, atol=10 * tol * scale)
  np.testing.assert_allclose(result.residuals, residuals, atol=1e-12 * scale)
  np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(expected)), atol=1e-12)
  assert result.converged.all()


@pytest.mark.parametrize(
  ('values', 'restarts'),
  [
    pytest.param(_spectrum(9, 7, 6, 5), False, id='separated'),
    pytest.param(_spectrum(*(2 + 0.02 * np.arange(8))), True, id='crowded'),
    pytest.param(-np.abs(_spectrum(30, 20, 10)), True, id='negative'),
    pytest.param(_spectrum(-50, -40, 1.5, 1.4, 1.3), False, id='negative-dominant'),
    pytest.param(np.r_[np.zeros(54), 1, 2, 3, 4, 5, 6], False, id='rank-deficient'),
    pytest.param(np.zeros(_SIZE), False, id='zero'),
    pytest.param(1e-22 * _spectrum(9, 7, 6), False, id='tiny'),
  ],
)
def test_top_pairs_equal_dense_ones(x64, values, restarts):
  matrix = _matrix(values)
  result = _top(matrix)
  _check_pairs(result, matrix, np.sort(values)[::-1][:3])
  assert (result.num_matvecs > 28) == restarts  # the size of the basis


def test_the_pairs_wanted_may_be_smallest_or_largest_in_magnitude(x64):
  values = _spectrum(-8, 7, -6, 5, -4)
  matrix = _matrix(values)
  _check_pairs(_top(matrix, which='smallest'), matrix, np.array([-8, -6, -4]))
  _check_pairs(_top(matrix, which='magnitude'), matrix, np.array([-8, 7, -6]))


def test_all_pairs_of_a_small_operator_are_exact(x64):
  values = np.array([3.0, 3.0, 1.0, 0.0, -2.0])
  matrix = _matrix(values)
  result = jax.jit(
    lambda m: curvature.top_eigenpairs(lambda v: m @ v, m[0], k=5, num_guards=4, tol=0)
  )(matrix)
  np.testing.assert_allclose(result.eigenvalues, np.sort(values)[::-1], atol=1e-13)
  assert result.num_matvecs == 5


def test_a_warm_start_is_cheap_and_finds_what_it_did_not_know(x64):
  values = _spectrum(9, 7, 6, 5, 4, 3)
  first = _top(_matrix(values))
  again = _top(_matrix(values), first, jax.random.key(1))
  assert again.num_matvecs == 7 < first.num_matvecs  # the block, and one to explore


def test_a_warm_start_finds_an_eigenvalue_hidden_from_its_block(x64):
  """Of an operator under which the span of the block is exactly invariant."""
  values = _spectrum(9, 7, 6, 5, 4, 3)
  values[-1] = 12
  matrix = jnp.diag(jnp.asarray(values))
  pairs = _top(matrix)._replace(block=jax.vmap(_tree)(jnp.eye(6, _SIZE)))
  for index in range(6):
    pairs = _top(matrix, pairs, jax.random.key(index))
  np.testing.assert_allclose(pairs.eigenvalues, [12, 9, 7], rtol=1e-6)


def test_a_product_that_is_not_finite_ends_the_search():
  result = jax.jit(
    lambda x: curvature.top_eigenpairs(lambda v: v * x, x, tol=0, max_num_matvecs=50)
  )(jnp.full(40, jnp.nan))
  assert result.num_matvecs == 1
  assert np.isnan(result.eigenvalues).all() and not result.converged.any()


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    ({'k': 0}, ValueError, 'k=0: give a whole number from 1 to the size, 9'),
    ({'k': 10}, ValueError, 'k=10'),
    ({'which': 'top'}, ValueError, "which='top'"),
    ({'num_guards': -1}, ValueError, 'num_guards=-1'),
    ({'max_num_matvecs': 2, 'k': 3}, ValueError, 'max_num_matvecs=2'),
    ({'max_basis_size': 3}, ValueError, 'max_basis_size=3.*at least 5'),
    ({'start': jnp.ones(9)}, ValueError, r'start= has vectors .*\[\(\)\]'),
    ({'start': jnp.ones((0, 9))}, ValueError, 'start= has leading dimensions'),
    ({'like': jnp.ones(9, int)}, TypeError, 'dtype int32'),
    ({'like': {}}, ValueError, 'no entries'),
  ],
)
def test_wrong_arguments_are_named(arguments, error, message):
  with pytest.raises(error, match=message):
    curvature.top_eigenpairs(lambda v: v, **{'like': jnp.ones(9), **arguments})


def _tridiagonal_matrix(result):
  off = result.betas[:-1]
  return np.diag(result.alphas) + np.diag(off, 1) + np.diag(off, -1)


def test_tridiagonalization_satisfies_its_equation_and_is_exact_at_full_order(x64):
  values = _spectrum(9, 7, -6)
  matrix = _matrix(values)
  starts = jax.random.normal(jax.random.key(0), (3, _SIZE))

  @functools.partial(jax.jit, static_argnums=1)
  def run(starts, m):
    run_one = lambda x: curvature.tridiagonalize(_matvec(matrix), m, _tree(x))
    return jax.vmap(run_one)(starts)

  for m in (12, _SIZE):
    results = run(starts, m)
    for i, start in enumerate(starts):
      result = jax.tree.map(lambda x, i=i: np.asarray(x[i]), results)
      basis = np.asarray(jax.vmap(_flat)(result.basis)).T
      projected = _tridiagonal_matrix(result)
      rest = np.zeros((_SIZE, m))
      rest[:, -1] = _flat(result.remainder)
      np.testing.assert_allclose(matrix @ basis, basis @ projected + rest, atol=1e-12)
      np.testing.assert_allclose(basis.T @ basis, np.eye(m), atol=1e-12)
      np.testing.assert_allclose(basis[:, 0], start / jnp.linalg.norm(start))
      assert np.linalg.norm(_flat(result.remainder)) == pytest.approx(
        result.betas[-1], abs=1e-12
      )
      assert result.size == m
  full = np.linalg.eigvalsh(projected)
  np.testing.assert_allclose(full, np.sort(values), atol=1e-11)


@pytest.mark.parametrize(
  ('values', 'start', 'size'),
  [
    ([5.0, 5.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0], 3),
    ([5.0, 4.0, 2.0, 1.0, 7.0], [0.0, 2.0, 0.0, 1.0, 0.0], 2),
    ([0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0], 1),
    ([5.0, 4.0, 2.0, 1.0, 7.0], [0.0, 0.0, 0.0, 0.0, 0.0], 0),
  ],
)
def test_a_krylov_space_that_ends_is_a_result(values, start, size):
  """The quadrature is still that of all eigenvalues, and more steps than entries do."""
  values, start = np.array(values, np.float32), np.array(start, np.float32)
  result = curvature.tridiagonalize(lambda v: values * v, 8, start)
  assert result.size == size
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
  assert (result.betas[max(size - 1, 0) :] == 0).all()
  assert (result.alphas[size:] == 0).all()
  if size:
    nodes, vectors = np.linalg.eigh(_tridiagonal_matrix(result))
    unit = start / np.linalg.norm(start)
    for power in (1, 2, 5):
      expected = (unit**2 * values**power).sum()
      moment = (vectors[0] ** 2 * nodes**power).sum()
      np.testing.assert_allclose(moment, expected, rtol=1e-5)


def test_wrong_numbers_of_steps_and_vectors_are_named():
  with pytest.raises(ValueError, match='num_matvecs=0'):
    curvature.tridiagonalize(lambda v: v, 0, jnp.ones(3))
  with pytest.raises(TypeError, match='dtype int32'):
    curvature.tridiagonalize(lambda v: v, 2, jnp.ones(3, int))


def _loss(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['in'] + params['bias'][None])
  return ((hidden @ params['out'][0] - batch['y']) ** 2).sum(1).mean()


def _network(seed, dtype):
  keys = jax.random.split(jax.random.key(seed), 5)
  params = {
    'in': jax.random.normal(keys[0], (4, 6), dtype) / 2,
    'bias': jax.random.normal(keys[1], (6,), dtype),
    'out': [jax.random.normal(keys[2], (6, 3), dtype) / 2],
  }
  x, y = (jax.random.normal(keys[i], (8, i), dtype) for i in (4, 3))
  return params, {'x': x, 'y': y}


def _train_and_track(loss, steps, tol):
  """Compiled: eigenvalues tracked through a training run, and the parameters."""
  product = curvature.hessian_product(loss)

  @jax.jit
  def run(params, batch):
    def top(params, **options):
      matvec = product.linearize(params, batch)
      return curvature.top_eigenpairs(matvec, params, 2, tol=tol, **options)

    def step(carry, index):
      params, pairs = carry
      descend = lambda _, p: jax.tree.map(
        lambda w, g: w - 0.01 * g, p, jax.grad(loss)(p, batch)
      )
      params = jax.lax.fori_loop(0, 5, descend, params)
      pairs = top(params, start=pairs, key=jax.random.key(index))
      return (params, pairs), (params, pairs)

    first = top(params)
    return first, jax.lax.scan(step, (params, first), jnp.arange(steps))[1]

  return run


@pytest.mark.parametrize(
  ('dtype', 'tol', 'rtol'),
  [
    pytest.param(jnp.float64, 1e-5, 1e-6, marks=pytest.mark.slow),
    (jnp.float32, 1e-3, 1e-3),
  ],
)
def test_eigenvalues_are_tracked_while_a_network_trains(x64, dtype, tol, rtol):
  traces = []

  def loss(params, batch):
    traces.append(1)
    return _loss(params, batch)

  run = _train_and_track(loss, 12, tol)
  params, batch = _network(0, dtype)
  first, (params, pairs) = run(params, batch)
  count = len(traces)
  run(*_network(1, dtype))
  assert len(traces) == count <= 4  # a gradient and two curvatures, whatever the steps
  assert pairs.converged.all()
  assert pairs.eigenvalues.dtype == dtype
  assert pairs.num_matvecs[-1] < 0.8 * first.num_matvecs
  wide = jax.tree.map(lambda x: x.astype(jnp.float64), (params, batch))
  for index in range(12):
    at = jax.tree.map(lambda x, i=index: x[i], wide[0])
    flat, unravel = ravel_pytree(at)
    dense = jax.hessian(lambda w, u=unravel: _loss(u(w), wide[1]))(flat)
    expected = np.linalg.eigvalsh(dense)[::-1][:2]
    np.testing.assert_allclose(
      pairs.eigenvalues[index], expected, atol=rtol * expected[0]
    )


def test_sharded_parameters_give_the_same_pairs():
  """On eight devices, each holding a part of every vector."""
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.P('x'))
  data = jax.random.normal(jax.random.key(0), (20, 16))
  loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
  product = curvature.hessian_product(loss)

  @jax.jit
  def run(params, data):
    matvec = lambda v: product(params, data, v)
    pairs = curvature.top_eigenpairs(matvec, params, 2, tol=1e-5)
    return pairs.eigenvalues, curvature.tridiagonalize(matvec, 4, params).alphas

  params = jax.random.normal(jax.random.key(1), (16, 2)) / 4
  expected = run(params, data)
  found = run(jax.device_put(params, split), data)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, expected
  )


def test_random_vectors_are_placed_like_parameters_on_an_explicit_mesh():
  """On eight devices; the search restarts and begins again from its result."""
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,))
  kernel = jnp.arange(32.0).reshape(16, 2) - 3
  with jax.set_mesh(mesh):
    params = {'bias': jnp.ones(3), 'kernel': jax.device_put(kernel, jax.P('x'))}

    @jax.jit
    def run(params):
      matvec = lambda v: jax.tree.map(jnp.multiply, params, v)
      search = functools.partial(
        curvature.top_eigenpairs, matvec, params, 2, tol=1e-5, max_basis_size=8
      )
      first = search()
      return first, search(start=first, key=jax.random.key(1))

    compiled = run.lower(params).compile()
    for pairs in compiled(params):
      np.testing.assert_allclose(pairs.eigenvalues, [28, 27], rtol=1e-4)
      assert pairs.converged.all()
      assert jax.typeof(pairs.block['kernel']).sharding.spec == jax.P(None, 'x', None)
  assert 'all-gather' not in compiled.as_text()
