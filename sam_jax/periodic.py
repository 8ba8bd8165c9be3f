"""A method on some updates only."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from sam_jax import ascent, varying


def periodic(
  method: optax.GradientTransformationExtraArgs,
  *,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs ``method`` on the updates start, start + every, ... below stop.

  On all others the clean gradient passes through, at its cost, with ``rho`` and
  ``perturbed_loss`` recorded as 0 and the method's other state kept.

  ``tx.update`` takes ``phase``: True for an update that runs the method, False for one
  that does not, None (the default) to decide by `jax.lax.cond` on the count.

  Args:
    method: a method that starts from the clean gradient; not `looksam`, which has its
      own period. Schedules of its rho see the count of all updates.
    every: period in updates; 1 runs it on every one.
    start: first update that runs it.
    stop: first update that does not any more; None for never.
    axis_name: as in `sam`, for the updates that pass through.

  Returns:
    A transformation with the state of ``method``.

  Raises:
    ValueError: every < 1, start < 0 or stop < start.
    TypeError: not a method, or ``init`` with one that does not go with it.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 4)
  >>> tx = optax.chain(sam_jax.periodic(sam_jax.sam(0.05), every=2), optax.sgd(0.1))
  >>> w = jnp.array([1.0])
  >>> opt_state = tx.init(w)
  >>> radii = []
  >>> for _ in range(4):
  ...   updates, opt_state = tx.update(
  ...       jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss))
  ...   radii.append(round(float(optax.tree.get(opt_state, 'rho')), 2))
  >>> radii
  [0.05, 0.0, 0.05, 0.0]
  """
  ascent.check_transformation(method, 'method')
  ascent.check_whole(every=every, start=start, stop=0 if stop is None else stop)
  if every < 1 or start < 0 or (stop is not None and stop < start):
    raise ValueError(
      'periodic needs every >= 1 and 0 <= start <= stop, got '
      f'every={every}, start={start}, stop={stop}.'
    )

  def init_fn(params):
    state = method.init(params)
    ascent.check_method_state(state, 'periodic')
    if hasattr(state, 'is_periodic'):
      raise TypeError(
        'periodic does not go with looksam, which has a period of its own, counted '
        'over the same updates: choose one of the two.'
      )
    return state

  def update_fn(updates, state, params=None, *, phase=None, **extra_args):

    def active():
      return method.update(updates, state, params, **extra_args)

    def passive():
      record = ascent.next_record(state, rho=0.0, updates=updates, axis_name=axis_name)
      return updates, state._replace(**record._asdict())

    if phase is None:
      since = state.count - start
      runs = (since >= 0) & (since % every == 0)
      if stop is not None:
        runs &= state.count < jnp.int32(stop)
      return varying.cond(runs, active, passive)
    return active() if phase else passive()

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
