"""Momentum SAM, and the point at which one-gradient methods take their gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations
from sam_jax.methods import _foreknown
from sam_jax.methods._declare import Radius, method

_BUFFERS = ('trace', 'mu')


class MsamState(NamedTuple):
  """State of `msam`: the record, the radius of the next gradient, the base's state.

  Attributes:
    next_rho: ``{name: rho}``, the momentum buffer's name and the next radius.
    inner: state of the base chain, which holds the buffer.
    perturbation: state of the perturbation, which is ``rule`` unless that is None.
  """

  count: jax.Array
  rho: jax.Array
  gradient_norm: jax.Array
  perturbed_loss: jax.Array
  next_rho: dict[str, jax.Array]
  inner: optax.OptState
  perturbation: optax.OptState

  rule = None

  def gradient_point(self, params: optax.Params) -> optax.Params:
    """``params - rho v / |v|``, or minus the rule's step, in at least float32."""
    ((momentum, rho),) = self.next_rho.items()
    buffer = perturbations.at_least_float32(optax.tree.get(self.inner, momentum))
    if self.rule is None:
      return ascent.perturb(params, perturbations.on_sphere(buffer, -rho))
    eps = _foreknown.step(self.rule, buffer, self.perturbation, params, -rho)
    return ascent.perturb(params, eps)


@method(one_gradient=True, needs_momentum=True)
def msam(
  inner: optax.GradientTransformation,
  rho: Radius = 0.3,
  *,
  momentum: str | None = None,
  perturbation: optax.GradientTransformation | None = None,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Perturbs along the momentum buffer, so that one gradient an update suffices.

  .. math:: \hat\epsilon = -\rho \, v / \|v\|, \qquad
            \text{updates} = \text{inner}(\nabla L(w + \hat\epsilon))

  It wraps the base chain, because it reads its buffer v. The caller takes the gradient
  at ``sam_jax.gradient_point(opt_state, params)``; evaluation uses ``params``
  themselves, which stay unperturbed. The radius of a point is fixed by the update
  before it: a schedule of rho allows for that, an injected rho lags by one update.

  Weight decay in ``inner`` takes w, as in every chain. The authors' code takes the
  perturbed weights; an L2 term in the loss, whose gradient is taken there, does so.

  Args:
    inner: the base chain with a momentum buffer, learning rate and all.
    rho: radius of the perturbation in the units of the parameters. It is a number, a
      schedule of the update count, or injected; 0 is the base optimizer.
    momentum: name of the buffer in the state of ``inner``; None finds the one named
      ``'trace'``, as `optax.sgd` with momentum has it, or ``'mu'``, as `optax.adam` and
      its kin do.
    perturbation: makes a step at unit radius of the buffer v, in place of
      :math:`v / \|v\|`; eps-hat is minus rho times that. `perturbations.global_norm`
      unless given. It is called with the parameters, without extra arguments: by
      ``gradient_point`` for the step, and by ``update`` once more for its state.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged; with
      `cross_replica_mean` in ``inner`` the buffer is the same on all replicas.

  Returns:
    A transformation. ``tx.update`` needs no gradient function; a ``value`` given to it,
    the loss at the gradient point, is recorded as ``perturbed_loss``.

  Raises:
    ValueError: rho < 0; ``init`` where ``inner`` does not have exactly one such buffer.
    TypeError: inner or perturbation is no transformation.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 4)
  >>> tx = sam_jax.msam(optax.sgd(0.01, momentum=0.9), rho=0.3)
  >>> w = jnp.array([1.0, -1.0])
  >>> opt_state = tx.init(w)
  >>> for _ in range(2):
  ...   point = sam_jax.gradient_point(opt_state, w)
  ...   updates, opt_state = tx.update(jax.grad(loss)(point), opt_state, w)
  ...   w = optax.apply_updates(w, updates)
  >>> round(float(w[0]), 4)
  0.9073

  References:
    Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational
    Overhead, 2024, algorithm 1 (arXiv:2401.12033).
  """
  ascent.check_rho(rho)
  ascent.check_transformation(inner, 'inner')
  inner = optax.with_extra_args_support(inner)
  State = _foreknown.state_type(MsamState, perturbation)

  def init_fn(params):
    inner_state = inner.init(params)
    buffer = _buffer(inner_state, _BUFFERS if momentum is None else (momentum,))
    record = ascent.init_record(params)
    next_rho = {buffer: jnp.zeros_like(record.rho)}  # no buffer yet to follow
    held = _foreknown.init(State.rule, params)
    return State(*record, next_rho, inner_state, held)

  def update_fn(updates, state, params=None, *, value=0.0, **extra_args):
    ((buffer, radius),) = state.next_rho.items()
    record = ascent.next_record(
      state,
      rho=radius,
      updates=updates,
      perturbed_loss=value,
      axis_name=axis_name,
    )
    updates = ascent.where_on(radius, updates, updates)
    ahead = optax.tree.get(state.inner, buffer)
    stepped = _foreknown.advance(State.rule, ahead, state.perturbation, params)
    # Taken at a point in float32, also where the base holds half-precision leaves.
    updates = ascent.cast_like(updates, ahead if params is None else params)
    updates, inner_state = inner.update(
      updates, state.inner, params, value=value, **extra_args
    )
    radius = jnp.asarray(ascent.resolve(rho, record.count), record.rho.dtype)
    return updates, State(*record, {buffer: radius}, inner_state, stepped)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _buffer(inner_state: optax.OptState, names: tuple[str, ...]) -> str:
  """The name of the one momentum buffer in a state.

  Raises:
    ValueError: there is none, or more than one.
  """
  found = [
    name for name in names for _ in optax.tree.get_all_with_path(inner_state, name)
  ]
  if len(found) != 1:
    raise ValueError(
      f'msam needs one buffer named {" or ".join(map(repr, names))} in the state of '
      f"inner, found {len(found)}: 'trace' goes with optax.sgd(..., momentum=...), "
      "'mu' with optax.adam; momentum= names one."
    )
  return found[0]


def gradient_point(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
  """Where the next gradient is to be taken.

  For the methods that take one gradient an update, `msam` and `graphsam`, that is
  w + eps-hat with a perturbation known beforehand; for all others w itself. A training
  step that always calls it works with every method.

  Args:
    opt_state: state of any optax chain.
    params: the parameters w.

  Returns:
    A tree like params; half-precision leaves come out in float32 where perturbed.

  Raises:
    ValueError: several methods of the chain take their gradient elsewhere, or the
      method does not see the tree of the parameters (`optax.flatten`).

  >>> import jax.numpy as jnp, optax, sam_jax
  >>> tx, w = optax.chain(sam_jax.sam(0.05), optax.sgd(0.1)), jnp.ones(2)
  >>> sam_jax.gradient_point(tx.init(w), w).tolist()
  [1.0, 1.0]
  """
  is_own = lambda x: hasattr(x, 'gradient_point')
  own = [s for s in jax.tree.leaves(opt_state, is_leaf=is_own) if is_own(s)]
  if len(own) > 1:
    raise ValueError(
      f'{len(own)} methods of this chain say where the gradient is taken: keep one.'
    )
  return own[0].gradient_point(params) if own else params
