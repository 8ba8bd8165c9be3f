"""Perturbations of one's own in methods that know theirs before the gradient.

`sam_jax.gradient_point` is given a state and no method, so the type of the state holds
the transformation, and its fields hold the transformation's state.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations


def state_type(base: type, perturbation: optax.GradientTransformation | None) -> type:
  """The type of a method's state, which holds the perturbation as ``rule``.

  Args:
    base: a named tuple with the attribute ``rule = None``.
    perturbation: what the method was given.

  Returns:
    ``base`` for None. Otherwise a subclass of its name, the same one whenever it is
    asked for: states of two calls of a method with one perturbation have one type.

  Raises:
    TypeError: the perturbation is no transformation.
  """
  if perturbation is None:
    return base
  ascent.check_transformation(perturbation, 'perturbation')
  return _subclass(base, perturbation)


@functools.cache
def _subclass(base: type, perturbation: optax.GradientTransformation) -> type:
  rule = optax.with_extra_args_support(perturbation)
  held = {'rule': rule, '__slots__': (), '__doc__': base.__doc__}
  return type(base.__name__, (base,), held | {'__module__': base.__module__})


def init(
  rule: optax.GradientTransformationExtraArgs | None, params: optax.Params
) -> optax.OptState:
  """The first state of a rule, and one without arrays for None."""
  wide = perturbations.at_least_float32(params)
  return optax.EmptyState() if rule is None else rule.init(wide)


def step(
  rule: optax.GradientTransformationExtraArgs,
  along: optax.Updates,
  state: optax.OptState,
  params: optax.Params,
  radius: jax.Array,
) -> optax.Updates:
  """``radius`` times the perturbation along a direction; zero where the radius is."""
  direction, _ = _update(rule, along, state, params)
  return jax.tree.map(
    lambda x: jnp.where(radius == 0, 0, radius * x).astype(x.dtype), direction
  )


def advance(
  rule: optax.GradientTransformationExtraArgs | None,
  along: optax.Updates,
  state: optax.OptState,
  params: optax.Params | None,
) -> optax.OptState:
  """The perturbation's state after the step that `step` has taken from this one."""
  return state if rule is None else _update(rule, along, state, params)[1]


def _update(rule, along, state, params):
  wide = perturbations.at_least_float32
  return rule.update(wide(along), state, None if params is None else wide(params))
