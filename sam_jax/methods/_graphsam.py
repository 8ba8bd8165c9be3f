"""GraphSAM: the perturbation as a moving average of the updating gradients."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations, varying
from sam_jax.methods import _foreknown
from sam_jax.methods._declare import Bounds, Radius, method


class GraphSamState(NamedTuple):
  """State of `graphsam`: the record, the radius of the next gradient, the average m.

  Attributes:
    next_rho: 0 before the first update of an epoch, whose gradient is taken at w.
    average: m, in at least float32.
    perturbation: state of the perturbation, which is ``rule`` unless that is None.
  """

  count: jax.Array
  rho: jax.Array
  gradient_norm: jax.Array
  perturbed_loss: jax.Array
  next_rho: jax.Array
  average: optax.Updates
  perturbation: optax.OptState

  rule = None

  def gradient_point(self, params: optax.Params) -> optax.Params:
    """``params + rho m / |m|``, or plus the rule's step, in at least float32."""
    rho, m = self.next_rho, self.average
    if self.rule is None:
      return ascent.perturb(params, perturbations.on_sphere(m, rho))
    eps = _foreknown.step(self.rule, m, self.perturbation, params, rho)
    return ascent.perturb(params, eps)


@method(
  one_gradient=True,
  period='steps_per_epoch',
  flags={'epochs_per_decay': 'graphsam_epochs'},
)
def graphsam(
  rho: Radius = 0.05,
  beta: Annotated[float, Bounds(least=0, below=1)] = 0.99,
  gamma: Annotated[float, Bounds(least=0)] = 0.5,
  epochs_per_decay: Annotated[int, Bounds(least=1)] = 1,
  *,
  steps_per_epoch: int,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Re-anchors the perturbation once an epoch and follows the gradients in between.

  On the first update of an epoch :math:`m = g / \|g\|` and two gradients are taken; on
  the others one, with :math:`g_s` the updating gradient of the update before:

  .. math:: m \leftarrow \beta m + (1 - \beta) g_s / \|g_s\|, \qquad
            \hat\epsilon = \rho \gamma^{\lfloor epoch / \lambda \rfloor} m / \|m\|

  Norms are over the whole tree. The authors' code takes them leaf by leaf and anchors
  on the raw :math:`g`; with an anchor of unit norm :math:`\beta` weighs alike whatever
  the size of the gradient. The radius of a point is fixed by the update before it: a
  schedule of rho allows for that, an injected rho lags by one update.

  The caller takes the incoming gradient at
  ``sam_jax.gradient_point(opt_state, params)``: w on the first update of an epoch,
  w + eps-hat on the others. Cost: 1 + 1 / steps_per_epoch gradients an update.

  ``tx.update`` takes ``phase``: True for the first update of an epoch, False for the
  others, None (the default) to decide by `jax.lax.cond` on the count.

  Args:
    rho: radius of the perturbation in the first epoch, in the units of the parameters.
      It is a number, a schedule of the update count, or injected.
    beta: decay of the average of gradients.
    gamma: factor on the radius every ``epochs_per_decay`` epochs. With the paper's 0.5
      the radius is 5e-5 after ten epochs; 1 keeps it.
    epochs_per_decay: number of epochs lambda from one decay of the radius to the next.
    steps_per_epoch: updates in an epoch.
    perturbation: makes eps-hat at unit radius of the average m, in place of
      :math:`m / \|m\|`, and of the anchor on the first update of an epoch; m itself
      stays that of unit gradients. `perturbations.global_norm` unless given. It is
      called with the parameters, without extra arguments: by ``gradient_point`` for
      eps-hat, and by ``update`` once more for its state.
    axis_name: the mapped axis: m is averaged over it.

  Returns:
    A transformation. ``perturbed_loss`` is that of the gradient function on the first
    update of an epoch, and the extra argument ``value`` on the others.

  Raises:
    ValueError: steps_per_epoch or epochs_per_decay < 1, a negative gamma, beta outside
      [0, 1), either not finite, and as `sam`.
    TypeError: perturbation is no transformation, and as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 4)
  >>> tx = optax.chain(sam_jax.graphsam(steps_per_epoch=2), optax.sgd(0.01))
  >>> w = jnp.array([1.0, -1.0])
  >>> opt_state = tx.init(w)
  >>> for _ in range(4):
  ...   point = sam_jax.gradient_point(opt_state, w)
  ...   updates, opt_state = tx.update(
  ...       jax.grad(loss)(point), opt_state, w, grad_fn=jax.grad(loss))
  ...   w = optax.apply_updates(w, updates)
  >>> round(float(optax.tree.get(opt_state, 'rho')), 4)  # halved in the second epoch
  0.025

  References:
    Wang et al., Efficient Sharpness-Aware Minimization for Molecular Graph Transformer
    Models, 2024, algorithm 1 (arXiv:2406.13137).
  """
  ascent.check_rho(rho)
  ascent.check_finite(beta=beta, gamma=gamma)
  if not isinstance(beta, jax.Array) and not 0 <= beta < 1:
    raise ValueError(f'beta must be at least 0 and below 1, got {beta}.')
  if not isinstance(gamma, jax.Array) and gamma < 0:
    raise ValueError(f'gamma must not be negative, got {gamma}: it scales the radius.')
  ascent.check_positive(
    steps_per_epoch=steps_per_epoch, epochs_per_decay=epochs_per_decay
  )
  State = _foreknown.state_type(GraphSamState, perturbation)

  def radius_at(count):
    epoch = count // steps_per_epoch
    return ascent.resolve(rho, count) * gamma ** (epoch // epochs_per_decay)

  def init_fn(params):
    record = ascent.init_record(params)
    average = jax.tree.map(jnp.zeros_like, perturbations.at_least_float32(params))
    held = _foreknown.init(State.rule, params)
    return State(*record, jnp.zeros_like(record.rho), average, held)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    grad_fn=None,
    value_and_grad_fn=None,
    value=0.0,
    phase=None,
    **extra_args,
  ):
    del extra_args
    evaluate = ascent.gradient_function(params, grad_fn, value_and_grad_fn, updates)
    radius = jnp.asarray(radius_at(state.count), state.rho.dtype)

    def stepped(along):
      return _foreknown.advance(State.rule, along, state.perturbation, params)

    def first_of_epoch():
      mean = updates if axis_name is None else jax.lax.pmean(updates, axis_name)
      anchor = perturbations.on_sphere(perturbations.at_least_float32(mean))
      eps = perturbations.scale_tree(anchor, radius)
      if State.rule is not None:
        eps = _foreknown.step(State.rule, anchor, state.perturbation, params, radius)
      loss, grads = evaluate(ascent.perturb(params, eps))
      grads = ascent.cast_like(grads, updates)
      return jnp.asarray(loss, state.rho.dtype), grads, anchor, stepped(anchor)

    def later():
      along = state.average
      return jnp.asarray(value, state.rho.dtype), updates, along, stepped(along)

    if phase is None:
      is_first = state.count % steps_per_epoch == 0
      found = varying.cond(is_first, first_of_epoch, later)
    else:
      found = first_of_epoch() if phase else later()
    loss, grads, average, held = found

    grads = ascent.where_on(radius, grads, updates)
    mean = grads if axis_name is None else jax.lax.pmean(grads, axis_name)
    newest = perturbations.on_sphere(perturbations.at_least_float32(mean))
    average = jax.tree.map(
      lambda m, g: (beta * m + (1 - beta) * g).astype(m.dtype), average, newest
    )
    # One gradient that is not finite must not stay in the average for ever.
    average = perturbations.where_finite(average, state.average)
    record = ascent.next_record(
      state, rho=radius, updates=updates, perturbed_loss=loss, axis_name=axis_name
    )
    anchors_next = record.count % steps_per_epoch == 0
    next_rho = jnp.where(anchors_next, 0, radius_at(record.count))
    next_rho = next_rho.astype(record.rho.dtype)
    # Taken at a point in float32, also where the parameters are half-precision.
    grads = ascent.cast_like(grads, params)
    return grads, State(*record, next_rho, average, held)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
