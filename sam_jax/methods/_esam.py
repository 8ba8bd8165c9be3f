"""ESAM: a random part of the weights, and the part of the batch that matters."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations, probes
from sam_jax.methods._declare import Bounds, Radius, method


class EsamState(NamedTuple):
  """State of `esam`: the record, the typed key of the masks, the perturbation's."""

  count: jax.Array
  rho: jax.Array
  gradient_norm: jax.Array
  perturbed_loss: jax.Array
  key: jax.Array
  perturbation: optax.OptState

  chooses_examples = True


@method(chooses_examples=True)
def esam(
  rho: Radius = 0.05,
  beta: Annotated[float, Bounds(above=0, most=1)] = 0.5,
  gamma: Annotated[float, Bounds(above=0, most=1)] = 0.5,
  *,
  key: jax.Array | int = 0,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Efficient SAM: stochastic weight perturbation, sharpness-sensitive examples.

  .. math:: \hat\epsilon = \frac{\rho}{\beta} \, b \odot g / \|g\|, \qquad
            b \sim \text{Bernoulli}(\beta) \text{ elementwise}

  and the result is the gradient at :math:`w + \hat\epsilon` of the mean over the
  :math:`\lfloor \gamma B \rfloor` examples whose loss rose most.

  ``tx.update`` takes ``grad_fn(params, indices)`` or ``value_and_grad_fn(params,
  indices)``, the gradient of the mean loss over the examples ``indices`` (int32), and
  ``example_losses_fn(params) -> (B,)``; where the clean pass has the losses at w
  already, ``example_losses`` (B,), which saves a forward pass; and, where a batch has
  padding, ``example_weights`` (B,), whose zeros mark examples that are chosen last.
  Cost: the clean gradient, a forward pass at w + eps-hat, and a gradient over gamma B
  examples.

  Args:
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected. A Python 0 returns the updates
      untouched; a traced 0 selects them.
    beta: share of the weights that is perturbed, above 0 and at most 1.
    gamma: share of the examples that is kept, above 0 and at most 1.
    key: a typed key or a seed; it lives in the state.
    perturbation: makes eps-hat at unit radius of the whole gradient, in place of
      :math:`g / \|g\|`; the mask b and its factor 1 / beta are applied to the result,
      so that norms inside it are those without a mask. It receives the parameters and
      the extra arguments that esam itself has no use for. `perturbations.global_norm`
      unless given.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged; all
      replicas draw the same mask.

  Returns:
    A transformation.

  Raises:
    ValueError: beta or gamma outside (0, 1], ``example_losses_fn`` missing, and as
      `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> x = jnp.arange(1.0, 5.0)
  >>> losses = lambda w: (w * x - 1.0) ** 2
  >>> grad_fn = jax.grad(lambda w, indices: jnp.mean(losses(w)[indices]))
  >>> tx = optax.chain(sam_jax.esam(rho=0.1, beta=1.0), optax.sgd(0.1))
  >>> w = jnp.array(1.0)
  >>> clean = jax.grad(lambda w: jnp.mean(losses(w)))(w)
  >>> updates, _ = tx.update(
  ...     clean, tx.init(w), w, grad_fn=grad_fn, example_losses_fn=losses)
  >>> round(float(updates), 4)  # at w = 1.1, examples 3 and 4: -(6.9 + 13.6) / 10
  -2.05

  References:
    Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural
    Networks, 2022, algorithm 1 (arXiv:2110.03141).
  """
  ascent.check_rho(rho)
  for name, share in (('beta', beta), ('gamma', gamma)):
    if not isinstance(share, jax.Array) and not 0 < share <= 1:
      raise ValueError(f'{name} must be in (0, 1], got {share}: it is a share.')
  perturbation = ascent.unit_perturbation(perturbation)

  def init_fn(params):
    record = ascent.init_record(params)
    inner = perturbation.init(perturbations.at_least_float32(params))
    return EsamState(*record, probes.typed_key(key), inner)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    grad_fn=None,
    value_and_grad_fn=None,
    example_losses_fn=None,
    example_losses=None,
    example_weights=None,
    **extra_args,
  ):
    if not callable(example_losses_fn):
      raise ValueError('esam requires example_losses_fn(params) -> (B,) losses.')
    if params is None:
      ascent.gradient_function(params, grad_fn, value_and_grad_fn)  # raises
    next_key, mask_key = jax.random.split(state.key)
    radius = ascent.resolve(rho, state.count)
    direction, inner = perturbation.update(
      perturbations.at_least_float32(updates),
      state.perturbation,
      perturbations.at_least_float32(params),
      **extra_args,
    )
    mask = optax.tree.random_like(mask_key, direction, _bernoulli(beta))
    eps = perturbations.scale_tree(
      jax.tree.map(jnp.multiply, mask, direction), radius / beta
    )
    perturbed = ascent.perturb(params, eps)
    if example_losses is None:
      example_losses = example_losses_fn(params)
    perturbed_losses = example_losses_fn(perturbed)
    _check_shapes(perturbed_losses, example_losses, example_weights)
    rise = perturbed_losses - example_losses
    if example_weights is not None:
      rise = jnp.where(example_weights > 0, rise, -jnp.inf)
    kept = max(1, math.floor(gamma * rise.shape[0] * (1 + 1e-12)))
    _, indices = jax.lax.top_k(rise, kept)
    evaluate = ascent.gradient_function(
      params,
      grad_fn and (lambda at: grad_fn(at, indices)),
      value_and_grad_fn and (lambda at: value_and_grad_fn(at, indices)),
      updates,
    )
    perturbed_loss, perturbed_grads = evaluate(perturbed)
    record = ascent.next_record(
      state,
      rho=radius,
      updates=updates,
      perturbed_loss=perturbed_loss,
      axis_name=axis_name,
    )
    return (
      ascent.where_on(radius, perturbed_grads, updates),
      EsamState(*record, next_key, inner),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_shapes(losses, example_losses, example_weights) -> None:
  """Raises ValueError unless all of them are (B,)."""
  found = {'example_losses_fn': losses, 'example_losses': example_losses}
  if example_weights is not None:
    found['example_weights'] = example_weights
  for name, array in found.items():
    if jnp.ndim(array) != 1 or jnp.shape(array) != jnp.shape(losses):
      raise ValueError(
        f'{name} must give one number an example, of shape (B,), got '
        f'{jnp.shape(array)} beside {jnp.shape(losses)} losses at w + eps.'
      )


def _bernoulli(probability: float):
  """A sampler for `optax.tree.random_like`: 1 with the given probability, else 0."""

  def sample(key, shape, dtype):
    return jax.random.bernoulli(key, probability, shape).astype(dtype)

  return sample
