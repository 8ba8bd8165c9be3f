"""The central flow of gradient descent: its time average at the edge of stability."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.curvature import products, stacks
from sam_jax.edges import _pairs
from sam_jax.edges.flow import whole_steps

LossFn = Callable[[Any, Any], jax.Array]


class CentralState(NamedTuple):
  """The central flow at one time.

  Attributes:
    step: number of steps of gradient descent that it stands for.
    params: the parameters w, of at least float32.
    loss: L(w).
    predicted_loss: L(w) + <H(w), Sigma> / 2, the time average of the losses of
      gradient descent.
    eigenvalues: float64 (k,), the top eigenvalues of the Hessian at w, descending; the
      first is the sharpness.
    covariance: float64 (c, c), Sigma in the basis of the first c eigenvectors, those
      near the edge; its eigenvalues are the variances of the oscillation.
    search: the vectors from which the next search for eigenpairs starts, a stack of
      pytrees like ``params``.
  """

  step: int
  params: Any
  loss: float
  predicted_loss: float
  eigenvalues: np.ndarray
  covariance: np.ndarray
  search: Any = None


def solve_complementarity(
  quadratic: np.ndarray,
  linear: np.ndarray,
  *,
  tol: float = 1e-10,
  max_iterations: int = 100_000,
) -> np.ndarray:
  r"""Solves a semidefinite linear complementarity problem over symmetric matrices.

  .. math:: X \succeq 0, \quad Y = \mathcal{L}[X] + Q \succeq 0, \quad
            \langle X, Y \rangle = 0

  For a positive semidefinite :math:`\mathcal{L}` these are the conditions of the
  minimum of :math:`\frac12 \langle X, \mathcal{L}[X] \rangle + \langle Q, X \rangle`
  over positive semidefinite matrices, which accelerated projected gradients find.

  Args:
    quadratic: the operator L, (c, c, c, c): ``L[X][i, j]`` is the sum over k, l of
      ``quadratic[i, j, k, l] * X[k, l]``. Symmetric and positive semidefinite.
    linear: the symmetric matrix Q, (c, c).
    tol: largest violation of the conditions, relative to the scale of Q and of X.
    max_iterations: number of iterations at which to give up.

  Returns:
    X, float64 (c, c).

  Raises:
    ArithmeticError: the tolerance was not reached, because the problem has no solution
      or nearly none.
    FloatingPointError: an entry is not finite.

  >>> import numpy as np
  >>> x = solve_complementarity(4 * np.ones((1, 1, 1, 1)), np.array([[-2.]]))
  >>> x.round(6).tolist()
  [[0.5]]
  """
  size = len(linear)
  matrix = np.asarray(quadratic, np.float64).reshape(size**2, size**2)
  linear = np.asarray(linear, np.float64)
  if not (np.isfinite(matrix).all() and np.isfinite(linear).all()):
    raise FloatingPointError('the complementarity problem is not finite')
  bound = np.linalg.norm(matrix, 2)
  if np.linalg.eigvalsh(linear).min() >= 0:
    return np.zeros((size, size))
  image = lambda x: (matrix @ x.ravel()).reshape(size, size) + linear
  x = momentum = np.zeros((size, size))
  scale, weight = abs(linear).max(), 1.0
  for _ in range(max_iterations if bound else 0):
    new = _project(momentum - image(momentum) / bound)
    after = (1 + math.sqrt(1 + 4 * weight**2)) / 2
    if np.sum((momentum - new) * (new - x)) > 0:  # It overshoots: begin again.
      after = 1.0
      momentum = new
    else:
      momentum = new + (weight - 1) / after * (new - x)
    x, weight = new, after
    # Of a projected step of length 1 / bound nothing may move.
    if abs(x - _project(x - image(x) / bound)).max() * bound <= tol * scale:
      return x
  raise ArithmeticError(
    f'the complementarity problem of {size} eigenvalues was not solved to {tol} in '
    f'{max_iterations} iterations: no covariance holds them at the edge'
  )


def central_flow(
  loss_fn: LossFn,
  params: Any,
  batch: Any,
  learning_rate: float,
  steps: Iterable[int],
  *,
  substeps: int = 4,
  num_eigenvalues: int = 3,
  critical: float = 0.75,
  tol: float = 1e-6,
  key: jax.Array | None = None,
) -> Iterator[CentralState]:
  r"""Follows the central flow of gradient descent.

  .. math:: \frac{dw}{d\tau} = -\eta \Big(\nabla L(w) +
            \frac12 \nabla_w \langle H(w), \Sigma \rangle\Big)

  in units of steps of gradient descent. Gradient descent at the edge of stability
  oscillates along the eigenvectors u of the Hessian whose eigenvalues are near 2 / eta;
  :math:`\Sigma = U X U^T` is the covariance of the oscillation, and what it adds to the
  loss drives the curvature down. It is the one covariance that keeps the eigenvalues at
  the edge or below, and oscillates only along those at the edge: with
  :math:`S = U^T H U`, and its slope along the flow,

  .. math:: X \succeq 0, \quad 2 / \eta - S - h \dot{S}(X) \succeq 0, \quad
            \langle X, 2 / \eta - S - h \dot{S}(X) \rangle = 0

  which holds after each Euler step of length h = 1 / substeps. Below the edge X is 0,
  and the flow is gradient flow. The slope takes one third derivative a pair of critical
  eigenvectors; all derivatives are exact.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the loss over all examples, three
      times differentiable. Give the same function object to several calls and it is
      compiled once.
    params: w at the start, a pytree of floating-point arrays, best of float64; or a
      state of an earlier call with the same arguments, from which the flow goes on as
      if it had never been interrupted.
    batch: all examples; a pytree of arrays.
    learning_rate: eta of gradient descent, constant.
    steps: numbers of steps at which to yield a state, not descending, counted from the
      start of the flow.
    substeps: Euler steps for one step of gradient descent; the error falls with it. At
      least 2, because an Euler step of length 1 is gradient descent.
    num_eigenvalues: number of top eigenvalues that are followed. While all of them are
      critical the number grows.
    critical: eigenvalues above this share of 2 / eta take part in the covariance.
    tol: residual of the eigenpairs, relative to the largest eigenvalue; at least 100
      times the rounding of the parameters' dtype is taken.
    key: typed PRNG key of the eigenpairs; None is ``jax.random.key(0)``.

  Yields:
    The state at each of the steps.

  Raises:
    ValueError: an argument is out of range, ``steps`` descend, or the first is before
      the state that was given.
    FloatingPointError: the loss or a derivative is not finite.
    ArithmeticError: no covariance holds the eigenvalues at the edge.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, _: 0.25 * (w[0] * w[1] - 1) ** 2
  >>> states = central_flow(loss, jnp.array([1.9, 0.]), 0., 1., [0, 100])
  >>> [round(float(state.eigenvalues[0]), 2) for state in states]  # 2 / eta is 2
  [1.93, 2.0]

  References:
    Cohen et al., Understanding optimization in deep learning with central flows, arXiv
    2410.24206, section 3.
  """
  if not 0 < learning_rate < math.inf:
    raise ValueError(f'learning_rate={learning_rate}: give a finite number above 0')
  if substeps < 2:
    raise ValueError(f'substeps={substeps}: give at least 2')
  if not 0 < critical <= 1:
    raise ValueError(f'critical={critical}: give a share of the edge, from 0 to 1')
  steps = whole_steps(steps)
  start, search = 0, None
  if isinstance(params, CentralState):
    start, search, num_eigenvalues = params.step, params.search, len(params.eigenvalues)
    params = params.params
  if steps and steps[0] < start:
    raise ValueError(f'steps={steps}: the state is at step {start} already')
  params = jax.tree.map(jnp.asarray, products.at_least_float32(params))
  flow = _CentralFlow(
    loss_fn, params, batch, learning_rate, substeps, critical, tol, key, search
  )
  return flow.run(params, num_eigenvalues, steps, start * substeps)


class _CentralFlow:
  """The loop over the Euler steps; what it keeps are the last eigenvectors."""

  def __init__(
    self, loss_fn, params, batch, learning_rate, substeps, critical, tol, key, search
  ):
    self.loss_fn = loss_fn
    self.batch = jax.device_put(batch)
    self.learning_rate = learning_rate
    self.substeps = substeps
    self.threshold = critical * 2 / learning_rate
    dtype = jnp.result_type(*jax.tree.leaves(params))
    tol = max(tol, 100 * float(jnp.finfo(dtype).eps))  # Less may never be reached.
    self.follow = _pairs.Follower(loss_fn, self.batch, 'largest', tol, key, search)
    self.pairs = None

  def run(self, params, num_eigenvalues, steps, done) -> Iterator[CentralState]:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    followed = min(num_eigenvalues, size)
    for step in steps:
      while done <= step * self.substeps:
        followed = self._measure(params, done, followed, size)
        here = self._here(params)
        if done == step * self.substeps:
          break
        params = here.moved
        done += 1
      yield self._state(step, params, here)

  def _measure(self, params, number, followed, size) -> int:
    """Finds the top eigenpairs, as many as it takes to see the end of the critical."""
    while True:
      self.pairs = self.follow(params, followed, number)
      values = np.asarray(self.pairs.eigenvalues, np.float64)
      if not np.isfinite(values).all():
        raise FloatingPointError(f'the eigenvalues are {values} at substep {number}')
      if values[-1] < self.threshold or followed == size:
        return followed
      followed = min(followed + 2, size)

  def _here(self, params) -> _Here:
    values = np.asarray(self.pairs.eigenvalues, np.float64)
    count = int(np.sum(values >= self.threshold))
    vectors = jax.tree.map(lambda leaf: leaf[:count], self.pairs.eigenvectors)
    loss, gradient, slopes = _derivatives(self.loss_fn, params, self.batch, vectors)
    if not math.isfinite(float(loss)):
      raise FloatingPointError(f'the loss is {loss}')
    if count:
      covariance = self._covariance(values[:count], gradient, slopes)
    else:
      covariance = np.zeros((0, 0))
    step = self.learning_rate / self.substeps
    moved = _move(params, gradient, slopes, _of_pairs(covariance), step)
    return _Here(float(loss), covariance, moved)

  def _covariance(self, values, gradient, slopes) -> np.ndarray:
    """X of the next Euler step, from the slopes of the critical block along it."""
    count, length = len(values), self.learning_rate / self.substeps
    rows, columns = np.triu_indices(count)
    pair = np.zeros((count, count), int)
    pair[rows, columns] = pair[columns, rows] = np.arange(len(rows))
    along, products_ = (np.asarray(x, np.float64) for x in _inner(gradient, slopes))
    drift, gram = along[pair], products_[pair[:, :, None, None], pair[None, None]]
    room = np.diag(2 / self.learning_rate - values)
    return solve_complementarity(gram / 2, room / length + drift)

  def _state(self, step, params, here) -> CentralState:
    values = np.asarray(self.pairs.eigenvalues, np.float64)
    inside = float(np.sum(np.diag(here.covariance) * values[: len(here.covariance)]))
    predicted = here.loss + inside / 2
    block = self.follow.block
    return CentralState(
      step, params, here.loss, predicted, values, here.covariance, block
    )


class _Here(NamedTuple):
  loss: float
  covariance: np.ndarray
  moved: Any


def _project(matrix: np.ndarray) -> np.ndarray:
  """The nearest positive semidefinite matrix."""
  values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
  root = vectors * np.sqrt(np.maximum(values, 0))
  return root @ root.T


def _of_pairs(covariance: np.ndarray) -> np.ndarray:
  """The weights of the pairs i <= j in the sum over all i, j."""
  rows, columns = np.triu_indices(len(covariance))
  return covariance[rows, columns] * np.where(rows == columns, 1, 2)


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(loss_fn, params, batch, vectors):
  """Loss, gradient, and the gradients of u_i^T H u_j for the pairs i <= j, a stack."""
  count = jax.tree.leaves(vectors)[0].shape[0]
  slope = lambda at: jax.grad(loss_fn)(at, batch)

  def third(pair):
    """The gradient's second derivative along both, which needs no reverse mode more."""
    u, v = (stacks.take(vectors, index) for index in pair)
    along = lambda at: jax.jvp(slope, (at,), (u,))[1]
    return jax.jvp(along, (params,), (v,))[1]

  with jax.default_matmul_precision('highest'):
    loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
    if not count:
      return loss, gradient, stacks.zeros(gradient, 0)
    return (
      loss,
      gradient,
      jax.lax.map(third, tuple(map(jnp.array, np.triu_indices(count)))),
    )


@jax.jit
def _inner(gradient, slopes):
  """Products of the slopes with the gradient, (p,), and with each other, (p, p)."""
  gram = jax.vmap(lambda slope: stacks.dots(slopes, slope))(slopes)
  return stacks.dots(slopes, gradient), gram


@jax.jit
def _move(params, gradient, slopes, weights, step):
  """An Euler step along gradient + sum of weights * slopes / 2."""
  extra = jax.tree.map(
    lambda leaf: jnp.tensordot(
      weights.astype(leaf.dtype), leaf, axes=1, precision='highest'
    ),
    slopes,
  )
  return jax.tree.map(
    lambda w, g, e: w - jnp.asarray(step, w.dtype) * (g + e / 2),
    params,
    gradient,
    extra,
  )
