"""What is wrong with a chain, found by running it on a quadratic."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations
from sam_jax.methods._msam import gradient_point


def check(
  tx: optax.GradientTransformation,
  params: optax.Params,
  *,
  axis_name: str | None = None,
) -> list[str]:
  """Runs updates of a chain on a quadratic and says what is wrong with it.

  It finds what raises no error and trains all the same: no method or several in the
  chain, a method behind its base optimizer, weight decay before the method, and
  `optax.MultiSteps` or `optax.apply_if_finite` around it.

  Args:
    tx: the whole chain, base optimizer and all.
    params: the parameters that it is to train, or arrays like them.
    axis_name: the mapped axis, if the chain names one.

  Returns:
    One sentence for each fault; an empty list for a chain without any of these.

  >>> import jax.numpy as jnp, optax, sam_jax
  >>> w = {'kernel': jnp.ones((3, 2))}
  >>> sam_jax.check(optax.chain(sam_jax.sam(0.05), optax.sgd(0.1)), w)
  []
  >>> for fault in sam_jax.check(optax.chain(optax.sgd(0.1), sam_jax.sam(0.05)), w):
  ...   print(fault)
  The updates climb: put the base optimizer after the method, not before it.
  """
  ascent.check_transformation(tx, 'tx')
  if not _takes_extra_args(tx):
    tx = optax.with_extra_args_support(tx)
  params = perturbations.at_least_float32(params)
  state = tx.init(params)
  methods = _count(state)
  if methods != 1:
    return [
      f'The chain holds {methods} methods of sam_jax: give it one, once, before the '
      'base optimizer.'
    ]
  faults = [
    f'{name} stands around the method: {mend}'
    for kind, name, mend in _WRAPPERS
    if any(_count(x) for x in _states(state, kind))
  ]
  climb, _ = _run(tx, params, slope=1.0, axis_name=axis_name)
  if climb > 0:
    faults.append(
      'The updates climb: put the base optimizer after the method, not before it.'
    )
  _, added = _run(tx, params, slope=0.0, axis_name=axis_name)
  if added > 0:
    faults.append(
      'What stands before the method adds to the gradient and shapes the perturbation '
      'only: put weight decay after the method.'
    )
  return faults


_WRAPPERS = (
  (
    optax.MultiStepsState,
    'optax.MultiSteps',
    'it averages the clean gradients, but the gradient function sees the last '
    'microbatch only; accumulate inside the gradient function.',
  ),
  (
    optax.ApplyIfFiniteState,
    'optax.apply_if_finite',
    'it looks at the clean gradient only; put it around the base optimizer, after the '
    'method.',
  ),
)


def _takes_extra_args(tx: Any) -> bool:
  """Whether it does, also if its type does not say so: `optax.MultiSteps`."""
  arguments = inspect.signature(tx.update).parameters.values()
  return any(x.kind is x.VAR_KEYWORD for x in arguments)


def _count(state: optax.OptState) -> int:
  """The number of methods whose records a state holds."""
  is_record = lambda x: hasattr(x, 'gradient_norm') and hasattr(x, 'perturbed_loss')
  leaves = jax.tree.leaves(state, is_leaf=is_record)
  return sum(
    1 + _count(getattr(leaf, 'inner', ())) for leaf in leaves if is_record(leaf)
  )


def _states(state: optax.OptState, kind: type) -> list[Any]:
  is_kind = lambda x: isinstance(x, kind)
  return [x for x in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(x)]


def _run(tx, params, slope, axis_name) -> tuple[jax.Array, jax.Array]:
  """One update on a quadratic that has this slope at the parameters.

  Returns:
    The inner product of updates and gradient, and the norm that the method records.
  """

  def loss(at):
    moved = jax.tree.map(jnp.subtract, at, params)
    square = jax.tree.map(lambda d: jnp.sum(slope * (d + d**2 / 2)), moved)
    return jax.tree.reduce(jnp.add, square, jnp.zeros([]))

  def update(_):
    state = tx.init(params)
    grads = jax.grad(loss)(gradient_point(state, params))
    updates, state = tx.update(
      grads,
      state,
      params,
      value_and_grad_fn=lambda at, *which: jax.value_and_grad(loss)(at),
      example_losses_fn=lambda at: loss(at)[None],
    )
    along = jax.tree.map(lambda u, g: jnp.sum(u * g), updates, grads)
    return jax.tree.reduce(jnp.add, along, jnp.zeros([])), _gradient_norm(state)

  found = jax.jit(jax.vmap(update, axis_name=axis_name))(jnp.zeros(1))
  return jax.tree.map(lambda x: x[0], found)


def _gradient_norm(state: optax.OptState) -> jax.Array:
  """The norm that the one method of a chain recorded."""
  ((_, norm),) = optax.tree.get_all_with_path(state, 'gradient_norm')
  return norm
