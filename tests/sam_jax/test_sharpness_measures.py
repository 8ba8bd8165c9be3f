"""Worst-case and average-case sharpness against closed forms of quadratics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax
from sam_jax import curvature

pytestmark = pytest.mark.usefixtures('x64')
_SIZE = 6


def _loss(params, batch):
  """The mean of the quadratics of a batch, in two leaves."""
  w = jnp.concatenate([params['a'], params['b'].ravel()])
  quadratic = 0.5 * jnp.einsum('nij,i,j->n', batch['A'], w, w)
  return jnp.mean(quadratic + batch['g'] @ w)


def _problem(count=1, *, convex=False, seed=0):
  """Parameters, and so many examples, each a quadratic."""
  rng = np.random.default_rng(seed)
  matrices = rng.normal(size=(count, _SIZE, _SIZE))
  matrices = matrices @ matrices.mT if convex else matrices + matrices.mT
  params = {'a': rng.normal(size=2), 'b': rng.normal(size=(2, 2))}
  return params, {'A': matrices, 'g': rng.normal(size=(count, _SIZE))}


def _flat(params):
  return np.concatenate([params['a'], params['b'].ravel()])


def _local(params, batch, scale=None):
  """Hessian and gradient of the mean loss, in units of a scale."""
  scale = np.ones(_SIZE) if scale is None else scale
  matrix, w = batch['A'].mean(0), _flat(params)
  return scale[:, None] * matrix * scale, scale * (matrix @ w + batch['g'].mean(0))


def _trust_region(matrix, vector, rho):
  """max 1/2 e.A e + b.e over |e| <= rho, by bisection of the secular equation."""
  values, vectors = np.linalg.eigh(matrix)
  b = vectors.T @ vector
  norm = lambda mu: np.linalg.norm(b / (mu - values))
  low, high = max(values[-1], 0.0), np.abs(values).max() + np.linalg.norm(b) / rho + 1
  assert norm(low + 1e-12) > rho  # on the sphere, and not the hard case
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if norm(middle) > rho else (low, middle)
  e = b / (high - values)
  return 0.5 * e @ (values * e) + b @ e


@pytest.mark.parametrize('adaptive', [False, True])
@pytest.mark.parametrize('convex', [False, True])
def test_worst_case_in_a_ball_is_the_trust_region_solution(convex, adaptive):
  params, batch = _problem(3, convex=convex)
  scale = np.abs(_flat(params)) if adaptive else None
  matrix, gradient = _local(params, batch, scale)
  for rho in (0.05, 2.0):
    found = sam_jax.sharpness.worst_case(
      _loss, params, [batch], rho, adaptive=adaptive, num_steps=300
    )
    assert found.value == pytest.approx(_trust_region(matrix, gradient, rho), rel=1e-8)
    assert (found.standard_error, found.num_matvecs) == (0, 0)


@pytest.mark.parametrize('adaptive', [False, True])
def test_worst_case_in_a_cube_is_at_a_vertex(adaptive):
  params, batch = _problem(3, convex=True)
  scale = np.abs(_flat(params)) if adaptive else None
  matrix, gradient = _local(params, batch, scale)
  rho = 0.7
  vertices = rho * np.array(list(itertools.product((-1, 1), repeat=_SIZE)))
  rises = 0.5 * np.einsum('vi,ij,vj->v', vertices, matrix, vertices)
  best = (rises + vertices @ gradient).max()
  arguments = {'norm': 'linf', 'adaptive': adaptive, 'num_steps': 15}
  found = sam_jax.sharpness.worst_case(
    _loss, params, [batch], rho, num_restarts=12, **arguments
  )
  assert found.value == pytest.approx(best, rel=1e-12)
  once = sam_jax.sharpness.worst_case(_loss, params, [batch], rho, **arguments)
  assert 0 < once.value <= best * (1 + 1e-12)


def test_groups_have_maximisers_of_their_own_and_are_weighted_by_size():
  params, data = _problem(5)
  groups = [
    jax.tree.map(lambda x, s=s: x[s], data)
    for s in (slice(3), slice(3, 4), slice(4, 5))
  ]
  rises = np.array([_trust_region(*_local(params, group), 0.5) for group in groups])
  found = sam_jax.sharpness.worst_case(_loss, params, groups, 0.5, num_steps=300)
  shares = np.array([3, 1, 1]) / 5
  mean = shares @ rises
  assert found.value == pytest.approx(mean, rel=1e-8)
  error = np.sqrt(1.5 * (shares**2) @ (rises - mean) ** 2)
  assert found.standard_error == pytest.approx(error, rel=1e-6)

  alone = [jax.tree.map(lambda x, i=i: x[i : i + 1], data) for i in range(5)]
  rises = np.array([_trust_region(*_local(params, group), 0.5) for group in alone])
  found = sam_jax.sharpness.worst_case(_loss, params, alone, 0.5, num_steps=300)
  assert found.value == pytest.approx(rises.mean(), rel=1e-8)
  assert found.standard_error == pytest.approx(rises.std(ddof=1) / 5**0.5, rel=1e-6)


def test_a_shared_maximiser_is_that_of_the_mean_loss():
  params, data = _problem(5)
  batches = [jax.tree.map(lambda x, s=s: x[s], data) for s in (slice(3), slice(3, 5))]
  found = sam_jax.sharpness.worst_case(
    _loss, params, batches, 0.5, shared=True, num_steps=300
  )
  expected = _trust_region(*_local(params, data), 0.5)
  assert found.value == pytest.approx(expected, rel=1e-8)
  assert found.standard_error == 0
  own = sam_jax.sharpness.worst_case(_loss, params, batches, 0.5, num_steps=300)
  assert own.value > found.value


@pytest.mark.parametrize('adaptive', [False, True])
def test_one_step_is_sams(adaptive):
  params, batch = _problem(4)
  method = sam_jax.asam(0.3, 0.0, weights=True) if adaptive else sam_jax.sam(0.3)
  loss = lambda w: _loss(w, batch)
  clean, grads = jax.value_and_grad(loss)(params)
  _, state = method.update(
    grads, method.init(params), params, value_and_grad_fn=jax.value_and_grad(loss)
  )
  found = sam_jax.sharpness.worst_case(
    _loss, params, [batch], 0.3, adaptive=adaptive, num_steps=1
  )
  assert found.value == pytest.approx(float(state.perturbed_loss - clean), rel=1e-12)


def test_at_a_minimum_only_restarts_rise():
  loss = lambda w, x: jnp.mean(x) * jnp.sum(jnp.array([1.0, 4.0]) * w**2)
  arguments = loss, jnp.zeros(2), [jnp.ones(3)], 0.5
  assert sam_jax.sharpness.worst_case(*arguments).value == 0
  risen = sam_jax.sharpness.worst_case(*arguments, num_restarts=2, num_steps=60)
  assert risen.value == pytest.approx(4 * 0.5**2, rel=1e-6)


def test_small_steps_stay_below_and_a_descent_counts_as_nothing():
  params, batch = _problem(3, convex=True)
  short = sam_jax.sharpness.worst_case(
    _loss, params, [batch], 0.5, step_size=0.01, num_steps=3
  )
  whole = sam_jax.sharpness.worst_case(_loss, params, [batch], 0.5, num_steps=50)
  assert 0 < short.value < 0.2 * whole.value
  # The whole ball is downhill: the top of a hill.
  hill = lambda w, x: -jnp.mean(x) * jnp.sum(w**2)
  top = sam_jax.sharpness.worst_case(
    hill, jnp.zeros(2), [jnp.ones(2)], 0.5, num_restarts=3
  )
  assert top.value == 0


@pytest.mark.parametrize('antithetic', [True, False])
@pytest.mark.parametrize('adaptive', [False, True])
def test_average_case_of_a_quadratic_is_half_the_trace(adaptive, antithetic):
  params, data = _problem(5)
  batches = [jax.tree.map(lambda x, s=s: x[s], data) for s in (slice(3), slice(3, 5))]
  scale = np.abs(_flat(params)) if adaptive else None
  matrix, _ = _local(params, data, scale)
  found = sam_jax.sharpness.average_case(
    _loss,
    params,
    batches,
    0.1,
    adaptive=adaptive,
    antithetic=antithetic,
    num_samples=200,
  )
  expected = 0.1**2 / 2 * np.trace(matrix)
  assert abs(found.value - expected) < 4 * found.standard_error
  # The variance of z.A z / 2 is |A|_F^2 / 2; a single z has the gradient's on top.
  error = 0.1**2 * np.sqrt((matrix**2).sum() / 2 / 200)
  if antithetic:
    assert found.standard_error == pytest.approx(error, rel=0.4)
  else:
    assert found.standard_error > 3 * error


def _relu_network(params, x):
  return jnp.mean((jax.nn.relu(x @ params[0]) @ params[1] - 1) ** 2)


def test_adaptive_measures_do_not_change_when_layers_are_rescaled():
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=(4, 6)), rng.normal(size=(6, 2))
  x = [rng.normal(size=(9, 4))]

  def measures(c, adaptive):
    params = [c * first, second / c]
    return np.array(
      [
        sam_jax.sharpness.worst_case(
          _relu_network, params, x, 0.1, adaptive=adaptive, num_steps=5
        ).value,
        sam_jax.sharpness.worst_case(
          _relu_network, params, x, 0.1, norm='linf', adaptive=adaptive, num_steps=5
        ).value,
        sam_jax.sharpness.average_case(
          _relu_network, params, x, 0.1, adaptive=adaptive, num_samples=3
        ).value,
      ]
    )

  np.testing.assert_allclose(measures(8.0, True), measures(1.0, True), rtol=1e-10)
  assert (np.abs(measures(8.0, False) / measures(1.0, False) - 1) > 0.5).all()


def test_narrow_parameters_are_widened():
  params = jnp.array([3.0, 4.0], jnp.bfloat16)
  loss = lambda w, x: jnp.mean(x).astype(w.dtype) * jnp.sum(w**2)
  found = sam_jax.sharpness.worst_case(loss, params, [jnp.ones(2)], 1e-3)
  assert found.value == pytest.approx(5.001**2 - 25, rel=1e-3)


_WORST = sam_jax.sharpness.worst_case
_AVERAGE = sam_jax.sharpness.average_case


@pytest.mark.parametrize(
  ('measure', 'radius', 'arguments', 'message'),
  [
    (_WORST, -1.0, {}, 'rho=-1.0'),
    (_WORST, np.inf, {}, 'rho=inf'),
    (_WORST, 0.1, {'norm': 'l1'}, "norm='l1'"),
    (_WORST, 0.1, {'num_steps': 0}, 'num_steps=0'),
    (_WORST, 0.1, {'num_restarts': 0}, 'num_restarts=0'),
    (_WORST, 0.1, {'weight': lambda batch: 0}, 'no examples'),
    (_AVERAGE, np.nan, {}, 'sigma=nan'),
    (_AVERAGE, 0.1, {'num_samples': 1}, 'num_samples=1'),
  ],
)
def test_wrong_arguments_are_named(measure, radius, arguments, message):
  with pytest.raises(ValueError, match=message):
    measure(lambda w, x: jnp.sum(w), jnp.ones(2), [jnp.ones(2)], radius, **arguments)


@pytest.mark.parametrize('measure', [_WORST, _AVERAGE])
def test_nan_is_an_error(measure):
  loss = lambda w, x: -jnp.mean(x) * jnp.sum(jnp.log(w))
  with pytest.raises(curvature.NonFiniteError, match='is NaN'):
    measure(loss, jnp.array([0.01]), [jnp.ones(2)], 10.0)
