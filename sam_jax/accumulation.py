"""Gradients of large batches in the memory of small ones, exact for SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import ascent, perturbations, varying


def microbatches(batch: Any, num: int) -> Any:
  """Splits a batch into microbatches of equal size, along a new leading axis.

  Microbatch j holds the examples j, j + num, j + 2 num and so on. Under `jax.jit` with
  examples sharded over devices every device thus splits its own, and none are moved;
  padding at the end of a batch is spread over all microbatches.

  Args:
    batch: pytree of arrays (B, ...), whose leading axis is that of the examples.
    num: number of microbatches, a divisor of B.

  Returns:
    A pytree of arrays (num, B / num, ...).

  Raises:
    TypeError: ``num`` is not a whole number.
    ValueError: ``num`` is below 1 or does not divide a leading axis, the axes of two
      leaves differ, or a leaf has none.

  >>> import jax.numpy as jnp, sam_jax
  >>> sam_jax.microbatches(jnp.arange(6), 2).tolist()
  [[0, 2, 4], [1, 3, 5]]
  """
  ascent.check_positive(num=num)
  size = _leading(batch, 'batch', 'the examples')
  if size % num:
    raise ValueError(
      f'num={num} does not divide the {size} examples of the batch: give a divisor, or '
      'pad the batch with examples that weigh nothing.'
    )

  def split(x):
    rows = jnp.reshape(x, (size // num, num, *jnp.shape(x)[1:]))
    return jnp.moveaxis(rows, 1, 0)

  return jax.tree.map(split, batch)


def accumulate(
  value_and_grad: Callable[[Any, Any], Any],
  *,
  has_aux: bool = False,
  unroll: int | bool = 1,
) -> Callable[..., Any]:
  r"""Turns a gradient function of one microbatch into that of a stack of them.

  .. math:: L(w) = \sum_{j=1}^{k} \frac{n_j}{\sum_i n_i} L_j(w)

  The value and the gradient of L are accumulated by `jax.lax.scan`, in the memory of
  one microbatch and one more gradient. A method of this package takes all of its
  gradients through the function that it is given. With this one the clean and the
  perturbed gradient are both those of the whole batch, and the step is exactly that of
  the whole batch. (`optax.MultiSteps` around a method is something else: it averages
  the clean gradients only.)

  Values and gradients are summed in at least float32, and returned in the dtypes of
  one microbatch's. NaN of a microbatch is NaN of the result, except where its weight is
  0: a microbatch without examples, whose mean is 0 / 0, has no part in it. Derivatives
  taken through the function itself are NaN there all the same.

  `esam` chooses examples, which are gathered before they are split into microbatches;
  methods with one gradient a step take it at `gradient_point` as always.

  Randomness such as dropout: put a key for each microbatch among its leaves, such as
  ``jax.random.split(key, k)``, so that both gradients see the same masks.

  Batch normalization takes its statistics from one microbatch at a time, so that a
  network with it is not exactly that of the whole batch. All microbatches start from
  the same running statistics. What each of them returns is stacked like everything in
  ``aux``; the mean over the leading axis, by the weights, is one update of the running
  statistics with the mean of the microbatches' own. Threading them through the
  microbatches would make k updates of one step.

  On the CPU, gradients of convolutions run 20 to 75 times slower inside any loop: XLA
  brings them into a fast layout only outside of loops, unless their derivatives are
  written as convolutions of that layout themselves. ``unroll=True`` takes the
  microbatches without a loop, at full speed, but on the CPU in nearly the memory of the
  whole batch, because the compiler overlaps them. On other devices leave it alone.

  Args:
    value_and_grad: ``value_and_grad(params, microbatch) -> (value, grads)``, as
      `jax.value_and_grad` makes it of a mean loss; with ``has_aux`` it returns
      ``((value, aux), grads)``. The value is a real scalar.
    has_aux: whether it returns more than the value.
    unroll: number of microbatches in one turn of the loop, or True for no loop.

  Returns:
    ``accumulated(params, microbatches, weights=None)``, which returns what
    ``value_and_grad`` does, with the leaves of ``aux`` stacked along a leading axis k.
    ``microbatches`` is a pytree of arrays (k, ...), such as `microbatches` makes, of
    which the function is given one entry at a time. ``weights`` (k,) are the n_j, the
    number of examples with weight in each; equal unless given. It may itself be mapped,
    differentiated and compiled. It raises TypeError where ``value_and_grad`` returns
    something else than told above or ``weights`` are no real numbers, and ValueError
    where the leading axes of ``microbatches`` or ``weights`` differ, or a weight that
    is not a JAX array is negative. Of a JAX array, which may be traced, a negative
    weight makes everything NaN.

  Raises:
    TypeError: ``value_and_grad`` is no function.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w, x: jnp.mean((x - w) ** 2)
  >>> accumulated = sam_jax.accumulate(jax.value_and_grad(loss))
  >>> batch = sam_jax.microbatches(jnp.arange(8.0), 4)
  >>> of_whole = lambda w: accumulated(w, batch)
  >>> tx = optax.chain(sam_jax.sam(0.5), optax.sgd(0.1))
  >>> w = jnp.array(0.0)
  >>> value, grads = of_whole(w)
  >>> updates, _ = tx.update(
  ...     grads, tx.init(w), w, value=value, value_and_grad_fn=of_whole)
  >>> float(value), float(grads), round(float(updates), 4)  # 2 (3.5 + 0.5) / 10
  (17.5, -7.0, 0.8)

  With `m_sharpness` the function is told a group, and each group is accumulated:

  >>> groups = jax.tree.map(lambda x: jnp.stack(jnp.split(x, 2)), jnp.arange(8.0))
  >>> of_group = lambda w, group: accumulated(
  ...     w, sam_jax.microbatches(groups[group], 2))
  >>> tx = optax.chain(sam_jax.m_sharpness(sam_jax.sam(0.5), 2), optax.sgd(0.1))
  >>> updates, _ = tx.update(grads, tx.init(w), w, value_and_grad_fn=of_group)
  >>> round(float(updates), 4)
  0.8

  References:
    Foret et al., 2021, algorithm 1 (arXiv:2010.01412): both gradients of a step are
    over the same batch.
  """
  if not callable(value_and_grad):
    raise TypeError(
      'value_and_grad must be a function of the parameters and a microbatch, got '
      f'{type(value_and_grad).__name__}: jax.value_and_grad(loss), not its result.'
    )

  def one(params, part):
    return _parts(value_and_grad(params, part), has_aux)

  def accumulated(params, microbatches, weights=None):
    num = _leading(microbatches, 'microbatches', 'the microbatches')
    share = _shares(_weights(weights, num))

    def body(total, turn):
      part, portion = turn
      summed, aux = one(params, part)
      return jax.tree.map(lambda t, x: _add(t, x, portion), total, summed), aux

    first = jax.tree.map(lambda x: x[0], (microbatches, share))
    like, _ = jax.eval_shape(one, params, first[0])
    total = perturbations.at_least_float32(like)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total)
    total = varying.scan_start(total, lambda t, turn: body(t, turn)[:1], first)
    total, aux = jax.lax.scan(body, total, (microbatches, share), unroll=unroll)
    value, grads = jax.tree.map(lambda t, x: t.astype(x.dtype), total, like)
    return ((value, aux) if has_aux else value), grads

  return accumulated


def _leading(tree: Any, name: str, what: str) -> int:
  """The leading axis that all leaves share.

  Raises:
    ValueError: there are no leaves, one has no axis, or they differ.
  """
  leaves = jax.tree.leaves_with_path(tree)
  if not leaves:
    raise ValueError(f'{name} has no arrays: their leading axis tells {what}.')
  sizes = {jax.tree_util.keystr(path): jnp.shape(leaf)[:1] for path, leaf in leaves}
  (place, first), *others = sizes.items()
  for path, found in [(place, first), *others]:
    if not found or found != first:
      raise ValueError(
        f'every leaf of {name} must have the leading axis of {what}: at '
        f'{place or "the root"} it is {first}, at {path or "the root"} {found}.'
      )
  if not first[0]:
    raise ValueError(f'{name} is empty: the leading axis of {what} is 0.')
  return first[0]


def _weights(weights: Any, num: int) -> jax.Array:
  """The weights (num,) in the widest float, so that those of float64 lose nothing."""
  if weights is None:
    return jnp.ones(num, jnp.result_type(float))
  if isinstance(weights, (list, tuple)):
    traced = any(isinstance(weight, jax.Array) for weight in weights)
    weights = jnp.stack(weights) if traced else weights
  if not isinstance(weights, jax.Array):
    weights = np.asarray(weights)
  if jnp.shape(weights) != (num,):
    raise ValueError(
      f'weights must have the shape ({num},), one for each microbatch, got '
      f'{jnp.shape(weights)}.'
    )
  if not _is_real(weights.dtype):
    raise TypeError(f'weights must be real numbers of examples, got {weights.dtype}.')
  if not isinstance(weights, jax.Array) and np.any(weights < 0):
    raise ValueError(
      f'weights must not be negative, got {weights}: numbers of examples.'
    )
  return jnp.asarray(weights).astype(jnp.result_type(float))


def _is_real(dtype: np.dtype) -> bool:
  real = jnp.integer, jnp.floating, jnp.bool_
  return any(jnp.issubdtype(dtype, kind) for kind in real)


def _shares(weights: jax.Array) -> jax.Array:
  """The weights as shares of their sum, which must not overflow, nor its inverse."""
  large = 2.0**64
  weights = jnp.where(jnp.max(weights) > large, weights / large, weights)
  return jnp.where(jnp.all(weights >= 0), weights, jnp.nan) / jnp.sum(weights)


def _parts(result: Any, has_aux: bool) -> tuple[tuple[jax.Array, Any], Any]:
  """The results of a gradient function as ((value, grads), aux).

  Raises:
    TypeError: it returned something else.
  """
  wanted = '((value, aux), grads)' if has_aux else '(value, grads)'
  if not (isinstance(result, tuple) and len(result) == 2):
    raise TypeError(
      f'value_and_grad must return {wanted}, as jax.value_and_grad does, got '
      f'{type(result).__name__}.'
    )
  (value, grads), aux = result, None
  if has_aux:
    if not (isinstance(value, tuple) and len(value) == 2):
      raise TypeError(
        f'with has_aux=True value_and_grad must return {wanted}, got '
        f'{type(value).__name__} in place of (value, aux).'
      )
    value, aux = value
  if isinstance(value, (tuple, list, dict)):
    raise TypeError(
      f'value_and_grad must return a scalar value, got a {type(value).__name__}: give '
      'accumulate has_aux=True.'
    )
  if jnp.shape(value):
    raise TypeError(
      f'value_and_grad must return a scalar value, got shape {jnp.shape(value)}: take '
      'the mean over the microbatch.'
    )
  _require_floating(value, grads)
  return jax.tree.map(jnp.asarray, (value, grads)), aux


def _require_floating(value: Any, grads: Any):
  """Raises TypeError of what would be cut to whole numbers when it is averaged."""
  if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
    raise TypeError(
      'value_and_grad must return a real floating-point value, got '
      f'{jnp.result_type(value)}.'
    )
  for path, leaf in jax.tree.leaves_with_path(grads):
    dtype = leaf.dtype if hasattr(leaf, 'dtype') else jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f'value_and_grad must return floating-point gradients, got {dtype} at '
        f'{jax.tree_util.keystr(path) or "the root"}: differentiate by the '
        'floating-point parameters only.'
      )


def _add(total: jax.Array, x: jax.Array, share: jax.Array) -> jax.Array:
  """Adds a share; a select, so that NaN of what weighs nothing cannot leak."""
  product = share.astype(total.dtype) * x.astype(total.dtype)
  return total + jnp.where(share == 0, 0, product)
