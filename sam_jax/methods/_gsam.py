"""GSAM: surrogate-gap guided sharpness-aware minimization."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent
from sam_jax.methods._declare import Bounds, Radius, method
from sam_jax.methods._sam import sam


@method()
def gsam(
  rho: Radius = 0.05,
  alpha: float = 0.4,
  *,
  rho_min: Annotated[float, Bounds(least=0)] | None = None,
  learning_rate: optax.Schedule | None = None,
  total_steps: int | None = None,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Descends on the perturbed loss and ascends on the clean one across it.

  .. math:: d = g_p - \alpha \, (g - \langle g, u \rangle u), \qquad u = g_p / \|g_p\|

  The part of the clean gradient orthogonal to :math:`g_p` is subtracted, which shrinks
  the surrogate gap :math:`L(w + \hat\epsilon) - L(w)` and leaves the descent on the
  perturbed loss as it is. Under a mapped axis each replica decomposes its own
  gradients; `cross_replica_mean` after this averages the results.

  Args:
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected. A Python 0 returns the updates
      untouched; a traced 0 selects them.
    alpha: share of the orthogonal part that is subtracted; 0 is SAM.
    rho_min: radius at the smallest learning rate, where ``rho`` is that at the largest;
      unset, ``rho`` holds throughout. Given, `gsam_rho` ties the radius to
      ``learning_rate``.
    learning_rate: the schedule of the learning rate; needed with ``rho_min`` only.
    total_steps: number of updates over which the smallest and largest learning rates
      are taken; needed with ``rho_min`` only.
    perturbation: gradient in, eps-hat at unit radius out; `perturbations.global_norm`
      unless given.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged.

  Returns:
    A transformation with the state of `sam`.

  Raises:
    ValueError: alpha that is not finite; rho_min without a schedule and a number of
      updates, above rho or beside a schedule of rho; and as `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: w[0] ** 2 + 2 * w[1] ** 2
  >>> tx = optax.chain(sam_jax.gsam(rho=0.1, alpha=0.4), optax.sgd(0.1))
  >>> w = jnp.array([1.0, 1.0])
  >>> updates, _ = tx.update(
  ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
  >>> [round(float(x), 4) for x in updates]
  [-0.2063, -0.4371]

  References:
    Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, 2022,
    algorithm 1 (arXiv:2203.08065).
  """
  ascent.check_finite(alpha=alpha)
  if rho_min is not None:
    rho = _tied_rho(rho, rho_min, learning_rate, total_steps)
  return ascent.combine(
    sam(rho, perturbation=perturbation, axis_name=axis_name),
    lambda clean, perturbed: jax.tree.map(
      lambda d, g: d - alpha * g, perturbed, ascent.reject(clean, perturbed)
    ),
  )


def _tied_rho(rho, rho_min, learning_rate, total_steps) -> optax.Schedule:
  """The schedule of rho over the range that a learning rate has in a run."""
  if not callable(learning_rate) or total_steps is None or callable(rho):
    raise ValueError(
      'gsam(rho_min=...) ties rho to the learning rate: give learning_rate as a '
      'schedule, total_steps, and rho as a number.'
    )
  ascent.check_rho(rho)
  ascent.check_positive(total_steps=total_steps)
  # Evaluated at once also inside jit, unless the schedule itself is traced.
  with jax.ensure_compile_time_eval():
    rates = jax.vmap(learning_rate)(jnp.arange(total_steps))
    low, high = rates.min(), rates.max()
  if not isinstance(low, jax.core.Tracer):
    low, high = float(low), float(high)
  return gsam_rho(
    learning_rate,
    learning_rate_min=low,
    learning_rate_max=high,
    rho_min=rho_min,
    rho_max=rho,
  )


def gsam_rho(
  learning_rate: optax.Schedule,
  *,
  learning_rate_min: float | jax.Array,
  learning_rate_max: float | jax.Array,
  rho_min: float | jax.Array,
  rho_max: float | jax.Array,
) -> optax.Schedule:
  r"""The schedule of rho that GSAM ties to that of the learning rate.

  .. math:: \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
            \frac{\eta_t - \eta_{min}}{\eta_{max} - \eta_{min}}

  Args:
    learning_rate: a schedule of the update count.
    learning_rate_min: its smallest value.
    learning_rate_max: its largest value; where both are equal rho is ``rho_max``.
    rho_min: the radius at the smallest learning rate.
    rho_max: the radius at the largest.

  Returns:
    A schedule for ``gsam(rho=...)``.

  Raises:
    ValueError: a maximum below its minimum, or a negative radius; the values of JAX
      arrays are not looked at.

  >>> import optax, sam_jax
  >>> rho = sam_jax.gsam_rho(
  ...     optax.linear_schedule(1.0, 0.0, 10), learning_rate_min=0.0,
  ...     learning_rate_max=1.0, rho_min=0.02, rho_max=0.04)
  >>> round(float(rho(5)), 4)
  0.03

  References:
    Zhuang et al., 2022, section 4 (arXiv:2203.08065).
  """
  ascent.check_rho(rho_min, 'rho_min')
  ascent.check_rho(rho_max, 'rho_max')
  for name, low, high in (
    ('learning_rate', learning_rate_min, learning_rate_max),
    ('rho', rho_min, rho_max),
  ):
    ascent.check_finite(**{f'{name}_min': low, f'{name}_max': high})
    if not isinstance(high - low, jax.Array) and high < low:
      raise ValueError(f'{name}_max must be at least {name}_min, got {high} < {low}.')
  span = learning_rate_max - learning_rate_min
  if not isinstance(span, jax.Array):
    if span == 0:
      return optax.constant_schedule(rho_max)
    slope = (rho_max - rho_min) / span
    return lambda count: rho_min + slope * (learning_rate(count) - learning_rate_min)
  flat = span == 0
  slope = (rho_max - rho_min) / jnp.where(flat, 1, span)

  def rho(count):
    tied = rho_min + slope * (learning_rate(count) - learning_rate_min)
    return jnp.where(flat, rho_max, tied)

  return rho
