"""Batch sharpness: the curvature of a minibatch's loss along the step that it takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import perturbations
from sam_jax.curvature import products

Direction = Callable[[Any, Any], Any]


class BatchSharpness(NamedTuple):
  """The mean of a curvature over batches.

  Attributes:
    value: the mean over the batches; NaN if no batch has a direction.
    standard_error: its standard error, of batches that were drawn independently; NaN
      for fewer than 2.
    num_batches: number of batches in the mean: those whose direction is not zero.
  """

  value: float
  standard_error: float
  num_batches: int


def batch_sharpness(
  loss_fn: Callable[[Any, Any], jax.Array],
  params: Any,
  batches: Iterable[Any],
  *,
  direction: Direction | None = None,
) -> BatchSharpness:
  r"""The curvature of a batch's loss along its own gradient, averaged over batches.

  .. math:: \mathbb{E}_B \frac{d_B^T H_B d_B}{|d_B|^2}, \qquad
            H_B = \nabla^2 L_B(w), \quad d_B = \nabla L_B(w)

  SGD with small batches is reported to hold it at 2 / eta, while the sharpness of the
  full loss stays below; `batch_sharpness_plateaus` has the values with momentum.
  Products are exact. With a ``direction`` it is the curvature along the steps of
  another method.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch. Give
      the same function objects to several calls and they are compiled once.
    params: where it is taken; a pytree of floating-point arrays.
    batches: batches of the size that is trained with, drawn as in training. Batches
      whose direction is zero are left out of the mean: they take no step.
    direction: ``direction(params, batch) -> d``, a pytree like ``params``, of which
      only the direction counts; None is the gradient. `perturbed_direction` makes that
      of SAM.

  Returns:
    The mean with its standard error.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, x: 0.5 * jnp.mean(x * w ** 2)
  >>> batches = [jnp.array([1., 2.]), jnp.array([3., 4.])]
  >>> batch_sharpness(loss, jnp.array(1.), batches)
  BatchSharpness(value=2.5, standard_error=1.0, num_batches=2)

  References:
    Andreyev and Beneventano, Edge of stochastic stability, arXiv 2412.20553.
  """
  results = [_quotient(loss_fn, direction, params, batch) for batch in batches]
  values = np.array([float(value) for value, there in results if there])
  count = len(values)
  return BatchSharpness(
    float(values.mean()) if count else math.nan,
    float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
    count,
  )


def perturbed_direction(
  loss_fn: Callable[[Any, Any], jax.Array], rho: float, *, normalized: bool = True
) -> Direction:
  r"""The direction of SAM's step on a batch, for `batch_sharpness`.

  .. math:: d_B = \nabla L_B\Big(w + \rho \frac{\nabla L_B(w)}{|\nabla L_B(w)|}\Big)

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch.
    rho: radius of the perturbation, in the units of the parameters.
    normalized: whether the gradient is divided by its norm; False is unnormalised SAM.

  Returns:
    ``direction(params, batch)``. Two that are made of the same arguments are equal, so
    what is compiled for one serves the other.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, x: 0.5 * jnp.mean(x * w ** 2)
  >>> float(perturbed_direction(loss, 0.5)(jnp.array(1.), jnp.array([1., 3.])))
  3.0

  References:
    Foret et al., arXiv 2010.01412, eq. 2.
  """
  return _Perturbed(loss_fn, rho, normalized)


@dataclasses.dataclass(frozen=True)
class _Perturbed:
  loss_fn: Callable[[Any, Any], jax.Array]
  rho: float
  normalized: bool

  def __call__(self, params, batch):
    gradient = jax.grad(self.loss_fn)
    clean = gradient(params, batch)
    if self.normalized:
      eps = perturbations.on_sphere(clean, self.rho)
    else:
      eps = jax.tree.map(lambda g: self.rho * g, clean)
    return gradient(jax.tree.map(jnp.add, params, eps), batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quotient(loss_fn, direction, params, batch):
  """<u, H u> along the unit vector u of a direction, and whether there is one."""
  params = products.at_least_float32(params)
  with jax.default_matmul_precision('highest'):
    step = (direction or jax.grad(loss_fn))(params, batch)
    unit = perturbations.on_sphere(products.at_least_float32(step))
    image = products.hessian_product(loss_fn)(params, batch, unit)
  parts = jax.tree.map(lambda u, h: jnp.sum(u * h), unit, image)
  there = sum(jnp.sum(u != 0) for u in jax.tree.leaves(unit)) > 0
  return sum(jax.tree.leaves(parts)), there
