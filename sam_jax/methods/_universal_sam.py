"""Universal SAM: sharpness as any function of the losses nearby."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations, probes, varying
from sam_jax.methods._declare import Bounds, Radius, method

_FLAGS = {
  'lam': 'universal_lam',
  'num_probes': 'num_probes',
  'antithetic': 'antithetic',
}


class UniversalSamState(NamedTuple):
  """State of `universal_sam`: the record, and the typed key of the probes."""

  count: jax.Array
  rho: jax.Array
  gradient_norm: jax.Array
  perturbed_loss: jax.Array
  key: jax.Array


def universal_sam(
  psi: Callable[[jax.Array], jax.Array],
  phi: Callable[[jax.Array], jax.Array],
  rho: ascent.ScalarOrSchedule = 0.01,
  lam: float = 1.0,
  *,
  sampler: probes.Sampler | None = None,
  num_probes: int | None = None,
  antithetic: bool = False,
  key: jax.Array | int = 0,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the gradient of a sharpness :math:`\phi(E_u \psi(x))` to the clean gradient.

  .. math:: x = \frac{L(w + \rho u) - L(w)}{\rho^2}, \quad u \sim \mu; \qquad
            d = g + \lambda \rho^2 \, \nabla_w \phi\Big(\tfrac1n
            \sum_{i=1}^n \psi(x_i)\Big)

  An antithetic probe is the mean of x over :math:`\pm u`: the first-order term drops
  out, so that :math:`x = u^T H u / 2` up to :math:`O(\rho^2)` at any w. Cost: 1 + n
  gradients, twice n with antithetic probes.

  ``tx.update`` requires ``value_and_grad_fn``; the clean loss is taken from the extra
  argument ``value`` where given, and computed otherwise.

  Args:
    psi: scalar to vector (or scalar), differentiable.
    phi: from the mean of psi to a scalar, differentiable.
    rho: distance of the probes in units of the sampler. It is a number, a schedule of
      the update count, or injected.
    lam: weight of the sharpness, with rho^2 absorbed.
    sampler: ``(key, params) -> u``, a tree like params; `probes.gaussian` unless given.
    num_probes: n, 1 unless given.
    antithetic: whether each probe is the mean over +u and -u.
    key: a typed key or a seed; it lives in the state.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged; all
      replicas draw the same probes.

  Returns:
    A transformation; ``perturbed_loss`` is the mean loss over the probes.

  Raises:
    ValueError: num_probes < 1, lam that is not finite, a plain ``grad_fn``, and as
      `sam`.
    TypeError: as `sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 4)
  >>> trace = sam_jax.universal_sam(psi=lambda x: x, phi=lambda s: s, rho=0.01)
  >>> tx = optax.chain(trace, optax.sgd(0.1))
  >>> w = jnp.array([1.0])
  >>> updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w,
  ...     value_and_grad_fn=jax.value_and_grad(loss))
  >>> updates.shape
  (1,)

  References:
    Tahmasebi et al., A Universal Class of Sharpness-Aware Minimization Algorithms,
    2024, algorithm 1 (arXiv:2406.03682).
  """
  ascent.check_rho(rho)
  ascent.check_finite(lam=lam)
  num = ascent.static_int('num_probes', num_probes, default=1)
  sampler = probes.gaussian if sampler is None else sampler

  def init_fn(params):
    return UniversalSamState(*ascent.init_record(params), probes.typed_key(key))

  def update_fn(
    updates, state, params=None, *, value_and_grad_fn=None, value=None, **extra_args
  ):
    if value_and_grad_fn is None or extra_args.get('grad_fn') is not None:
      raise ValueError(
        'exactly one of grad_fn and value_and_grad_fn is required, and here it has '
        'to be value_and_grad_fn(params) -> (value, grads): probes compare losses.'
      )
    evaluate = ascent.gradient_function(params, None, value_and_grad_fn, updates)
    if value is None:
      value, _ = evaluate(params)
    radius = ascent.resolve(rho, state.count)
    next_key, *probe_keys = jax.random.split(state.key, num + 1)
    signs = (1, -1) if antithetic else (1,)

    def probe(probe_key):
      """Mean loss and gradient over the points of one probe."""
      u = sampler(probe_key, perturbations.at_least_float32(params))
      points = [
        evaluate(ascent.perturb(params, perturbations.scale_tree(u, sign * radius)))
        for sign in signs
      ]
      return jax.tree.map(lambda *x: sum(x) / len(signs), *points)

    losses, grads = zip(*map(probe, probe_keys), strict=True)
    for name in varying.axes(losses[0]):  # losses of one replica weigh its gradients
      varying.require(updates, name)
    on = jnp.asarray(radius) > 0
    squared = jnp.where(on, radius, 1) ** 2
    x = (jnp.stack(losses) - value) / squared
    weights = _chain_rule(psi, phi, x)  # d phi / d x_i
    result = jax.tree.map(
      lambda g, *probes: (
        g + lam * sum(w * (p - g) for w, p in zip(weights, probes, strict=True))
      ).astype(g.dtype),
      updates,
      *grads,
    )
    record = ascent.next_record(
      state,
      rho=radius,
      updates=updates,
      perturbed_loss=sum(losses) / num,
      axis_name=axis_name,
    )
    return (
      ascent.where_on(radius, result, updates),
      UniversalSamState(*record, next_key),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _chain_rule(psi: Callable, phi: Callable, x: jax.Array) -> jax.Array:
  """Derivatives (n,) of ``phi(mean_i psi(x_i))`` by the x_i."""

  def sharpness(x):
    return phi(jax.tree.map(lambda s: s.mean(axis=0), jax.vmap(psi)(x)))

  return jax.grad(sharpness)(x)


@method(flags=_FLAGS)
def trace_sam(
  rho: Radius = 0.01,
  lam: float = 1.0,
  *,
  sampler: probes.Sampler | None = None,
  num_probes: Annotated[int, Bounds(least=1)] | None = None,
  antithetic: bool = False,
  key: jax.Array | int = 0,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Regularizes the trace of the Hessian: :math:`E x = \mathrm{tr}(H) / 2`.

  Args:
    rho: distance of the probes in units of the sampler. It is a number, a schedule of
      the update count, or injected.
    lam: weight of the sharpness, with rho^2 absorbed.
    sampler: ``(key, params) -> u``, a tree like params; `probes.gaussian` unless given.
    num_probes: number of probes an update; 1 unless given.
    antithetic: whether each probe is the mean over a direction and its opposite.
    key: a typed key or a seed; it lives in the state.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged; all
      replicas draw the same probes.

  Returns:
    A transformation as `universal_sam`.

  Raises:
    ValueError: as `universal_sam`.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> loss = lambda w: jnp.sum(w ** 2)
  >>> tx = optax.chain(sam_jax.trace_sam(antithetic=True), optax.sgd(0.1))
  >>> w = jnp.array([1.0, 2.0])
  >>> updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w,
  ...     value_and_grad_fn=jax.value_and_grad(loss))
  >>> [round(float(u), 4) for u in updates]  # a quadratic's trace has no gradient
  [-0.2, -0.4]

  References:
    Tahmasebi et al., 2024, section 4 (arXiv:2406.03682).
  """
  return universal_sam(
    lambda x: x,
    lambda s: s,
    rho,
    lam,
    sampler=sampler,
    num_probes=num_probes,
    antithetic=antithetic,
    key=key,
    axis_name=axis_name,
  )


@method(flags=_FLAGS)
def frob_sam(
  rho: Radius = 0.005,
  lam: float = 0.005,
  *,
  sampler: probes.Sampler | None = None,
  num_probes: Annotated[int, Bounds(least=2)] | None = None,
  antithetic: bool = False,
  key: jax.Array | int = 0,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Regularizes the Frobenius norm of the Hessian through the variance of the loss.

  .. math:: d = g + \frac{\lambda}{\rho^2} \mathrm{Cov}_{n-1}(L_i, \nabla L_i)
              = g + \frac{\lambda \rho^2}{2} \nabla_w \mathrm{Var}_{n-1}(x)

  :math:`\mathrm{Var}\,x \to \|H\|_F^2 / 2` at a stationary point, and with
  ``antithetic=True`` anywhere; otherwise :math:`\|g\|^2 / \rho^2` dominates.

  Args:
    rho: distance of the probes in units of the sampler. It is a number, a schedule of
      the update count, or injected.
    lam: weight of the sharpness, with rho^2 absorbed.
    sampler: ``(key, params) -> u``, a tree like params; `probes.gaussian` unless given.
    num_probes: number of probes an update, at least 2; 2 unless given.
    antithetic: whether each probe is the mean over a direction and its opposite.
    key: a typed key or a seed; it lives in the state.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged; all
      replicas draw the same probes.

  Returns:
    A transformation as `universal_sam`.

  Raises:
    ValueError: num_probes < 2, and as `universal_sam`.

  >>> import optax, sam_jax
  >>> tx = optax.chain(sam_jax.frob_sam(antithetic=True), optax.sgd(0.1))

  References:
    Tahmasebi et al., 2024, section 4 (arXiv:2406.03682).
  """
  num = ascent.static_int('num_probes', num_probes, default=2)
  if num < 2:
    raise ValueError(f'num_probes must be at least 2, got {num}: a variance needs two.')
  bessel = num / (num - 1)
  return universal_sam(
    lambda x: jnp.stack([x, x**2]),
    lambda s: 0.5 * bessel * (s[1] - s[0] ** 2),
    rho,
    lam,
    sampler=sampler,
    num_probes=num,
    antithetic=antithetic,
    key=key,
    axis_name=axis_name,
  )


@method(flags=_FLAGS | {'half_width': 'det_half_width'})
def det_sam(
  rho: Radius = 1.0,
  lam: float = 1.0,
  *,
  half_width: Annotated[float, Bounds(above=0)] = 0.01,
  num_probes: Annotated[int, Bounds(least=1)] | None = None,
  antithetic: bool = False,
  key: jax.Array | int = 0,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Regularizes the determinant of the Hessian through a Gaussian integral.

  .. math:: \psi(x) = e^{-x/2}, \qquad \phi(s) = s^{-2}, \qquad
            u \text{ uniform in } [-h, h]^n

  The integral of :math:`e^{-u^T H u / 4}` over a wide cube is proportional to
  :math:`\det(H)^{-1/2}`; a small h linearises it to the trace.

  Args:
    rho: distance of the probes in units of the sampler. It is a number, a schedule of
      the update count, or injected.
    lam: weight of the sharpness, with rho^2 absorbed.
    half_width: half of the width of the cube of probes, h, in the units of the
      parameters (times rho).
    num_probes: number of probes an update; 1 unless given.
    antithetic: whether each probe is the mean over a direction and its opposite.
    key: a typed key or a seed; it lives in the state.
    axis_name: the mapped axis, over which the recorded norm and loss are averaged; all
      replicas draw the same probes.

  Returns:
    A transformation as `universal_sam`.

  Raises:
    ValueError: half_width <= 0, and as `universal_sam`.

  >>> import optax, sam_jax
  >>> tx = optax.chain(sam_jax.det_sam(half_width=0.1), optax.sgd(0.1))

  References:
    Tahmasebi et al., 2024, section 4 (arXiv:2406.03682).
  """
  if not isinstance(half_width, jax.Array) and not 0 < half_width < math.inf:
    raise ValueError(f'half_width must be positive and finite, got {half_width}.')
  return universal_sam(
    lambda x: jnp.exp(-x / 2),
    lambda s: s**-2,
    rho,
    lam,
    sampler=probes.uniform_cube(half_width),
    num_probes=num_probes,
    antithetic=antithetic,
    key=key,
    axis_name=axis_name,
  )
