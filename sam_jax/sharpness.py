r"""Sharpness as SAM defines it: how far the loss rises near the parameters.

All is measured of the data that is given, in the geometry of a diagonal matrix
:math:`T`: the identity or, adaptively, :math:`|w|` on the parameters that ``weights``
names. With every parameter, the default, the result does not change when a ReLU
network's layers are rescaled without changing its function. The largest eigenvalue of
the Hessian is in `sam_jax.curvature`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import perturbations, placing, probes
from sam_jax.curvature import basis, operators
from sam_jax.curvature.estimates import Estimate
from sam_jax.curvature.operators import Batch, LossFn, Params

Norm = Literal['l2', 'linf']


def worst_case(
  loss_fn: LossFn,
  params: Params,
  batches: Iterable[Batch],
  rho: float,
  *,
  norm: Norm = 'l2',
  adaptive: bool = False,
  weights: perturbations.WeightsMask = True,
  shared: bool = False,
  num_steps: int = 20,
  step_size: float | None = None,
  num_restarts: int = 1,
  key: jax.Array | None = None,
  weight: Callable[[Batch], float] | None = None,
) -> Estimate:
  r"""The largest rise of the loss within a ball, found by projected gradient ascent.

  .. math:: \max_{\|T^{-1} \epsilon\| \le \rho} L(w + \epsilon) - L(w)

  Each batch is a group with a maximiser of its own, whose size is the m of m-sharpness,
  and the mean over groups is given. The first step from w is that of SAM (of ASAM's
  every-parameter rule, if adaptive), and the best point met counts: the value is a
  lower bound of the maximum that more steps and restarts raise. Steps have a fixed
  length, so that the gradient's size does not matter. Where the gradient is 0, at a
  minimum, no step is made: take restarts there.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch. Give
      the same function object to several calls and it is compiled once.
    params: w, any pytree. Leaves narrower than float32 are widened to float32.
    batches: as for `curvature.hessian`; for m-sharpness, groups of m examples.
    rho: radius of the ball in the units of :math:`T^{-1} \epsilon`.
    norm: 'l2', over all parameters together, or 'linf', the largest of them.
    adaptive: whether T is :math:`|w|` on weights, and not the identity.
    weights: which leaves are weights: True for all, None for those that
      `layouts.automatic` takes for weights, a `layouts.Layout`, a tree of bools, or a
      function from the parameters to such a tree. T is 1 on the others.
    shared: take one maximiser for the mean loss over all batches.
    num_steps: gradients from each start.
    step_size: length of a step in the norm and the units of rho; None is rho, with
      which the first step is SAM's.
    num_restarts: number of starts; the first is w, the others are random points of the
      ball.
    key: typed PRNG key of these; None is ``jax.random.key(0)``.
    weight: number of examples of a batch, by which groups are weighted; None is its
      leading dimension.

  Returns:
    The mean rise over groups and its standard error over groups. That is 0 with one
    group or ``shared``, where no average is taken: it says nothing of how near the
    maximum is. ``num_matvecs`` is 0.

  Raises:
    ValueError: an argument is out of range, or there are no examples.
    NonFiniteError: a loss on the way is NaN.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, x: jnp.mean(x) * jnp.sum(w ** 2)
  >>> rise = worst_case(loss, jnp.array([3., 4.]), [jnp.ones(2)], rho=0.5)
  >>> round(rise.value, 4)  # 5.5^2 - 5^2
  5.25

  References:
    Foret et al., Sharpness-Aware Minimization, arXiv 2010.01412; Andriushchenko and
    Flammarion, Towards understanding SAM, arXiv 2206.06232 (m-sharpness);
    Andriushchenko et al., A modern look at the relationship between sharpness and
    generalization, arXiv 2302.07011; Kwon et al., ASAM, arXiv 2102.11600.
  """
  if norm not in ('l2', 'linf'):
    raise ValueError(f"norm={norm!r}: give 'l2' or 'linf'")
  step_size = rho if step_size is None else step_size
  _require_at_least(0, rho=rho, step_size=step_size)
  _require_at_least(1, num_steps=num_steps, num_restarts=num_restarts)
  scaled = _scaled(adaptive, weights, params)
  params = _widened(params)
  batches = operators.WeightedBatches(batches, weight)
  groups = [(batches, 1.0)] if shared else (([(b, 1.0)], share) for b, share in batches)
  key = jax.random.key(0) if key is None else key
  rises, shares = [], []
  with jax.default_matmul_precision('highest'):
    for index, (group, share) in enumerate(groups):
      starts = _starts(norm, params, rho, num_restarts, jax.random.fold_in(key, index))
      ascent = functools.partial(_ascend, norm, rho, step_size)
      function = functools.partial(_mean, loss_fn, scaled, params, group)
      rises.append(float(_highest_rise(function, ascent, starts, num_steps)))
      shares.append(share)
  return _over_groups(np.array(rises), np.array(shares))


def average_case(
  loss_fn: LossFn,
  params: Params,
  batches: Iterable[Batch],
  sigma: float,
  *,
  adaptive: bool = False,
  weights: perturbations.WeightsMask = True,
  num_samples: int = 20,
  key: jax.Array | None = None,
  antithetic: bool = True,
  weight: Callable[[Batch], float] | None = None,
) -> Estimate:
  r"""The mean rise of the loss under Gaussian noise in the parameters.

  .. math:: \mathbb{E}_z\, L(w + \sigma T z) - L(w), \qquad z \sim N(0, I)

  For a small sigma it is :math:`\sigma^2 \mathrm{tr}(T H T) / 2`. An antithetic sample
  is the mean over :math:`\pm z`: its gradient term, most of the variance, drops out.

  Args:
    loss_fn: as in `worst_case`.
    params: w; as in `worst_case`.
    batches: the data over which L is the mean loss; as for `curvature.hessian`.
    sigma: standard deviation of the noise in units of T.
    adaptive: whether T is :math:`|w|` on weights, and not the identity.
    weights: which leaves are weights: True for all, None for those that
      `layouts.automatic` takes for weights, a `layouts.Layout`, a tree of bools, or a
      function from the parameters to such a tree. T is 1 on the others.
    num_samples: number of samples, at least 2.
    key: typed PRNG key of the samples; None is ``jax.random.key(0)``.
    antithetic: whether a sample is a pair, at twice the cost.
    weight: number of examples of a batch; None is its leading dimension.

  Returns:
    The mean rise and its standard error over samples, a pair counting as one.
    ``num_matvecs`` is 0.

  Raises:
    ValueError: an argument is out of range, or there are no examples.
    NonFiniteError: a loss is NaN.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, x: 0.5 * jnp.mean(x) * jnp.sum(w ** 2)
  >>> rise = average_case(loss, jnp.ones(50), [jnp.ones(2)], sigma=0.1)
  >>> abs(rise.value - 0.1 ** 2 * 50 / 2) < 4 * rise.standard_error
  True

  References:
    Andriushchenko et al., A modern look at the relationship between sharpness and
    generalization, arXiv 2302.07011.
  """
  _require_at_least(0, sigma=sigma)
  _require_at_least(2, num_samples=num_samples)
  scaled = _scaled(adaptive, weights, params)
  params = _widened(params)
  batches = operators.WeightedBatches(batches, weight)
  key = jax.random.key(0) if key is None else key
  signs = (1, -1) if antithetic else (1,)
  with jax.default_matmul_precision('highest'):
    mean = lambda at: sum(float(_loss(loss_fn, at, b)) * share for b, share in batches)
    start = mean(params)
    samples = []
    for index in range(num_samples):
      noise = probes.gaussian(jax.random.fold_in(key, index), params)
      points = (_moved(scaled, params, noise, sign * sigma) for sign in signs)
      samples.append(sum(map(mean, points)) / len(signs) - start)
  error = np.std(samples, ddof=1) / math.sqrt(num_samples)
  return _estimate(np.mean(samples), error)


def _highest_rise(function, ascend, starts, num_steps):
  """The best value of a function on the way up, less that at the first start."""
  values = []
  for u in starts:
    for _ in range(num_steps):
      value, grads = function(u)
      values.append(value)
      u = ascend(u, grads)
    values.append(function(u)[0])
  return jnp.max(jnp.stack(values)) - values[0]


def _starts(norm, params, rho, count, key) -> Iterator[Params]:
  """w itself, then random points of the ball."""
  yield jax.tree.map(jnp.zeros_like, params)
  leaves, treedef = jax.tree.flatten(params)
  described = tuple(map(placing.described, leaves))
  for index in range(1, count):
    yield jax.tree.unflatten(
      treedef, _random_point(norm, described, jax.random.fold_in(key, index), rho)
    )


def _mean(loss_fn, scaled, params, group, u):
  """Mean loss over a group of batches at w + T u, and its gradient by u."""
  total = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
  for batch, share in group:
    total = _add(loss_fn, scaled, params, u, batch, share, total)
  return total


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def _add(loss_fn, scaled, params, u, batch, share, total):
  loss = lambda u: loss_fn(_moved(scaled, params, u, 1), batch)
  return jax.tree.map(
    lambda t, x: t + share * x.astype(t.dtype), total, jax.value_and_grad(loss)(u)
  )


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn, params, batch):
  return loss_fn(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _moved(scaled, params, u, factor):
  leaves, treedef = jax.tree.flatten(params)
  moved = [
    w + factor * (jnp.abs(w) * x if yes else x)
    for yes, w, x in zip(scaled, leaves, jax.tree.leaves(u), strict=True)
  ]
  return jax.tree.unflatten(treedef, moved)


def _scaled(adaptive, weights, params) -> tuple[bool, ...]:
  """Whether T is |w|, of each leaf."""
  if not adaptive:
    return (False,) * len(jax.tree.leaves(params))
  mask = perturbations.weights_mask(weights, params)
  # Leaves in the order of the parameters, whatever the mask is made of.
  return tuple(map(bool, jax.tree.leaves(jax.tree.map(lambda _, m: m, params, mask))))


@functools.partial(jax.jit, static_argnums=0)
def _ascend(norm, rho, step_size, u, grads):
  """A step of fixed length up the gradient, and back to the ball."""
  if norm == 'linf':
    return jax.tree.map(
      lambda x, g: jnp.clip(x + step_size * jnp.sign(g), -rho, rho), u, grads
    )
  step = perturbations.on_sphere(grads, step_size)
  return _into_ball(jax.tree.map(jnp.add, u, step), rho)


def _into_ball(u, rho):
  factor = rho * perturbations.safe_reciprocal(perturbations.norm(u))
  return jax.tree.map(lambda x: jnp.where(factor < 1, factor, 1) * x, u)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_point(norm, leaves, key, rho):
  """The leaves of a point drawn uniformly from the ball."""
  if norm == 'linf':
    return [rho * x for x in probes.uniform_cube(1.0)(key, leaves)]
  direction = list(probes.gaussian(key, leaves))
  size = sum(leaf.size for leaf in leaves)
  share = jax.random.uniform(jax.random.fold_in(key, 1)) ** (1 / size)
  return perturbations.on_sphere(direction, share * rho)


def _over_groups(rises: np.ndarray, shares: np.ndarray) -> Estimate:
  mean = float(rises @ shares)
  count = len(rises)
  # For groups of one size the standard deviation over the root of their number.
  spread = (shares**2) @ (rises - mean) ** 2 * count / max(count - 1, 1)
  return _estimate(mean, math.sqrt(spread) if count > 1 else 0.0)


def _estimate(value: float, error: float) -> Estimate:
  if math.isnan(value):
    raise basis.NonFiniteError(
      'a loss near the parameters is NaN: check the loss at the parameters, and lower '
      'the radius'
    )
  return Estimate(float(value), float(error), 0)


def _widened(params: Params) -> Params:
  return perturbations.at_least_float32(jax.tree.map(jnp.asarray, params))


def _require_at_least(least: float, **values: float) -> None:
  for name, value in values.items():
    if not least <= value < math.inf:
      raise ValueError(f'{name}={value}: give a finite number of at least {least}')
