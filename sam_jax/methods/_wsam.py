"""WSAM: sharpness as a regularizer with a weight of its own."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent
from sam_jax.methods._declare import Bounds, Radius, method
from sam_jax.methods._sam import SamState, sam


@method()
def wsam(
  rho: Radius = 0.05,
  gamma: Annotated[float, Bounds(least=0, below=1)] = 0.9,
  *,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Weighs sharpness against the loss (the coupled form).

  .. math:: d = g + \frac{\gamma}{1 - \gamma} (g_p - g)

  ``gamma = 0`` is the base optimizer, ``1/2`` is SAM, more than that weighs sharpness
  above the loss. Half-precision clean gradients are taken once more in float32, because
  their rounding is as large as :math:`g_p - g`.

  Args:
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected. A Python 0 returns the updates
      untouched; a traced 0 selects them.
    gamma: weight of sharpness, in [0, 1); 1/2 is SAM.
    perturbation: gradient in, eps-hat at unit radius out; `perturbations.global_norm`
      unless given.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged.

  Returns:
    A transformation with the state of `sam`.

  Raises:
    ValueError: gamma outside [0, 1), and as `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: w ** 2
  >>> tx = optax.chain(sam_jax.wsam(rho=0.1, gamma=0.75), optax.sgd(0.1))
  >>> w = jnp.array(1.0)
  >>> updates, _ = tx.update(
  ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
  >>> round(float(updates), 4)  # -(2 + 3 * 0.2) / 10
  -0.26

  References:
    Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term, 2023, eq. 6 (arXiv:2305.15817).
  """
  weight = _weight(gamma)
  ascend = sam(rho, perturbation=perturbation, axis_name=axis_name)

  def update_fn(updates, state, params=None, **extra_args):
    if ascent.is_off(rho):
      return ascend.update(updates, state, params, **extra_args)
    perturbed, clean, state = ascent.perturbed_and_clean(
      ascend, updates, state, params, **extra_args
    )
    result = jax.tree.map(
      lambda g, p, c: g + weight * (p - c), updates, perturbed, clean
    )
    return ascent.where_on(state.rho, result, updates), state

  return optax.GradientTransformationExtraArgs(ascend.init, update_fn)


class DecoupledWsamState(NamedTuple):
  """State of `decoupled_wsam`: that of `sam`, and that of the base optimizer."""

  sam: SamState
  inner: optax.OptState


@method(flags={'gamma': 'wsam_gamma'})
def decoupled_wsam(
  inner: optax.GradientTransformation,
  learning_rate: ascent.ScalarOrSchedule,
  rho: Radius = 0.05,
  gamma: Annotated[float, Bounds(least=0, below=1)] = 0.9,
  *,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes the base step on the clean gradient and sharpness as a step beside it.

  .. math:: w \leftarrow w + \text{inner}(g) -
            \eta \frac{\gamma}{1 - \gamma} (g_p - g)

  so that sharpness does not pass through the momentum and preconditioner of the base
  optimizer, as decoupled weight decay does not. Over plain SGD, ``gamma = 1/2`` is SAM.
  It wraps the whole base chain, because it follows it.

  Args:
    inner: the base chain, with its learning rate, weight decay and, under a mapped
      axis, `cross_replica_mean` first.
    learning_rate: eta of the sharpness step; a number or a schedule of the count.
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected. A Python 0 returns the updates
      untouched; a traced 0 selects them.
    gamma: weight of sharpness, in [0, 1); over plain SGD 1/2 is SAM.
    perturbation: gradient in, eps-hat at unit radius out; `perturbations.global_norm`
      unless given.
    axis_name: the mapped axis: the sharpness step is averaged over it too.

  Returns:
    A transformation whose updates go straight to `optax.apply_updates`.

  Raises:
    ValueError: gamma outside [0, 1), a learning rate that is not finite, and as `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: w ** 2
  >>> tx = sam_jax.decoupled_wsam(optax.sgd(0.1), 0.1, rho=0.1, gamma=0.75)
  >>> w = jnp.array(1.0)
  >>> updates, _ = tx.update(
  ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
  >>> round(float(updates), 4)
  -0.26

  References:
    Yue et al., 2023, algorithm 1 (arXiv:2305.15817).
  """
  weight = _weight(gamma)
  if not callable(learning_rate):
    ascent.check_finite(learning_rate=learning_rate)
  ascent.check_transformation(inner, 'inner')
  inner = optax.with_extra_args_support(inner)
  ascend = sam(rho, perturbation=perturbation, axis_name=axis_name)

  def init_fn(params):
    return DecoupledWsamState(ascend.init(params), inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    if ascent.is_off(rho):
      _, sam_state = ascend.update(updates, state.sam, params, **extra_args)
      step, inner_state = inner.update(updates, state.inner, params, **extra_args)
      return step, DecoupledWsamState(sam_state, inner_state)
    perturbed, clean, sam_state = ascent.perturbed_and_clean(
      ascend, updates, state.sam, params, **extra_args
    )
    gap = jax.tree.map(jnp.subtract, perturbed, clean)
    if axis_name is not None:
      gap = jax.lax.pmean(gap, axis_name)
    rate = ascent.resolve(learning_rate, state.sam.count)
    step, inner_state = inner.update(updates, state.inner, params, **extra_args)
    flatter = jax.tree.map(lambda s, d: s - rate * weight * d, step, gap)
    return (
      ascent.where_on(sam_state.rho, flatter, step),
      DecoupledWsamState(sam_state, inner_state),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weight(gamma: float) -> float:
  if not isinstance(gamma, jax.Array) and not 0 <= gamma < 1:
    raise ValueError(f'gamma must be in [0, 1), got {gamma}: 0.5 is SAM.')
  return gamma / (1 - gamma)
