"""Friendly SAM: the ascent step along the batch's own noise."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations
from sam_jax.methods._declare import Bounds, Radius, method
from sam_jax.methods._sam import sam


class FriendlyState(NamedTuple):
  """State of the perturbation of `friendly_sam`.

  Attributes:
    started: bool, whether an update has been made.
    average: moving average of the gradients, in at least float32.
    rule: state of the transformation that makes a perturbation of d.
  """

  started: jax.Array
  average: optax.Updates
  rule: optax.OptState


@method(flags={'sigma': 'friendly_sigma', 'decay': 'friendly_decay'})
def friendly_sam(
  rho: Radius = 0.05,
  sigma: float = 1.0,
  decay: Annotated[float, Bounds(least=0, below=1)] = 0.9,
  *,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Removes the full-batch direction, estimated by an average, from the perturbation.

  .. math:: d_t = g_t - \sigma m_{t-1}, \qquad
            \hat\epsilon = \rho \, d_t / \|d_t\|, \qquad
            m_t = \lambda m_{t-1} + (1 - \lambda) g_t

  The first update is plain SAM and sets :math:`m_0 = g_0`. This is the order of the
  authors' code. Algorithm 1 of the paper updates the average first and takes
  :math:`m_t` in place of :math:`m_{t-1}`, which holds a part of :math:`g_t` itself.

  Args:
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected. A Python 0 returns the updates
      untouched; a traced 0 selects them.
    sigma: share of the average gradient that is removed; 0 is SAM.
    decay: decay lambda of the average gradient; the paper's runs have 0.6.
    perturbation: makes eps-hat at unit radius of d, in place of
      :math:`d_t / \|d_t\|`; the average is still that of the gradients themselves. It
      receives the parameters and the extra arguments. `perturbations.global_norm`
      unless given.
    axis_name: the mapped axis: the average is taken over it too.

  Returns:
    A transformation with the state of `sam`; the average is in ``perturbation``, and
    so is the state of the argument of that name, as ``rule``.

  Raises:
    ValueError: decay outside [0, 1], sigma that is not finite, and as `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 4)
  >>> tx = optax.chain(sam_jax.friendly_sam(rho=0.05), optax.sgd(0.1))
  >>> w = jnp.array([1.0, -1.0])
  >>> opt_state = tx.init(w)
  >>> updates, opt_state = tx.update(
  ...     jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss))
  >>> optax.tree.get(opt_state, 'average').tolist()
  [4.0, -4.0]

  References:
    Li et al., Friendly Sharpness-Aware Minimization, 2024
    (arXiv:2403.12350).
  """
  if not isinstance(decay, jax.Array) and not 0 <= decay <= 1:
    raise ValueError(f'decay must be in [0, 1], got {decay}.')
  ascent.check_finite(sigma=sigma)
  rule = ascent.unit_perturbation(perturbation)

  def init_fn(params):
    average = ascent.zeros_like(params)
    return FriendlyState(jnp.zeros([], bool), average, rule.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    mean = updates if axis_name is None else jax.lax.pmean(updates, axis_name)

    def after_first(later, first):
      return jax.tree.map(lambda x, y: jnp.where(state.started, x, y), later, first)

    direction = after_first(
      jax.tree.map(lambda g, m: g - sigma * m, updates, state.average), updates
    )
    moved = jax.tree.map(lambda g, m: decay * m + (1 - decay) * g, mean, state.average)
    average = after_first(moved, mean)
    # One gradient that is not finite must not stay in the average for ever.
    new = (jnp.ones([], bool), average)
    kept = perturbations.where_finite(new, (state.started, state.average))
    eps, rule_state = rule.update(direction, state.rule, params, **extra_args)
    return eps, FriendlyState(*kept, rule_state)

  along_noise = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return sam(rho, perturbation=along_noise, axis_name=axis_name)
