"""LookSAM: the ascent step every k updates only."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations, varying
from sam_jax.methods._declare import Bounds, Radius, method
from sam_jax.methods._sam import SamState, sam


class LookSamState(NamedTuple):
  """State of `looksam`: the record, the perturbation's state, and the direction g_v."""

  count: jax.Array
  rho: jax.Array
  gradient_norm: jax.Array
  perturbed_loss: jax.Array
  perturbation: optax.OptState
  direction: optax.Updates

  is_periodic = True


@method(period='every')
def looksam(
  rho: Radius = 0.05,
  every: Annotated[int, Bounds(least=1)] = 5,
  alpha: float = 0.7,
  *,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes the ascent step every k updates and reuses what it found in between.

  On updates 0, k, 2k, ... the result is SAM's :math:`g_p`, and the part of it
  orthogonal to the clean gradient is kept; on the others it is added back:

  .. math:: g_v = g_p - \langle g_p, u \rangle u, \quad u = g / \|g\|; \qquad
            d = g + \alpha \frac{\|g\|}{\|g_v\|} g_v

  Cost: 1 + 1/k gradients an update. :math:`g_v` counts as zero where
  :math:`\|g_v\| \le 100 \, \epsilon_{machine} \|g_p\|`: below that it is rounding
  noise, which the rescaling would turn into a direction. Half-precision clean gradients
  are taken once more in float32 on an ascent step, because of that noise.

  ``tx.update`` takes ``phase``: True for an update with the ascent step, False for one
  without, None (the default) to decide by `jax.lax.cond` on the count. A Python bool
  compiles the one branch only.

  Args:
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected. A Python 0 returns the updates
      untouched; a traced 0 selects them.
    every: number of updates k from one ascent step to the next.
    alpha: size of the reused direction relative to the clean gradient.
    perturbation: gradient in, eps-hat at unit radius out; `perturbations.global_norm`
      unless given. With `perturbations.layerwise` this is Look-LayerSAM of the same
      paper, and ``rho`` is relative to the norm of each layer.
    axis_name: the mapped axis: the direction kept in the state is averaged over it.

  Returns:
    A transformation; ``perturbed_loss`` keeps the value of the last ascent step.

  Raises:
    ValueError: every < 1, alpha that is not finite, and as `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: w[0] ** 2 + 2 * w[1] ** 2
  >>> tx = optax.chain(sam_jax.looksam(rho=0.1, every=2), optax.sgd(0.1))
  >>> w = jnp.array([1.0, 1.0])
  >>> opt_state = tx.init(w)
  >>> for phase in (True, False):
  ...   updates, opt_state = tx.update(
  ...       jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss), phase=phase)
  >>> [round(float(x), 4) for x in updates]
  [0.08, -0.54]

  References:
    Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, 2022,
    algorithm 1 (arXiv:2203.02714).
  """
  ascent.check_positive(every=every)
  ascent.check_finite(alpha=alpha)
  ascend = sam(rho, perturbation=perturbation, axis_name=axis_name)

  def init_fn(params):
    state = ascend.init(params)
    return LookSamState(*state, direction=ascent.zeros_like(params))

  def update_fn(updates, state, params=None, *, phase=None, **extra_args):

    def with_ascent():
      perturbed, clean, new = ascent.perturbed_and_clean(
        ascend, updates, _sam_state(state), params, **extra_args
      )
      kept = _significant(ascent.reject(perturbed, clean), perturbed)
      if axis_name is not None:
        kept = jax.lax.pmean(kept, axis_name)
      kept = ascent.cast_like(kept, state.direction)
      kept = perturbations.where_finite(kept, state.direction)
      perturbed = ascent.where_on(new.rho, perturbed, updates)
      return perturbed, LookSamState(*new, direction=kept)

    def without_ascent():
      total, scale = perturbations.squares(state.direction)
      factor = (
        alpha
        * perturbations.norm(updates)
        * perturbations.safe_reciprocal(jnp.sqrt(total))
      )
      reused = jax.tree.map(
        lambda g, v: (g + factor * perturbations.scaled(v, scale)).astype(g.dtype),
        updates,
        state.direction,
      )
      radius = ascent.resolve(rho, state.count)
      record = ascent.next_record(
        state,
        rho=radius,
        updates=updates,
        perturbed_loss=state.perturbed_loss,
        axis_name=axis_name,
      )
      rest = {'perturbation': state.perturbation, 'direction': state.direction}
      return ascent.where_on(radius, reused, updates), LookSamState(*record, **rest)

    if phase is None:
      ascends = state.count % every == 0
      return varying.cond(ascends, with_ascent, without_ascent)
    return with_ascent() if phase else without_ascent()

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _sam_state(state: LookSamState) -> SamState:
  return SamState(*state[: len(SamState._fields)])


def _significant(part: optax.Updates, whole: optax.Updates) -> optax.Updates:
  """``part``, or zero where it is within rounding of ``whole``."""
  dtypes = [x.dtype for x in jax.tree.leaves(whole)]
  epsilon = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
  keep = perturbations.norm(part) > 100 * epsilon * perturbations.norm(whole)
  return jax.tree.map(lambda x: jnp.where(keep, x, jnp.zeros_like(x)), part)
