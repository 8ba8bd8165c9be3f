"""What is wrong with a chain, found by running it on a quadratic."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations, probes, trees
from sam_jax.methods._msam import gradient_point


def check(
  tx: optax.GradientTransformation,
  params: optax.Params,
  *,
  axis_name: str | None = None,
) -> list[str]:
  """Runs updates of a chain on a quadratic and says what is wrong with it.

  It finds what raises no error and trains all the same: no method or several in the
  chain, a method behind its base optimizer, weight decay before the method, clipping or
  scaling before a method that mixes the clean gradient with the perturbed one,
  `optax.MultiSteps` or `optax.apply_if_finite` around the method,
  `optax.inject_hyperparams` around one that fixes its radius an update ahead, and
  `optax.masked` around a perturbation. `optax.masked`, `optax.multi_transform` and
  `optax.flatten` around the method raise an error in training, which it says too. It
  sees the first two updates: what a chain does later, with a learning rate that begins
  at 0 or a `periodic` method that begins after them, it does not see.

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
  try:
    return _faults(tx, perturbations.at_least_float32(params), axis_name)
  except trees.TreeError as error:
    return [f'{error}']


def _faults(tx, params, axis_name) -> list[str]:
  """What is wrong with a chain.

  Raises:
    TreeError: a method does not see the parameters as they are.
  """
  if not _takes_extra_args(tx):
    tx = optax.with_extra_args_support(tx)
  state = tx.init(params)
  methods = _records(state)
  if len(methods) != 1:
    return [
      f'The chain holds {len(methods)} methods of sam_jax: give it one, once, before '
      'the base optimizer.'
    ]
  faults = [
    f'{name} stands around the method: {mend}'
    for kind, name, mend in _WRAPPERS
    if any(_records(x) for x in _states(state, kind))
  ]
  if _lags(state):
    faults.append(
      'optax.inject_hyperparams stands around a method that fixes the radius of a '
      'gradient an update ahead, so that an injected rho lags: give rho to the method '
      'itself, as a number or a schedule.'
    )
  if _states(getattr(methods[0], 'perturbation', ()), optax.MaskedState):
    faults.append(
      'optax.masked stands around the perturbation and lets the raw gradient of the '
      'other leaves through as theirs: use optax.selective_transform.'
    )
  gradient_point(state, params)  # Raises where the method sees another tree.
  return faults + _faults_of_updates(_runner(tx, params, axis_name), params)


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


def _records(state: optax.OptState) -> list[Any]:
  """The states of methods in a state, also of those inside of one another."""
  is_record = lambda x: hasattr(x, 'gradient_norm') and hasattr(x, 'perturbed_loss')
  own = [x for x in jax.tree.leaves(state, is_leaf=is_record) if is_record(x)]
  return own + [x for record in own for x in _records(getattr(record, 'inner', ()))]


def _states(state: optax.OptState, kind: type) -> list[Any]:
  """The states of one kind, but for those that `optax.multi_transform` makes."""
  is_leaf = lambda x: isinstance(x, (kind, optax.MultiTransformState))
  found = []
  for x in jax.tree.leaves(state, is_leaf=is_leaf):
    if isinstance(x, kind):
      found.append(x)
    elif isinstance(x, optax.MultiTransformState):
      groups = [group.inner_state for group in x.inner_states.values()]
      found += _states(groups, kind)
  return found


def _lags(state: optax.OptState) -> bool:
  """Whether rho is injected into a method that knows its next point."""
  kinds = optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState
  return any(
    'rho' in injected.hyperparams
    and any(hasattr(x, 'gradient_point') for x in _records(injected))
    for kind in kinds
    for injected in _states(state, kind)
  )


def _faults_of_updates(run: Callable, params: optax.Params) -> list[str]:
  """What a chain's updates on quadratics say about it."""
  slopes = [optax.tree.full_like(params, slope) for slope in (1.0, 0.0)]
  climb, added = (run(slope, slope) for slope in slopes)
  faults = []
  if climb.along > 0:
    faults.append(
      'The updates climb: put the base optimizer after the method, not before it.'
    )
  if added.norm > 0:
    faults.append(
      'What stands before the method adds to the gradient and shapes the perturbation '
      'only: put weight decay after the method.'
    )
  elif _scales_what_is_mixed(run, params):
    faults.append(
      'What stands before the method scales the clean gradient, and the method mixes '
      'that with perturbed ones of the old scale: put clipping and scaling after the '
      'method, or in the base chain that it wraps.'
    )
  return faults


def _scales_what_is_mixed(run: Callable, params: optax.Params) -> bool:
  """Whether updates depend on a scaled clean gradient and on the gradient function.

  First the clean gradient is turned over a linear loss, whose gradient is the same
  wherever it is taken, then the loss. The one that is turned is large, so that it
  decides also the updates of a base optimizer that sees signs only, and is clipped if
  anything is.
  """
  clean, slope = (probes.gaussian(jax.random.key(i), params) for i in (0, 1))
  larger = lambda tree, factor: optax.tree.scale(factor, tree)
  differ = lambda first, second: any(
    jax.tree.leaves(
      jax.tree.map(lambda x, y: bool(jnp.any(x != y)), first.updates, second.updates)
    )
  )
  here, there = (run(larger(clean, x), slope, False) for x in (_LARGE, -_LARGE))
  expected = _LARGE * perturbations.norm(clean)
  if abs(here.norm - expected) < 1e-3 * expected or not differ(here, there):
    return False
  return differ(*(run(clean, larger(slope, x)) for x in (_LARGE, -_LARGE)))


# Above every norm to which gradients are clipped, and with a square in float32.
_LARGE = 1e4


class _Updates(NamedTuple):
  """What two updates of a chain gave.

  Attributes:
    updates: the updates, each leaf (2, ...).
    along: the inner product of the first and the gradient that it was given.
    norm: the norm of the gradient that the method recorded last.
  """

  updates: optax.Updates
  along: jax.Array
  norm: jax.Array


def _runner(tx, params, axis_name) -> Callable[..., _Updates]:
  """Compiles two updates of a chain at the same parameters.

  Returns:
    ``run(clean, slope, curved=True)``: the incoming gradient, and that of a loss at the
    parameters, which is a quadratic or linear. Two updates show what a method does that
    does not ascend on each.
  """

  def update(clean, slope, curved):

    def loss(at):
      trees.require_alike(at, params)
      moved = jax.tree.map(jnp.subtract, at, params)
      height = jax.tree.map(
        lambda s, d: jnp.sum(s * (d + curved * d**2 / 2)), slope, moved
      )
      return 1 + optax.tree.sum(height)  # Above 0, as Polyak's step has it.

    state, found = tx.init(params), []
    for _ in range(2):
      updates, state = tx.update(
        clean,
        state,
        params,
        value=loss(params),  # Polyak's step and reduction on a plateau want it.
        value_and_grad_fn=lambda at, *which: jax.value_and_grad(loss)(at),
        example_losses_fn=lambda at: loss(at)[None],
      )
      found.append((updates, optax.tree.vdot(updates, clean)))
    updates = jax.tree.map(lambda *x: jnp.stack(x), *(x for x, _ in found))
    return _Updates(updates, found[0][1], _gradient_norm(state))

  mapped = jax.vmap(update, in_axes=None, out_axes=0, axis_name=axis_name, axis_size=1)
  compiled = jax.jit(lambda *x: jax.tree.map(lambda leaf: leaf[0], mapped(*x)))
  return lambda clean, slope, curved=True: compiled(clean, slope, float(curved))


def _gradient_norm(state: optax.OptState) -> jax.Array:
  """The norm that the one method of a chain recorded."""
  ((_, norm),) = optax.tree.get_all_with_path(state, 'gradient_norm')
  return norm
