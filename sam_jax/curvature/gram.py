"""Positive semidefinite operators: Gauss-Newton, and the empirical Fisher matrix.

Both are Hessians: of a loss in which the network is replaced by its tangent at the
parameters. So they share the products, the batches and the cache of `hessian`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sam_jax.curvature import operators, products
from sam_jax.curvature.products import Batch, Params

OutputsFn = Callable[[Params, Batch], Any]


def gauss_newton(
  outputs_fn: OutputsFn,
  loss_fn: Callable[[Any, Batch], jax.Array],
  params: Params,
  batches: Iterable[Batch],
  *,
  weight: Callable[[Batch], float] | None = None,
  max_cache_gib: float = 2.0,
) -> operators.HessianOperator:
  r"""The generalized Gauss-Newton matrix of the mean loss over a data set.

  .. math:: G = \sum_b \frac{n_b}{\sum_c n_c} J_b^T H_b J_b, \qquad
            J_b = \frac{\partial f_b}{\partial w}, \quad
            H_b = \frac{\partial^2 \ell_b}{\partial f_b^2}

  It is the Hessian less the curvature of the network itself: the same for a network
  that is linear in its parameters and, with squared errors, where all errors are 0. It
  is positive semidefinite if the loss is convex in the outputs. For softmax
  cross-entropy it is the Fisher matrix of the model's own label distribution.

  Args:
    outputs_fn: ``outputs_fn(params, batch)``, the network's outputs: a pytree of
      floating-point arrays. Give the same function objects to several calls and they
      are compiled once.
    loss_fn: ``loss_fn(outputs, batch) -> scalar``, the mean loss over the batch.
    params: where the matrix is taken; as in `hessian`.
    batches: as in `hessian`.
    weight: as in `hessian`.
    max_cache_gib: as in `hessian`.

  Returns:
    The operator; a product costs about two gradients.

  Raises:
    TypeError: as `hessian`.
    ValueError: as `hessian`.

  >>> import jax.numpy as jnp
  >>> outputs = lambda w, x: jnp.exp(w) * x
  >>> loss = lambda f, x: 0.5 * jnp.mean((f - 1) ** 2)
  >>> at, data = jnp.log(jnp.array(2.)), [jnp.array([1., 3.])]
  >>> op = gauss_newton(outputs, loss, at, data)
  >>> round(float(op.matvec(jnp.array(1.))), 4)  # mean of (2 x)^2
  20.0

  References:
    Schraudolph, Fast curvature matrix-vector products for second-order gradient
    descent, Neural Computation 14 (2002); Martens, arXiv 1412.1193.
  """
  return operators.HessianOperator(
    gauss_newton_product(outputs_fn, loss_fn),
    params,
    operators.WeightedBatches(batches, weight),
    max_cache_gib,
  )


def empirical_fisher(
  example_losses_fn: Callable[[Params, Batch], jax.Array],
  params: Params,
  batches: Iterable[Batch],
  *,
  weight: Callable[[Batch], float] | None = None,
  max_cache_gib: float = 2.0,
) -> operators.HessianOperator:
  r"""The uncentred second moment of the gradients of single examples.

  .. math:: F = \frac1N \sum_{i=1}^N g_i g_i^T, \qquad g_i = \nabla \ell_i(w)

  With the labels of the data this is the *empirical* Fisher matrix: the noise of
  stochastic gradients, and no approximation of the Hessian in general. Its trace is the
  mean squared norm of an example's gradient.

  Args:
    example_losses_fn: ``example_losses_fn(params, batch) -> (B,)``, the loss of each
      example. Those of padding examples must be 0 whatever the parameters: multiply
      them by 0.
    params: where the matrix is taken; as in `hessian`.
    batches: as in `hessian`.
    weight: number of real examples of a batch, whose sum is N; as in `hessian`.
    max_cache_gib: as in `hessian`.

  Returns:
    The operator; a product costs about two gradients.

  Raises:
    TypeError: as `hessian`.
    ValueError: as `hessian`; and at the first product, if ``example_losses_fn`` does
      not answer one loss an example.

  >>> import jax.numpy as jnp
  >>> op = empirical_fisher(lambda w, x: w * x, jnp.array(1.), [jnp.array([1., 3.])])
  >>> float(op.matvec(jnp.array(1.)))
  5.0

  References:
    Kunstner et al., Limitations of the empirical Fisher approximation, arXiv
    1905.12558.
  """
  return operators.HessianOperator(
    products.HessianProduct(_HalfSquares(example_losses_fn)),
    params,
    operators.WeightedBatches(batches, weight, sums=True),
    max_cache_gib,
  )


def gauss_newton_product(
  outputs_fn: OutputsFn, loss_fn: Callable[[Any, Batch], jax.Array]
) -> products.HessianProduct:
  r"""Products with the generalized Gauss-Newton matrix, as a pure function of arrays.

  .. math:: (w, b, v) \mapsto J_b^T H_b J_b\, v

  It can be used inside `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.grad`, and is
  exact, with matrix products of the highest precision. `gauss_newton` says what the
  matrix is; `mean_product` takes it over several batches.

  Args:
    outputs_fn: ``outputs_fn(params, batch)``, the network's outputs: a pytree of
      floating-point arrays.
    loss_fn: ``loss_fn(outputs, batch) -> scalar``, the mean loss over one batch.

  Returns:
    ``product(params, batch, vector)``, a pytree like ``params``.

  >>> import jax.numpy as jnp
  >>> product = gauss_newton_product(
  ...     lambda w, x: jnp.exp(w) * x, lambda f, x: 0.5 * jnp.mean((f - 1) ** 2))
  >>> at, data = jnp.log(jnp.array(2.)), jnp.array([1., 3.])
  >>> round(float(product(at, data, jnp.array(1.))), 4)  # mean of (2 x)^2
  20.0
  """
  return products.HessianProduct(_TangentLoss(outputs_fn, loss_fn))


def empirical_fisher_product(
  example_losses_fn: Callable[[Params, Batch], jax.Array],
  *,
  weight: Callable[[Batch], Any] | None = None,
) -> products.HessianProduct:
  r"""Products with the empirical Fisher matrix, as a pure function of arrays.

  .. math:: (w, b, v) \mapsto \frac{1}{n_b} \sum_{i \in b} g_i\, (g_i^T v), \qquad
            g_i = \nabla \ell_i(w)

  It can be used inside `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.grad`, and is
  exact, with matrix products of the highest precision.

  Args:
    example_losses_fn: ``example_losses_fn(params, batch) -> (B,)``, the loss of each
      example. Those of padding examples must be 0 whatever the parameters: multiply
      them by 0.
    weight: ``weight(batch) -> number``, the number n of real examples of a batch, a
      pure function of arrays; give the same to `mean_product`. None: the leading
      dimension of the batch's first leaf.

  Returns:
    ``product(params, batch, vector)``, a pytree like ``params``; 0 for a batch without
    real examples.

  Raises:
    ValueError: when called, if ``example_losses_fn`` does not answer one loss an
      example.

  >>> import jax.numpy as jnp
  >>> product = empirical_fisher_product(lambda w, x: w * x)
  >>> float(product(jnp.array(1.), jnp.array([1., 3.]), jnp.array(1.)))
  5.0
  """
  weight = weight or products.leading_dimension
  return products.HessianProduct(_HalfSquares(example_losses_fn, weight))


@dataclasses.dataclass(frozen=True)
class _TangentLoss:
  """The loss of the network's tangent; equal for equal functions, as jit needs it."""

  outputs_fn: OutputsFn
  loss_fn: Callable[[Any, Batch], jax.Array]

  def __call__(self, params: Params, batch: Batch) -> jax.Array:
    return self.loss_fn(_tangent(self.outputs_fn, params, batch), batch)


@dataclasses.dataclass(frozen=True)
class _HalfSquares:
  """Half the sum of squares of what the tangent adds to the examples' losses.

  With a weight it is divided by the number of examples that the weight answers.
  """

  example_losses_fn: Callable[[Params, Batch], jax.Array]
  weight: Callable[[Batch], Any] | None = None

  def __call__(self, params: Params, batch: Batch) -> jax.Array:
    losses = _tangent(self.example_losses_fn, params, batch)
    if losses.ndim != 1:
      raise ValueError(
        f'example_losses_fn answered an array of shape {losses.shape}: give one loss '
        'for each example, (B,), and not their mean'
      )
    half = 0.5 * jnp.sum((losses - jax.lax.stop_gradient(losses)) ** 2)
    if self.weight is None:
      return half
    count = jnp.asarray(self.weight(batch), half.dtype)
    return half / jnp.where(count > 0, count, 1)


def _tangent(outputs_fn: OutputsFn, params: Params, batch: Batch) -> Any:
  """The outputs, as a function of the parameters whose second derivative is 0."""
  return _linear(outputs_fn, params, jax.lax.stop_gradient(params), batch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _linear(outputs_fn, params, at, batch):
  del params
  return outputs_fn(at, batch)


@_linear.defjvp
def _linear_jvp(outputs_fn, primals, tangents):
  params, at, batch = primals
  change = jax.jvp(lambda p: outputs_fn(p, batch), (at,), tangents[:1])[1]
  # Not the outputs that jvp gives: those do not depend on params.
  return _linear(outputs_fn, params, at, batch), change
