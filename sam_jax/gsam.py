"""GSAM: surrogate-gap guided sharpness-aware minimization."""

from __future__ import annotations

import jax
import optax

from sam_jax import ascent
from sam_jax.sam import sam


def gsam(
  rho: ascent.ScalarOrSchedule = 0.05,
  alpha: float = 0.4,
  *,
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
    rho: as in `sam`; `gsam_rho` is the paper's schedule.
    alpha: share of the orthogonal part that is subtracted; 0 is SAM.
    perturbation: as in `sam`.
    axis_name: as in `sam`.

  Returns:
    A transformation with the state of `sam`.

  Raises:
    ValueError: as `sam`.
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
  return ascent.combine(
    sam(rho, perturbation=perturbation, axis_name=axis_name),
    lambda clean, perturbed: jax.tree.map(
      lambda d, g: d - alpha * g, perturbed, ascent.reject(clean, perturbed)
    ),
  )


def gsam_rho(
  learning_rate: optax.Schedule,
  *,
  learning_rate_min: float,
  learning_rate_max: float,
  rho_min: float,
  rho_max: float,
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
    ValueError: a maximum below its minimum, or a negative radius.

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
  for name, low, high in (
    ('learning_rate', learning_rate_min, learning_rate_max),
    ('rho', rho_min, rho_max),
  ):
    if high < low:
      raise ValueError(f'{name}_max must be at least {name}_min, got {high} < {low}.')
  if learning_rate_max == learning_rate_min:
    return optax.constant_schedule(rho_max)
  slope = (rho_max - rho_min) / (learning_rate_max - learning_rate_min)
  return lambda count: rho_min + slope * (learning_rate(count) - learning_rate_min)
