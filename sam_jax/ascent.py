"""What every method of the family shares: rho, the second gradient, the record.

A method is an `optax.GradientTransformationExtraArgs` whose state begins with the four
scalars of `Record` and whose update is told how to take a gradient elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_jax import perturbations, trees, varying

ScalarOrSchedule = float | jax.Array | optax.Schedule
ValueAndGrad = Callable[[optax.Params], tuple[jax.Array, optax.Updates]]


class Record(NamedTuple):
  """The scalars that the state of every method holds under these names.

  Attributes:
    count: int32, the number of updates made.
    rho: radius that the last update used; 0 at init.
    gradient_norm: l2 norm of the last incoming updates; 0 at init.
    perturbed_loss: loss at w + eps-hat in the last update; 0 at init, and with a plain
      ``grad_fn``, which does not tell it.
  """

  count: jax.Array
  rho: jax.Array
  gradient_norm: jax.Array
  perturbed_loss: jax.Array


def init_record(params: optax.Params) -> Record:
  """All zero, in the widest dtype among float32 and those of ``params``.

  Each scalar is a buffer of its own, so that the state can be donated.

  Raises:
    TypeError: a leaf of params is not real.
    TreeError: a part of the parameters is masked.
  """
  trees.require_whole(params)
  for path, leaf in jax.tree.leaves_with_path(params):
    found = jnp.result_type(leaf)
    if not jnp.issubdtype(found, jnp.floating):
      raise TypeError(
        f'params must be real floating-point numbers, got {found} at '
        f'{jax.tree_util.keystr(path) or "the root"}: {_mend(found)}.'
      )
  dtype = scalar_dtype(params)
  return Record(jnp.zeros([], jnp.int32), *(jnp.zeros([], dtype) for _ in range(3)))


def _mend(dtype: jnp.dtype) -> str:
  """What to do with leaves that are no parameters."""
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return 'hold the real and the imaginary part as two leaves'
  return 'keep what is not trained out of params'


def next_record(
  state: Any,
  *,
  rho: jax.Array | float,
  updates: optax.Updates,
  perturbed_loss: jax.Array | float = 0.0,
  axis_name: str | None = None,
) -> Record:
  """The record after one update.

  Args:
    state: the method's state before the update.
    rho: the radius used.
    updates: the incoming updates.
    perturbed_loss: the loss at w + eps-hat.
    axis_name: a mapped axis over which norm and loss are averaged, so that replicas
      that perturb on their own batches still hold one and the same state.

  Raises:
    ValueError: the updates are a sum over that axis, as `jax.shard_map` has it.
  """
  dtype = state.rho.dtype
  measured = (perturbations.norm(updates), jnp.asarray(perturbed_loss, dtype))
  if axis_name is not None:
    varying.require(updates, axis_name)
    measured = jax.lax.pmean(measured, axis_name)
  gradient_norm, perturbed_loss = measured
  return Record(
    count=optax.safe_increment(state.count),
    rho=jnp.asarray(rho, dtype),
    gradient_norm=gradient_norm.astype(dtype),
    perturbed_loss=perturbed_loss,
  )


def scalar_dtype(params: optax.Params) -> jnp.dtype:
  """float32, or float64 where the parameters are."""
  dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
  floating = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
  return jnp.result_type(jnp.float32, *floating)


def zeros_like(params: optax.Params) -> optax.Params:
  """Zeros of the shapes, dtypes and shardings of params."""

  def zeros(x):
    return jnp.zeros_like(x, dtype=jnp.result_type(x))

  return jax.tree.map(zeros, params)


def cast_like(tree: Any, like: Any) -> Any:
  """Floating-point leaves in the dtypes of others; keys and counts as they are."""

  def cast(x, y):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.result_type(y)) if floating else x

  return jax.tree.map(cast, tree, like)


def check_rho(rho: ScalarOrSchedule, name: str = 'rho') -> None:
  """Raises for what cannot be a radius; the values of JAX arrays are not looked at.

  Raises:
    TypeError: neither a number, nor an array, nor a schedule.
    ValueError: a negative or infinite number, or an array that is no scalar.
  """
  number = isinstance(rho, (int, float, np.ndarray, np.generic))
  if isinstance(rho, bool) or not (callable(rho) or hasattr(rho, 'dtype') or number):
    raise TypeError(
      f'{name} must be a number, an array or a schedule, got {rho!r} of type '
      f'{type(rho).__name__}.'
    )
  if not callable(rho) and np.ndim(rho):
    raise ValueError(
      f'{name} must be a scalar, got shape {np.shape(rho)}: map over several radii '
      'with jax.vmap.'
    )
  if number and not 0 <= rho < math.inf:
    raise ValueError(f'{name} must be at least 0 and finite, got {rho}: a radius.')


def check_positive(**values: int | jax.Array) -> None:
  """Checks numbers of updates; the values of JAX arrays are not looked at.

  Raises:
    TypeError: not a whole number.
    ValueError: below 1.
  """
  for name, value in values.items():
    if not isinstance(value, jax.Array):
      check_whole(**{name: value})
      if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}.')


def check_finite(**values: float | jax.Array) -> None:
  """Checks real numbers; the values of JAX arrays are not looked at.

  Raises:
    TypeError: not a number.
    ValueError: NaN or infinite.
  """
  for name, value in values.items():
    if hasattr(value, 'dtype') and not isinstance(value, (np.ndarray, np.generic)):
      continue
    if isinstance(value, bool) or not isinstance(
      value, (int, float, np.ndarray, np.generic)
    ):
      raise TypeError(f'{name} must be a number, got {value!r}.')
    if not np.all(np.isfinite(value)):
      raise ValueError(f'{name} must be finite, got {value}.')


def check_whole(**values: int) -> None:
  """Raises TypeError for what is not a whole number."""
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
      raise TypeError(f'{name} must be a whole number, got {value!r}.')


def check_transformation(value: Any, name: str) -> None:
  """Raises TypeError unless a value is an optax transformation."""
  if not (hasattr(value, 'init') and hasattr(value, 'update')):
    raise TypeError(
      f'{name} must be an optax transformation, got {value!r}: call the function that '
      'makes it, as in optax.sgd(0.1).'
    )


def check_method_state(state: Any, wrapper: str) -> None:
  """Checks that a state is that of a method which starts from the clean gradient.

  Raises:
    TypeError: it is that of a chain or of a base optimizer, or of a method that wraps
      its base or takes its gradient elsewhere.
  """
  if not hasattr(state, 'perturbed_loss') and not hasattr(state, 'sam'):
    raise TypeError(
      f'{wrapper} takes one method of the family, such as sam(0.05), and got what has '
      f'the state {type(state).__name__}: chains and base optimizers stand after it.'
    )
  if hasattr(state, 'gradient_point') or hasattr(state, 'inner'):
    raise TypeError(
      f'{wrapper} does not go with the method of {type(state).__name__}, which wraps '
      'its base optimizer or takes its one gradient elsewhere: take one that starts '
      'from the clean gradient, such as sam.'
    )


def unit_perturbation(
  perturbation: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
  """The perturbation that a method was given, or that of SAM.

  Raises:
    TypeError: it is no transformation.
  """
  if perturbation is None:
    return perturbations.global_norm()
  check_transformation(perturbation, 'perturbation')
  return optax.with_extra_args_support(perturbation)


def static_int(name: str, value: int | None, default: int) -> int:
  """A number of repetitions, which has to be known while tracing.

  None stands for the default, so that `optax.inject_hyperparams` leaves it alone.
  """
  if value is None:
    return default
  if isinstance(value, jax.Array):
    raise TypeError(
      f'{name} must be a Python int, got {type(value).__name__}: with '
      f"optax.inject_hyperparams name it in static_args=('{name}',)."
    )
  check_positive(**{name: value})
  return int(value)


def resolve(value: ScalarOrSchedule, count: jax.Array) -> jax.Array | float:
  """The value of a number or a schedule at ``count``."""
  return value(count) if callable(value) else value


def is_off(rho: ScalarOrSchedule) -> bool:
  """Whether rho is a Python or NumPy 0, known while tracing."""
  return not isinstance(rho, jax.Array) and rho == 0


def where_on(
  rho: jax.Array | float, perturbed: optax.Updates, updates: optax.Updates
) -> optax.Updates:
  """``perturbed`` where rho > 0, ``updates`` where it is 0, NaN where it is neither.

  These are selects, so that NaN of what is not chosen cannot leak.
  """
  off, on = jnp.asarray(rho) == 0, jnp.asarray(rho) > 0

  def select(p, u):
    return jnp.where(off, u, jnp.where(on, p.astype(u.dtype), jnp.nan))

  return jax.tree.map(select, perturbed, updates)


def gradient_function(
  params: optax.Params,
  grad_fn: Callable | None,
  value_and_grad_fn: Callable | None,
  updates: optax.Updates | None = None,
) -> ValueAndGrad:
  """One function ``params -> (value, grads)`` from whichever of the two was given.

  Args:
    params: the parameters; results must have their tree structure.
    grad_fn: ``params -> grads``; the value is then 0.
    value_and_grad_fn: ``params -> (value, grads)``.
    updates: the incoming updates. Where they are those of one replica, so are the
      gradients taken here (see `sam_jax.varying`).

  Returns:
    The function. Half-precision parameters have to be handed to it in float32, or
    rounding eats the perturbation: `perturb` does so.

  Raises:
    ValueError: neither or both functions were given, or no params.
    TypeError: when called: the result's tree differs from that of params.
  """
  if params is None:
    raise ValueError(
      'the perturbation starts from the parameters: call '
      'tx.update(grads, opt_state, params, grad_fn=...).'
    )
  if (grad_fn is None) == (value_and_grad_fn is None):
    given = 'neither' if grad_fn is None else 'both'
    raise ValueError(
      f'exactly one of grad_fn and value_and_grad_fn is required, got {given}: call '
      'tx.update(grads, opt_state, params, grad_fn=jax.grad(loss)).'
    )

  name = 'grad_fn' if value_and_grad_fn is None else 'value_and_grad_fn'
  function = grad_fn if value_and_grad_fn is None else value_and_grad_fn
  if not callable(function):
    raise TypeError(
      f'{name} must be a function of the parameters, got {type(function).__name__}: '
      'jax.grad(loss), not its result.'
    )

  def evaluate(at):
    at = at if updates is None else varying.as_much_as(at, updates)
    if value_and_grad_fn is None:
      value, grads = jnp.zeros([], scalar_dtype(params)), grad_fn(at)
    else:
      value, grads = _pair(value_and_grad_fn(at))
    _check_like(grads, params, name)
    return value, grads

  return evaluate


def _pair(result: Any) -> tuple[jax.Array, optax.Updates]:
  """The value and the gradients of ``value_and_grad_fn``.

  Raises:
    TypeError: it returned something else.
  """
  if not (isinstance(result, tuple) and len(result) == 2):
    raise TypeError(
      'value_and_grad_fn must return (value, grads), as jax.value_and_grad(loss) does, '
      f'got {type(result).__name__}.'
    )
  value, grads = result
  if isinstance(value, (tuple, list, dict)):
    raise TypeError(
      'value_and_grad_fn must return a scalar value, got a '
      f'{type(value).__name__}: drop what has_aux=True adds.'
    )
  if jnp.shape(value):
    raise TypeError(
      'value_and_grad_fn must return a scalar value, got shape '
      f'{jnp.shape(value)}: take the mean over the batch.'
    )
  return value, grads


def _check_like(grads: optax.Updates, params: optax.Params, name: str) -> None:
  """Raises TypeError unless the gradients have the tree and the shapes of params."""
  got, expected = jax.tree.structure(grads), jax.tree.structure(params)
  if got != expected:
    raise TypeError(
      f'{name} must return gradients with the tree structure of params (a function '
      f'with has_aux=True does not): expected {expected}, got {got}.'
    )
  leaves = zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(params), strict=True)
  for (path, gradient), parameter in leaves:
    if jnp.shape(gradient) != jnp.shape(parameter):
      raise TypeError(
        f'{name} must return gradients of the shapes of params: at '
        f'{jax.tree_util.keystr(path) or "the root"} expected {jnp.shape(parameter)}, '
        f'got {jnp.shape(gradient)}.'
      )


def perturbed_and_clean(
  method: optax.GradientTransformationExtraArgs,
  updates: optax.Updates,
  state: Any,
  params: optax.Params,
  **extra_args: Any,
) -> tuple[optax.Updates, optax.Updates, Any]:
  """A method's result and the clean gradient, to be subtracted from one another.

  In half precision the rounding of the clean gradient is as large as the difference.
  Then it is taken once more, in float32 as the perturbed one, which costs a gradient.

  Returns:
    Both in at least float32, and the new state.
  """
  wide = perturbations.at_least_float32(updates)
  perturbed, new_state = method.update(wide, state, params, **extra_args)
  # Gradients at half-precision parameters are rounded, whatever they are cast to.
  dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves((updates, params))}
  floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
  if all(jnp.finfo(dtype).bits >= 32 for dtype in floating):
    return perturbed, updates, new_state
  functions = (extra_args.get(name) for name in ('grad_fn', 'value_and_grad_fn'))
  evaluate = gradient_function(params, *functions, updates)
  _, clean = evaluate(perturbations.at_least_float32(params))
  return perturbed, clean, new_state


def perturb(params: optax.Params, eps: optax.Updates) -> optax.Params:
  """``params + eps`` in at least float32.

  Half-precision parameters come out in float32: at 1e7 bfloat16 weights and rho = .05,
  rounding the sum to bfloat16 would eat 82 % of the perturbation. Raises a TreeError
  where ``eps`` is no tree like them.
  """
  trees.require_alike(eps, params)
  return jax.tree.map(
    lambda w, e: w + e.astype(w.dtype), perturbations.at_least_float32(params), eps
  )


def reject(tree: optax.Updates, direction: optax.Updates) -> optax.Updates:
  r"""The part of ``tree`` orthogonal to ``direction``.

  .. math:: g - \langle g, u \rangle u

  Inner products are taken in at least float32. Where ``direction`` is zero, ``tree``.
  """
  (_, scale), (length, scale_b) = map(perturbations.squares, (tree, direction))
  a, b = map(perturbations.at_least_float32, (tree, direction))
  # Sums of products leaf by leaf: no leaf of a sharded tree is gathered.
  product = optax.tree.sum(jax.tree.map(lambda x, y: (scale * x) * (scale_b * y), a, b))
  factor = product * perturbations.safe_reciprocal(length)

  def rest(x, y, like):
    x, y = perturbations.scaled(x, scale), perturbations.scaled(y, scale_b)
    return ((x - factor * y) / scale).astype(like.dtype)

  return jax.tree.map(rest, a, b, tree)


def combine(
  method: optax.GradientTransformationExtraArgs,
  rule: Callable[[optax.Updates, optax.Updates], optax.Updates],
) -> optax.GradientTransformationExtraArgs:
  """``method`` with its result replaced by ``rule(clean, perturbed)``.

  ``clean`` are the incoming updates. Where rho is 0 they are the result, bit for bit.
  """

  def update_fn(updates, state, params=None, **extra_args):
    perturbed, new_state = method.update(updates, state, params, **extra_args)
    combined = rule(updates, perturbed)
    return where_on(new_state.rho, combined, updates), new_state

  return optax.GradientTransformationExtraArgs(method.init, update_fn)
