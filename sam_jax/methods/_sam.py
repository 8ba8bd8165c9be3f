"""Sharpness-aware minimization: SAM, ASAM and USAM."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import optax

from sam_jax import ascent, perturbations
from sam_jax.methods._declare import Bounds, Choices, Radius, method


class SamState(NamedTuple):
  """State of `sam`: `sam_jax.ascent.Record`, and the state of the perturbation."""

  count: jax.Array
  rho: jax.Array
  gradient_norm: jax.Array
  perturbed_loss: jax.Array
  perturbation: optax.OptState


@method(flags={'num_ascent_steps': 'num_ascent_steps'})
def sam(
  rho: Radius = 0.05,
  *,
  perturbation: optax.GradientTransformation | None = None,
  num_ascent_steps: Annotated[int, Bounds(least=1, most=100)] | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces the gradient at w by the gradient at w + eps-hat.

  .. math:: \hat\epsilon = \rho \, g / \|g\|_2, \qquad
            \text{updates} = \nabla L(w + \hat\epsilon)

  Put it first in a chain; the base optimizer follows. What stands before it shapes the
  ascent only, what stands after it the descent. ``tx.update`` takes one of two extra
  arguments: ``grad_fn(params) -> grads`` or ``value_and_grad_fn(params) -> (value,
  grads)``, both evaluated on the same batch (and with the same dropout key) as the
  incoming gradient.

  Args:
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected. A Python 0 returns the updates
      untouched, at the cost of the base optimizer; a traced 0 selects them.
    perturbation: gradient in, eps-hat at unit radius out; `perturbations.global_norm`
      unless given. It receives the extra arguments too.
    num_ascent_steps: number of ascent steps K, 1 unless given, each of radius rho / K
      along the gradient at the point reached. An update costs K + 1 gradients.
    axis_name: the mapped axis under `jax.pmap` or `jax.vmap`. Only the recorded norm
      and loss are averaged over it, so that the state is the same on every replica;
      each replica still perturbs on its own batch (m-sharpness). For one common
      perturbation put `cross_replica_mean` before this; put one after it always.

  Returns:
    A transformation whose state holds ``count``, ``rho``, ``gradient_norm`` and
    ``perturbed_loss`` (see `sam_jax.ascent.Record`).

  Raises:
    ValueError: rho < 0 or num_ascent_steps < 1; ``update`` without params or without
      exactly one function.
    TypeError: the function's result has another tree than params.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda params: jnp.sum(params['w'] ** 4)
  >>> tx = optax.chain(sam_jax.sam(rho=0.05), optax.sgd(0.1))
  >>> params = {'w': jnp.array([1.0, -1.0])}
  >>> opt_state = tx.init(params)
  >>> @jax.jit
  ... def step(params, opt_state):
  ...   grads = jax.grad(loss)(params)
  ...   updates, opt_state = tx.update(
  ...       grads, opt_state, params, grad_fn=jax.grad(loss))
  ...   return optax.apply_updates(params, updates), opt_state
  >>> params, opt_state = step(params, opt_state)
  >>> round(float(params['w'][0]), 4)
  0.5561
  >>> round(float(optax.tree.get(opt_state, 'gradient_norm')), 4)
  5.6569

  References:
    Foret et al., Sharpness-Aware Minimization for Efficiently Improving
    Generalization, 2021, algorithm 1 (arXiv:2010.01412).
  """
  ascent.check_rho(rho)
  num_steps = ascent.static_int('num_ascent_steps', num_ascent_steps, default=1)
  perturbation = ascent.unit_perturbation(perturbation)

  def init_fn(params):
    record = ascent.init_record(params)
    inner = perturbation.init(perturbations.at_least_float32(params))
    return SamState(*record, inner)

  def update_fn(
    updates, state, params=None, *, grad_fn=None, value_and_grad_fn=None, **extra_args
  ):
    evaluate = ascent.gradient_function(params, grad_fn, value_and_grad_fn, updates)
    if ascent.is_off(rho):
      record = ascent.next_record(state, rho=0.0, updates=updates, axis_name=axis_name)
      return updates, SamState(*record, state.perturbation)
    radius = ascent.resolve(rho, state.count)
    point, grads, inner = params, updates, state.perturbation
    for _ in range(num_steps):
      direction, inner = perturbation.update(
        perturbations.at_least_float32(grads),
        inner,
        perturbations.at_least_float32(params),
        **extra_args,
      )
      eps = perturbations.scale_tree(direction, radius / num_steps)
      point = ascent.perturb(point, eps)
      perturbed_loss, grads = evaluate(point)
    record = ascent.next_record(
      state,
      rho=radius,
      updates=updates,
      perturbed_loss=perturbed_loss,
      axis_name=axis_name,
    )
    return (
      ascent.where_on(radius, grads, updates),
      SamState(*record, inner),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@method(flags={'eta': 'adaptive_eta', 'weights': 'adaptive_rule'})
def asam(
  rho: Radius = 0.5,
  eta: Annotated[float, Bounds(least=0)] = 0.01,
  *,
  weights: Annotated[
    perturbations.WeightsMask, Choices({'weights': None, 'all': True})
  ] = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adaptive SAM: the radius of each weight is proportional to its size.

  .. math:: \hat\epsilon = \rho \, T^2 g / \|T g\|_2

  with :math:`T` as in `sam_jax.perturbations.adaptive`. ``asam(2.0, eta=0.0,
  weights=True)`` is the every-parameter rule, invariant to the rescaling of layers.

  Args:
    rho: radius of the perturbation relative to the size of the weights. It is a number,
      a schedule of the update count, or injected.
    eta: number added to :math:`|w|` in the radius of each weight.
    weights: which parameters have a radius in proportion to their size: weights (no
      biases, no parameters of normalizations), or all. In Python None, True, a
      `sam_jax.layouts.Layout`, or a mask as `sam_jax.perturbations.adaptive` takes it.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged.

  Returns:
    A transformation with the state of `sam`.

  Raises:
    ValueError: rho < 0 or eta < 0, and as `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 4)
  >>> tx = optax.chain(sam_jax.asam(rho=0.5), optax.sgd(0.01))
  >>> w = jnp.ones((2, 2))
  >>> updates, _ = tx.update(
  ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
  >>> round(float(updates[0, 0]), 4)
  -0.0786

  References:
    Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks, 2021 (arXiv:2102.11600).
  """
  perturbation = perturbations.adaptive(eta, weights=weights)
  return sam(rho, perturbation=perturbation, axis_name=axis_name)


@method()
def usam(
  rho: Radius = 0.05, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
  r"""Unnormalised SAM: the perturbation shrinks with the gradient.

  .. math:: \hat\epsilon = \rho \, g

  Args:
    rho: step of the ascent, in the units of a learning rate. It is a number, a schedule
      of the update count, or injected.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged.

  Returns:
    A transformation with the state of `sam`.

  Raises:
    ValueError: as `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 4)
  >>> tx = optax.chain(sam_jax.usam(rho=0.01), optax.sgd(0.1))
  >>> w = jnp.array([1.0])
  >>> updates, _ = tx.update(
  ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
  >>> round(float(updates[0]), 4)
  -0.4499

  References:
    Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization,
    2022 (arXiv:2206.06232).
  """
  return sam(rho, perturbation=perturbations.unnormalized(), axis_name=axis_name)
