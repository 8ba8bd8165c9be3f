"""Gradient flow against matrix exponentials, and gradient descent against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from sam_jax import edges


def quadratic(w, batch):
  v = jnp.concatenate([w['a'], w['b'].ravel()])
  return 0.5 * v @ batch['hessian'] @ v - batch['slope'] @ v


def quadratic_problem():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  values = np.array([40.0, 9.0, 3.0, 0.5, 1e-3, -0.2])
  batch = {'hessian': (basis * values) @ basis.T, 'slope': rng.normal(size=6)}
  start = rng.normal(size=6)
  return basis, values, batch, start


def tree(v):
  return {'a': jnp.array(v[:2]), 'b': jnp.array(v[2:]).reshape(2, 2)}


def flat(w):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(w)])


def exponential(time):
  """The exact solution, by the eigenvectors."""
  basis, values, batch, start = quadratic_problem()
  w, b = basis.T @ start, basis.T @ batch['slope']
  return basis @ (w * np.exp(-values * time) - b * np.expm1(-values * time) / values)


def test_a_quadratic_follows_the_matrix_exponential(x64):
  *_, batch, start = quadratic_problem()
  times = [0.0, 0.01, 0.3, 0.3, 2.5]
  states = list(edges.gradient_flow(quadratic, tree(start), batch, times))
  assert [state.time for state in states] == times
  for state in states:
    # The fastest mode is followed to h^4 of its own size, the others far better.
    np.testing.assert_allclose(flat(state.params), exponential(state.time), atol=2e-4)
  assert states[-1].top_eigenvalue == pytest.approx(40, rel=1e-2)
  assert states[-1].num_steps == pytest.approx(2.5 * 40 / 0.5, rel=0.1)


def curved(w, batch):
  """Not a quadratic, so that all conditions of the order count."""
  return jnp.sum(jnp.cosh(w)) + 0.3 * jnp.sum(w) ** 2 * jnp.sin(w[0]) + 0 * batch


def test_the_error_is_of_order_4(x64):
  start = jnp.array([1.0, -0.5, 0.3])
  ends = []
  for steps in (4, 8, 16, 256):
    flow = edges.gradient_flow(
      curved, start, jnp.zeros(()), [1.0], max_step=1 / steps, step_times_curvature=2.5
    )
    (state,) = flow
    assert state.num_steps == steps
    ends.append(np.asarray(state.params))
  errors = [np.linalg.norm(end - ends[-1]) for end in ends[:-1]]
  orders = np.log2(np.array(errors[:-1]) / errors[1:])
  np.testing.assert_allclose(orders, 4, atol=0.35)


def quartic(w, batch):
  return jnp.sum(batch * w**4) / 4


def test_the_step_follows_a_curvature_that_moves(x64):
  """w' = -a w^3 has the solution w0 / sqrt(1 + 2 a w0^2 t)."""
  a, start, time = jnp.array([1.0, 25.0]), jnp.array([3.0, 5.0]), 4.0
  early, late = edges.gradient_flow(quartic, start, a, [0.01, time])
  for state in (early, late):
    wanted = start / np.sqrt(1 + 2 * a * start**2 * state.time)
    np.testing.assert_allclose(state.params, wanted, rtol=1e-5)
  assert abs(late.top_eigenvalue) < 0.01 * 3 * 25 * 25
  fixed = time * 3 * 25 * 25 / 0.5  # steps, if the first curvature had stayed
  assert late.num_steps < 0.05 * fixed


CURVED = {
  'double well': (lambda w, _: jnp.sum((w**2 - 1) ** 2) / 4, 0.2, 2e-4),
  'saddle': (lambda w, _: jnp.sum((w**2 - 1) ** 2) / 4, 0.01, 1e-3),
  'logistic': (lambda w, _: jnp.sum(w**3 / 3 - w**2 / 2), 0.01, 1e-3),
  'hinge': (
    lambda w, _: jnp.sum(jnp.logaddexp(0.0, -10 * w) / 10 + 0.05 * w),
    -5.0,
    3e-2,
  ),
  'barrier': (lambda w, _: jnp.sum(-w + jnp.exp(20 * (w - 5))), 0.0, 5e-3),
}


@pytest.mark.parametrize('name', CURVED)
def test_a_curvature_that_is_nearly_0_on_the_way_bounds_nothing(name, x64):
  """Against SciPy; smaller c is more exact, by the order of the method or more."""
  loss, start, near = CURVED[name]
  slope = jax.jit(jax.grad(lambda w: loss(w, None)))
  times = [1.0, 5.0, 10.0]
  solution = integrate.solve_ivp(
    lambda t, w: -np.asarray(slope(jnp.asarray(w))),
    (0, 10),
    [start],
    method='Radau' if name == 'barrier' else 'DOP853',
    t_eval=times,
    rtol=1e-10,
    atol=1e-12,
  )
  errors = []
  for factor in (0.5, 0.1):
    flow = edges.gradient_flow(
      loss, jnp.array([start]), 0.0, times, step_times_curvature=factor
    )
    ends = [float(state.params[0]) for state in flow]
    errors.append(np.abs(ends - solution.y[0]).max())
  assert errors[0] < near and errors[1] < near / 25, errors


def test_a_gradient_that_is_not_finite_on_the_way_is_an_error(x64):
  loss = lambda w, _: -jnp.sum(jnp.sqrt(1 - w))
  with pytest.raises(FloatingPointError, match='no step from time'):
    list(edges.gradient_flow(lambda w, b: -loss(w, b), jnp.array([0.9]), 0.0, [5.0]))


def test_rounding_near_a_minimum_does_not_halve_steps():
  """In float32, where the gradient is nothing but noise."""
  w = jnp.linspace(1, 2, 50)
  loss = lambda w, _: jnp.sum((jnp.sin(w) - 0.7) ** 2)
  (state,) = edges.gradient_flow(loss, w, 0.0, [200.0])
  assert state.num_steps < 2000


def test_a_flow_goes_on_from_a_state(x64):
  *_, batch, start = quadratic_problem()
  (whole,) = edges.gradient_flow(quadratic, tree(start), batch, [0.4])
  (half,) = edges.gradient_flow(quadratic, tree(start), batch, [0.2])
  (rest,) = edges.gradient_flow(quadratic, half.params, batch, [0.4], start=half.time)
  assert rest.time == 0.4
  np.testing.assert_allclose(flat(rest.params), flat(whole.params), atol=1e-4)


def assert_same(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_state_goes_on_bit_for_bit():
  start, batch = jnp.array([3.0, 5.0]), jnp.array([1.0, 25.0])
  times = [0.003, 0.0401, 0.2]
  *_, whole = edges.gradient_flow(quartic, start, batch, times)
  for state in edges.gradient_flow(quartic, start, batch, times[:2]):
    assert state.num_steps % 10  # The next measurement is not the next thing.
    *_, rest = edges.gradient_flow(
      quartic, state, batch, times[times.index(state.time) + 1 :]
    )
    assert_same(rest, whole)


def test_a_departure_goes_on_bit_for_bit():
  arguments = jnp.array([3.0, 5.0]), jnp.array([1.0, 25.0])
  follow = lambda start, steps: edges.departure_from_flow(
    quartic, start, arguments[1], 1e-3, steps
  )
  *_, whole = follow(arguments[0], [3, 20, 60])
  first, second = follow(arguments[0], [3, 20])
  assert_same(list(follow(first, [20, 60]))[-1], whole)
  assert_same(list(follow(second, [60]))[-1], whole)
  with pytest.raises(ValueError, match='at step 20 already'):
    follow(second, [19])


def test_descent_keeps_to_the_flow_below_the_edge_and_leaves_above(x64):
  *_, batch, start = quadratic_problem()
  steps = [0, 1, 50]
  for rate, near in ((0.005 / 40, True), (2.1 / 40, False)):
    both = list(edges.departure_from_flow(quadratic, tree(start), batch, rate, steps))
    w, path = start.copy(), 0.0
    for each in both:
      while each.step and steps[0] < each.step:
        steps = [steps[0] + 1, *steps[1:]]
        change = -rate * (batch['hessian'] @ w - batch['slope'])
        w, path = w + change, path + np.linalg.norm(change)
      np.testing.assert_allclose(flat(each.descent), w, rtol=1e-9)
      np.testing.assert_allclose(each.path_length, path, rtol=1e-9)
      apart = np.linalg.norm(w - exponential(rate * each.step))
      np.testing.assert_allclose(each.distance, apart, atol=2e-4)
    steps = [0, 1, 50]
    assert both[0].distance == 0
    assert (both[-1].distance < 0.01 * both[-1].path_length) == near


@pytest.mark.parametrize(
  ('settings', 'sentence'),
  [
    ({'step_times_curvature': 3.0}, 'step_times_curvature=3.0'),
    ({'step_times_curvature': 0.0}, 'step_times_curvature=0.0'),
    ({'max_step': 0.0}, 'max_step=0.0'),
    ({'start': 2.0}, 'times: 1.0 comes after 2.0'),
  ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    list(edges.gradient_flow(quartic, jnp.ones(2), jnp.ones(2), [1.0], **settings))


def test_bad_steps_and_rates_are_refused():
  arguments = quartic, jnp.ones(2), jnp.ones(2)
  with pytest.raises(ValueError, match=r'learning_rate=0\.0'):
    edges.departure_from_flow(*arguments, 0.0, [1])
  for steps in ([2, 1], [1.5]):
    with pytest.raises(ValueError, match='give whole numbers of steps'):
      edges.departure_from_flow(*arguments, 0.1, steps)


def test_a_loss_that_is_not_finite_is_an_error():
  flow = edges.gradient_flow(quartic, jnp.full(2, jnp.nan), jnp.ones(2), [1.0])
  with pytest.raises(FloatingPointError, match='time 0'):
    next(flow)
