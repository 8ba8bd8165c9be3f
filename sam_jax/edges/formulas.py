"""Edges of stability: the largest curvature that an optimizer's steps can stand.

Each edge is that of a quadratic along an eigenvector of the Hessian. Where an edge is
given for a network, the sharpness of the loss is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import perturbations
from sam_jax.curvature import products

Scalars = jax.Array | np.ndarray | Sequence[float] | float


class Plateaus(NamedTuple):
  """Where batch sharpness settles under momentum.

  Attributes:
    small_batches: the plateau of small batches.
    full_batch: the plateau of large batches, the edge of full-batch heavy ball.
  """

  small_batches: jax.Array
  full_batch: jax.Array


def gd_edge(learning_rate: Scalars) -> jax.Array:
  r"""The sharpness at which gradient descent becomes unstable.

  .. math:: \lambda = 2 / \eta

  Args:
    learning_rate: the learning rate; a number or an array.

  Returns:
    The edge, with the shape of ``learning_rate``; infinite where that is 0.

  Raises:
    ValueError: ``learning_rate`` is a number below 0.

  >>> float(gd_edge(0.5))
  4.0

  References:
    Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, arXiv 2103.00065.
  """
  return _momentum_edge(learning_rate, 0.0, nesterov=False)


def heavy_ball_edge(learning_rate: Scalars, momentum: Scalars) -> jax.Array:
  r"""The sharpness at which gradient descent with heavy-ball momentum diverges.

  .. math:: \lambda = \frac{2 (1 + \beta)}{\eta}, \qquad
            v \leftarrow \beta v + g, \quad w \leftarrow w - \eta v

  This is the momentum of ``optax.sgd(learning_rate, momentum)``.

  Args:
    learning_rate: the learning rate; a number or an array.
    momentum: the decay rate beta of the velocity, in [0, 1); a number or an array that
      broadcasts against ``learning_rate``.

  Returns:
    The edge, of the broadcast shape.

  Raises:
    ValueError: a number is out of range.

  >>> round(float(heavy_ball_edge(0.5, 0.9)), 4)
  7.6

  References:
    Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, arXiv 2103.00065.
  """
  return _momentum_edge(learning_rate, momentum, nesterov=False)


def nesterov_edge(learning_rate: Scalars, momentum: Scalars) -> jax.Array:
  r"""The sharpness at which gradient descent with Nesterov momentum diverges.

  .. math:: \lambda = \frac{2 (1 + \beta)}{\eta (1 + 2 \beta)}, \qquad
            v \leftarrow \beta v + g, \quad w \leftarrow w - \eta (g + \beta v)

  This is the momentum of ``optax.sgd(learning_rate, momentum, nesterov=True)``.

  Args:
    learning_rate: the learning rate; a number or an array.
    momentum: the decay rate beta of the velocity, in [0, 1); a number or an array that
      broadcasts against ``learning_rate``.

  Returns:
    The edge, of the broadcast shape.

  Raises:
    ValueError: a number is out of range.

  >>> round(float(nesterov_edge(0.5, 0.9)), 4)
  2.7143

  References:
    Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, arXiv 2103.00065.
  """
  return _momentum_edge(learning_rate, momentum, nesterov=True)


def adam_edge(
  learning_rate: Scalars, b1: Scalars = 0.9, *, nesterov: bool = False
) -> jax.Array:
  r"""The preconditioned sharpness at which full-batch Adam becomes unstable.

  .. math:: \lambda_{\max}(P^{-1} H) = \frac{2 (1 + \beta_1)}{(1 - \beta_1) \eta}

  It is 38 over the learning rate for the default beta. P is the preconditioner that
  `sam_jax.curvature.adam_preconditioner` gives, taken as constant: over a frozen P
  Adam is heavy ball with the learning rate eta (1 - beta).

  Args:
    learning_rate: the learning rate; a number or an array.
    b1: Adam's decay rate of the first moments, in [0, 1); a number or an array that
      broadcasts against ``learning_rate``.
    nesterov: whether the first moments are those of ``optax.nadam``; the edge is then
      lower by the factor 1 + 2 beta, that of a late step, at which the two corrections
      of the bias are 1.

  Returns:
    The edge, of the broadcast shape.

  Raises:
    ValueError: a number is out of range.

  >>> round(float(adam_edge(0.001)))
  38000

  References:
    Cohen et al., Adaptive gradient methods at the edge of stability, arXiv 2207.14484.
  """
  rate, b1 = _numbers(learning_rate=learning_rate, b1=b1)
  return _momentum_edge(rate * (1 - b1), b1, nesterov=nesterov)


def sam_edge(
  gradient_norm: Scalars,
  learning_rate: Scalars,
  rho: Scalars,
  *,
  momentum: Scalars = 0.0,
  nesterov: bool = False,
) -> jax.Array:
  r"""The sharpness at which SAM becomes unstable, the SAM-edge.

  .. math:: \lambda \Big(1 + \frac{\rho \lambda}{|g|}\Big) = E, \qquad
            \lambda = \frac{2 E}{1 + \sqrt{1 + 4 \rho E / |g|}}

  where E is the edge without a perturbation: 2 / eta for gradient descent, and that of
  `heavy_ball_edge` or `nesterov_edge` with momentum. Along an eigenvector the gradient
  at :math:`w + \rho g / |g|` is that at w times :math:`1 + \rho \lambda / |g|`, with
  the norm taken as constant, and the optimizer that gets this gradient meets its edge
  where the product with the eigenvalue does.

  This form loses no digits for small rho, and is evaluated such that nothing but the
  edge itself leaves the range of float32. Its derivatives are finite at rho = 0 too,
  where that by rho is :math:`-E^2 / |g|`; that by a norm of 0 is taken as 0.

  Args:
    gradient_norm: norm |g| of the clean gradient over all parameters; a number or an
      array.
    learning_rate: the learning rate eta.
    rho: radius of the perturbation, in the units of the parameters.
    momentum: decay rate of the velocity, in [0, 1); 0 is gradient descent.
    nesterov: whether the momentum is Nesterov's.

  Returns:
    The edge, of the shape to which the arguments broadcast: E where rho is 0, and 0
    where the norm is 0 and rho is not. Infinite where the learning rate is 0.

  Raises:
    ValueError: a number is out of range.

  >>> [round(float(sam_edge(0.1, 0.4, rho)), 4) for rho in (0., 0.03, 0.1)]
  [5.0, 2.7429, 1.7913]

  References:
    Long and Bartlett, Sharpness-aware minimization and the edge of stability, arXiv
    2309.12488; the edge with momentum is derived from theirs here.
  """
  norm, rate, rho, momentum = _numbers(
    gradient_norm=gradient_norm, learning_rate=learning_rate, rho=rho, momentum=momentum
  )
  edge = _momentum_edge(rate, momentum, nesterov=nesterov)
  finite = jnp.isfinite(edge)
  return jnp.where(finite, _perturbed(norm, rho, jnp.where(finite, edge, 1)), edge)


@jax.custom_jvp
def _perturbed(norm: jax.Array, rho: jax.Array, edge: jax.Array) -> jax.Array:
  """The positive root of ``x (1 + rho x / norm) = edge``, for a finite edge."""
  # With square roots every product and quotient here stays in range, where rho * edge
  # or rho * edge / norm does not.
  high, low = jnp.sqrt(edge), jnp.sqrt(norm)
  half = low / high / 2
  below = half + jnp.hypot(half, jnp.sqrt(rho))
  root = high * low / jnp.where(below > 0, below, 1)
  return jnp.where((rho == 0) & ~jnp.isnan(norm), edge, root)


@_perturbed.defjvp
def _perturbed_jvp(primals, tangents):
  """From the equation, because that of a square root at rho = 0 is infinite."""
  norm, rho, edge = primals
  root = _perturbed(norm, rho, edge)
  share = root / edge
  by_edge = share / (2 - share)
  # Infinite where the norm is 0 and rho is not, and taken as 0 there.
  over = jnp.where(norm > 0, root / jnp.where(norm > 0, norm, 1), 0)
  by_rho = -root * over * by_edge
  by_norm = rho * over * over * by_edge
  change = (x * t for x, t in zip((by_norm, by_rho, by_edge), tangents, strict=True))
  return root, sum(change)


def usam_edge(
  learning_rate: Scalars,
  rho: Scalars,
  *,
  momentum: Scalars = 0.0,
  nesterov: bool = False,
) -> jax.Array:
  r"""The sharpness at which SAM with unnormalised perturbations becomes unstable.

  .. math:: \lambda (1 + \rho \lambda) = E, \qquad
            \lambda = \frac{2 E}{1 + \sqrt{1 + 4 \rho E}}

  where E is the edge without a perturbation, 2 / eta for gradient descent. On a
  quadratic this is exact: the gradient at :math:`w + \rho g` is
  :math:`(1 + \rho H) g`.

  Args:
    learning_rate: the learning rate eta; a number or an array.
    rho: multiple of the gradient by which the parameters are perturbed.
    momentum: decay rate of the velocity, in [0, 1); 0 is gradient descent.
    nesterov: whether the momentum is Nesterov's.

  Returns:
    The edge, of the shape to which the arguments broadcast.

  Raises:
    ValueError: a number is out of range.

  >>> round(float(usam_edge(1.0, 0.5)), 4)
  1.2361

  References:
    Andriushchenko and Flammarion, Towards understanding sharpness-aware minimization,
    arXiv 2206.06232 (the method); the edge follows from its update.
  """
  return sam_edge(1.0, learning_rate, rho, momentum=momentum, nesterov=nesterov)


def batch_sharpness_plateaus(learning_rate: Scalars, momentum: Scalars) -> Plateaus:
  r"""Where batch sharpness is reported to settle under SGD with momentum.

  .. math:: \frac{2 (1 - \beta)}{\eta} \text{ for small batches}, \qquad
            \frac{2 (1 + \beta)}{\eta} \text{ for large ones}

  Without momentum both are 2 / eta. The plateau of large batches is the edge of
  `heavy_ball_edge`. That of small batches is the edge of gradient descent with the
  learning rate eta / (1 - beta), which is the effective one of heavy ball for slow
  changes. `batch_sharpness` measures what is compared with them.

  Args:
    learning_rate: the learning rate eta; a number or an array.
    momentum: decay rate of the velocity, in [0, 1).

  Returns:
    Both plateaus, of the broadcast shape.

  Raises:
    ValueError: a number is out of range.

  >>> [round(float(x), 3) for x in batch_sharpness_plateaus(0.1, 0.9)]
  [2.0, 38.0]

  References:
    arXiv 2604.14108 (the two plateaus); Andreyev and Beneventano, Edge of stochastic
    stability, arXiv 2412.20553 (batch sharpness).
  """
  rate, momentum = _numbers(learning_rate=learning_rate, momentum=momentum)
  full = _momentum_edge(rate, momentum, nesterov=False)
  return Plateaus((1 - momentum) * _momentum_edge(rate, 0.0, nesterov=False), full)


def alignment(vector: Any, eigenvector: Any) -> jax.Array:
  r"""Absolute cosine of the angle between two vectors.

  .. math:: \frac{|\langle u, v \rangle|}{|u| \, |v|}

  An eigenvector has no sign, so neither has this.

  Args:
    vector: a pytree of floating-point arrays, such as a gradient.
    eigenvector: a pytree of the same shapes; of any length.

  Returns:
    A scalar from 0 to 1, of at least float32; 0 where a vector is zero. Entries of any
    size that the dtype can hold are right: no square overflows or underflows.

  >>> import jax.numpy as jnp
  >>> gradient, v = {'w': jnp.array([3., 4.])}, {'w': jnp.array([-2., 0.])}
  >>> round(float(alignment(gradient, v)), 6)
  0.6
  """
  shapes = [jax.tree.map(jnp.shape, tree) for tree in (vector, eigenvector)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'vector and eigenvector must have the same shapes, got {shapes[0]} and '
      f'{shapes[1]}: of several eigenvectors take one'
    )
  unit, other = (
    perturbations.on_sphere(products.at_least_float32(x)) for x in (vector, eigenvector)
  )
  parts = jax.tree.map(lambda u, v: jnp.sum(u * v), unit, other)
  return jnp.minimum(jnp.abs(sum(jax.tree.leaves(parts))), 1)


def _momentum_edge(learning_rate, momentum, *, nesterov) -> jax.Array:
  rate, momentum = _numbers(learning_rate=learning_rate, momentum=momentum)
  edge = 2 * (1 + momentum) / rate
  return edge / (1 + 2 * momentum) if nesterov else edge


_BELOW_ONE = ('momentum', 'b1')


def _numbers(**given: Scalars) -> list[jax.Array]:
  """The arguments, lists too, as arrays of one floating-point dtype and one shape.

  Only plain numbers are checked: to look at an array waits for it, or cannot be done.
  """
  for name, value in given.items():
    if not isinstance(value, int | float | np.generic):
      continue
    most = 1 if name in _BELOW_ONE else math.inf
    if value < 0 or value >= most:
      raise ValueError(
        f'{name}={value}: give a number of at least 0 and below {most:g}'
      )
  given = {
    k: np.asarray(x) if isinstance(x, list | tuple) else x for k, x in given.items()
  }
  dtype = jnp.promote_types(jnp.result_type(*given.values()), jnp.float32)
  return jnp.broadcast_arrays(*(jnp.asarray(x, dtype) for x in given.values()))
