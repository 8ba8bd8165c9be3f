"""Gradient flow, and how far gradient descent departs from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam_jax import perturbations
from sam_jax.curvature import products
from sam_jax.edges import _pairs

LossFn = Callable[[Any, Any], jax.Array]

_REFRESH = 10  # steps between two measurements of the curvature
_TOL = 1e-2  # of that curvature, which sets a step only
# Of the slope over a step, and of the last two slopes, however large the steps may be.
_LARGEST_TURN, _LARGEST_ERROR = 0.95, 0.5
_GROWTH = 2.0  # of one step over the one before
_MAX_HALVINGS = 100


class FlowState(NamedTuple):
  """Gradient flow at one time.

  Attributes:
    time: the time t.
    params: w(t), of at least float32.
    top_eigenvalue: the Hessian's eigenvalue of the largest absolute value when it was
      last measured, at most 10 steps before t, to 1 %; NaN before the first step.
    num_steps: Runge-Kutta steps since the start, of five gradients each; those that
      were found too long and taken again are not counted.
    search: the vectors from which the next measurement starts, a stack of pytrees like
      ``params``; None before the first.
    step_size: the step that was accurate enough at last; infinite before the first.
  """

  time: float
  params: Any
  top_eigenvalue: float
  num_steps: int
  search: Any = None
  step_size: float = math.inf


class Departure(NamedTuple):
  """Gradient descent and gradient flow at the same time.

  Attributes:
    step: number of steps of gradient descent; the time is step * learning_rate.
    distance: l2 distance between the two.
    path_length: length of the path of gradient descent, the sum of its steps' norms. An
      oscillation at the edge of stability lengthens it, but not the distance.
    descent: the parameters of gradient descent.
    flow: the state of the flow.
  """

  step: int
  distance: float
  path_length: float
  descent: Any
  flow: FlowState


def gradient_flow(
  loss_fn: LossFn,
  params: Any,
  batch: Any,
  times: Iterable[float],
  *,
  start: float = 0.0,
  step_times_curvature: float = 0.5,
  max_step: float = math.inf,
  key: jax.Array | None = None,
) -> Iterator[FlowState]:
  r"""Follows gradient flow by Runge-Kutta steps that the curvature limits.

  .. math:: \frac{dw}{dt} = -\nabla L(w), \qquad h \le \frac{c}{|\lambda|_{\max}},
            \qquad
            \frac{|k_1 - k_5|}{k} \le \frac{3c}{2}, \qquad
            \frac{|k_4 - k_5|}{k} \le \frac{c^3}{6}, \qquad k = \max(|k_1|, |k_5|)

  The classical method of order 4, with the slopes k1 to k4 of a step and k5 at its end.
  It is stable up to c = 2.78; every 10 steps the Hessian's eigenvalue of the largest
  absolute value is measured again, from where the last measurement ended. Where the
  curvature changes within a step, or is 0, that alone is no bound. Therefore the change
  of the slope, and h |k4 - k5| / 6, the distance from a solution of order 3, are
  bounded too, by somewhat more than they are where the curvature stays and h = c /
  lambda. A step that exceeds a bound is halved, and none is over twice as long as the
  one before. Steps end on the wanted times. The loop runs on the host over one compiled
  step, so convolutions keep their speed.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the loss over all examples. Give the
      same function object to several calls and it is compiled once.
    params: w at the start, a pytree of floating-point arrays; or a state of an earlier
      call, from which the flow goes on as if it had never been interrupted.
    batch: all examples; a pytree of arrays.
    times: the times at which to yield a state, not descending, from ``start`` on.
    start: the time at ``params``; a state has its own.
    step_times_curvature: c. Halving it makes the error of a step 32 times smaller where
      the curvature limits the steps.
    max_step: the largest step, in units of time.
    key: typed PRNG key of the measurements; None is ``jax.random.key(0)``.

  Yields:
    The state at each of the times.

  Raises:
    ValueError: c is not between 0 and 2.5, ``max_step`` is not above 0, or a time is
      before the one that the flow has reached.
    FloatingPointError: the parameters or their curvature are no longer finite, or no
      step is short enough.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, a: 0.5 * jnp.sum(a * w ** 2)
  >>> states = gradient_flow(loss, jnp.ones(2), jnp.array([1., 9.]), [0.1, 1.])
  >>> [[round(x, 3) for x in state.params.tolist()] for state in states]
  [[0.905, 0.407], [0.368, 0.0]]

  References:
    Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, arXiv 2103.00065; Hairer, Norsett and Wanner, Solving Ordinary
    Differential Equations I, section II.4 (embedded solutions).
  """
  if not 0 < step_times_curvature <= 2.5:
    raise ValueError(
      f'step_times_curvature={step_times_curvature}: give a number above 0, and at '
      'most 2.5, to stay stable'
    )
  if not max_step > 0:
    raise ValueError(f'max_step={max_step}: give a number above 0')
  if not isinstance(params, FlowState):
    params = jax.tree.map(jnp.asarray, products.at_least_float32(params))
    params = FlowState(float(start), params, math.nan, 0)
  flow = _Flow(loss_fn, batch, step_times_curvature, max_step, key, params.search)
  return flow.run(params, times)


class _Flow:
  """The loop over the steps; what it keeps are the last eigenvectors."""

  def __init__(self, loss_fn, batch, step_times_curvature, max_step, key, search):
    self.loss_fn = loss_fn
    self.batch = jax.device_put(batch)
    self.factor = step_times_curvature
    # On a quadratic of curvature z / h these are less than z, and z^3 / 12.
    turn = min(1.5 * step_times_curvature, _LARGEST_TURN)
    self.limits = turn, min(step_times_curvature**3 / 6, _LARGEST_ERROR)
    self.max_step = max_step
    self.follow = _pairs.Follower(loss_fn, self.batch, 'magnitude', _TOL, key, search)

  def run(self, state: FlowState, times: Iterable[float]) -> Iterator[FlowState]:
    for time in times:
      time = float(time)
      if not state.time <= time < math.inf:
        raise ValueError(
          f'times: {time} comes after {state.time}; give finite times that do not '
          'descend'
        )
      while state.time < time:
        state = self._step(state, time)
      yield state

  def _step(self, state: FlowState, end: float) -> FlowState:
    """One step towards a time; those left until then are equally long."""
    # By the number alone, so that a flow which goes on measures at the same steps.
    if state.num_steps % _REFRESH == 0:
      value = self._measure(state)
      state = state._replace(top_eigenvalue=value, search=self.follow.block)
    most = min(
      self.factor / max(abs(state.top_eigenvalue), 1e-30),
      self.max_step,
      _GROWTH * state.step_size,
    )
    for _ in range(_MAX_HALVINGS):
      left = math.ceil((end - state.time) / most * (1 - 1e-9))
      size = (end - state.time) / left
      if state.time + size == state.time:
        break
      params, accurate = _runge_kutta(
        self.loss_fn, state.params, self.batch, size, self.limits
      )
      if accurate:
        return state._replace(
          time=end if left == 1 else state.time + size,
          params=params,
          num_steps=state.num_steps + 1,
          step_size=most,
        )
      most = size / 2
    raise FloatingPointError(
      f'no step from time {state.time:g} is short enough: the loss or its gradient is '
      'not finite near these parameters, or its gradient jumps'
    )

  def _measure(self, state: FlowState) -> float:
    found = self.follow(state.params, 1, state.num_steps)
    value = float(found.eigenvalues[0])
    if not math.isfinite(value):
      raise FloatingPointError(
        f'the curvature is {value} at time {state.time:g}: the loss is not finite near '
        'these parameters'
      )
    return value


def departure_from_flow(
  loss_fn: LossFn,
  params: Any,
  batch: Any,
  learning_rate: float,
  steps: Iterable[int],
  *,
  step_times_curvature: float = 0.5,
  key: jax.Array | None = None,
) -> Iterator[Departure]:
  r"""Compares gradient descent with the gradient flow from the same start.

  .. math:: |w_t - w(\eta t)|, \qquad w_{t+1} = w_t - \eta \nabla L(w_t)

  Descent follows the flow while the sharpness is below 2 / eta and leaves it where that
  is crossed.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the loss over all examples.
    params: the common start, a pytree of floating-point arrays; or a departure of an
      earlier call with the same learning rate, from which both go on as if they had
      never been interrupted.
    batch: all examples; a pytree of arrays.
    learning_rate: eta, constant.
    steps: numbers of steps of gradient descent at which to compare, not descending.
      They are counted from the common start.
    step_times_curvature: accuracy of the flow, as `gradient_flow` explains it.
    key: typed PRNG key of the flow's measurements; None is ``jax.random.key(0)``.

  Yields:
    Both at each of the steps, with their distance.

  Raises:
    ValueError: the learning rate is not above 0, ``steps`` descend, or the first is
      before the departure that was given.
    FloatingPointError: the parameters of descent, or the parameters or the curvature of
      the flow are not finite.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, a: 0.5 * jnp.sum(a * w ** 2)
  >>> both = departure_from_flow(loss, jnp.ones(1), jnp.ones(1), 0.1, [0, 10],
  ...                            step_times_curvature=0.1)
  >>> [round(each.distance, 4) for each in both]  # exp(-1) - 0.9 ** 10
  [0.0, 0.0192]

  References:
    Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, arXiv 2103.00065.
  """
  if not 0 < learning_rate < math.inf:
    raise ValueError(f'learning_rate={learning_rate}: give a finite number above 0')
  steps = whole_steps(steps)
  if isinstance(params, Departure):
    before = params
  else:
    params = jax.tree.map(jnp.asarray, products.at_least_float32(params))
    before = Departure(0, 0.0, 0.0, params, FlowState(0.0, params, math.nan, 0))
  if steps and steps[0] < before.step:
    raise ValueError(f'steps={steps}: the departure is at step {before.step} already')
  flow = gradient_flow(
    loss_fn,
    before.flow,
    batch,
    [learning_rate * step for step in steps],
    step_times_curvature=step_times_curvature,
    key=key,
  )
  return _departures(loss_fn, before, jax.device_put(batch), learning_rate, steps, flow)


def whole_steps(steps: Iterable[int]) -> list[int]:
  """Checks numbers of steps.

  Raises:
    ValueError: they descend, or one is negative or not whole.
  """
  steps = list(steps)
  if steps != sorted(steps) or any(step < 0 or step % 1 for step in steps):
    raise ValueError(f'steps={steps}: give whole numbers of steps that do not descend')
  return [int(step) for step in steps]


def _departures(loss_fn, before, batch, learning_rate, steps, flow):
  descent, path, done = before.descent, before.path_length, before.step
  for step in steps:
    lengths = []
    for _ in range(step - done):
      descent, length = _descend(loss_fn, descent, batch, learning_rate)
      lengths.append(length)
    path, done = path + sum(map(float, lengths)), step
    # Before the flow, which takes long where descent is thrown far away.
    if not math.isfinite(path):
      raise FloatingPointError(f'gradient descent is no longer finite at step {step}')
    state = next(flow)
    apart = jax.tree.map(jnp.subtract, descent, state.params)
    distance = float(perturbations.norm(apart))
    yield Departure(step, distance, path, descent, state)


@functools.partial(jax.jit, static_argnums=0)
def _runge_kutta(loss_fn, params, batch, size, limits):
  """A step of the classical method along the negative gradient, and if it is accurate.

  The slope at the end of the step replaces the fourth in a solution of order 3.
  """
  with jax.default_matmul_precision('highest'):
    slope = lambda at: jax.grad(loss_fn)(at, batch)
    first = slope(params)
    second = slope(_along(params, first, -size / 2))
    third = slope(_along(params, second, -size / 2))
    fourth = slope(_along(params, third, -size))
    total = jax.tree.map(
      lambda a, b, c, d: a + 2 * b + 2 * c + d, first, second, third, fourth
    )
    end = _along(params, total, -size / 6)
    fifth = slope(end)
  norm = perturbations.norm
  largest = jnp.maximum(norm(first), norm(fifth))
  # What is left of a gradient near a minimum is rounding.
  rounding = 10 * jnp.finfo(largest.dtype).eps * norm(params)
  accurate = jnp.isfinite(largest)
  for slope, limit in zip((first, fourth), limits, strict=True):
    apart = norm(jax.tree.map(jnp.subtract, slope, fifth))
    accurate &= (apart <= limit * largest) | (size * apart <= rounding)
  return end, accurate


def _along(params, direction, factor):
  return jax.tree.map(
    lambda w, d: w + jnp.asarray(factor, w.dtype) * d, params, direction
  )


@functools.partial(jax.jit, static_argnums=0)
def _descend(loss_fn, params, batch, learning_rate):
  with jax.default_matmul_precision('highest'):
    gradient = jax.grad(loss_fn)(params, batch)
  length = learning_rate * perturbations.norm(gradient)
  return _along(params, gradient, -learning_rate), length
