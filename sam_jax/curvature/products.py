"""Curvature as pure functions ``product(params, batch, vector)``.

They hold nothing but functions, so they are used inside `jax.jit`, `jax.vmap`,
`jax.lax.scan` and `jax.grad`, with parameters and data as arguments, and two products
made of the same functions are equal: what is compiled for one serves the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
Batch = Any
LossFn = Callable[[Params, Batch], jax.Array]
Product = Callable[[Params, Batch, Params], Params]

# What JAX says of an operation that has no rule for a second derivative: a primitive
# without a rule, custom_vjp inside custom_vjp, a callback, a Pallas kernel.
_NO_RULE = re.compile(
  'ifferentiation rule|forward-mode|support JVP|JVP with|Linearization failed'
)


class SecondDerivativeError(TypeError):
  """A loss has an operation that can be differentiated once, but not twice."""


def hvp(
  loss_fn: Callable[[Params], jax.Array], params: Params, vector: Params
) -> Params:
  r"""Product of the Hessian of a loss with a vector, exact (forward over reverse).

  .. math:: H v = \left.\frac{d}{dt} \nabla L(w + t v)\right|_{t=0}

  Args:
    loss_fn: the loss, ``loss_fn(params) -> scalar``.
    params: where the Hessian is taken; any pytree of floating-point arrays.
    vector: a pytree like ``params``.

  Returns:
    ``H v``, a pytree like ``params``.

  Raises:
    SecondDerivativeError: the loss has a fused kernel that is differentiable only once;
      it is a TypeError. Differentiable rules of `jax.custom_vjp` are no obstacle.

  >>> import jax.numpy as jnp
  >>> loss = lambda w: w['a'] ** 2 * w['b']
  >>> at = {'a': jnp.float32(3), 'b': jnp.float32(5)}
  >>> product = hvp(loss, at, {'a': jnp.float32(1), 'b': jnp.float32(0)})
  >>> float(product['a']), float(product['b'])
  (10.0, 6.0)

  References:
    Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
  """
  with differentiated_twice():
    return jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]


@contextlib.contextmanager
def differentiated_twice() -> Iterator[None]:
  """Turns what JAX says of a kernel that has only a gradient into a sentence."""
  try:
    yield
  except (TypeError, NotImplementedError, ValueError) as error:
    found = str(error).strip().split('\n')[0]
    if isinstance(error, SecondDerivativeError) or not _NO_RULE.search(found):
      raise
    raise SecondDerivativeError(
      'the loss cannot be differentiated forward over reverse, as exact products need '
      f'it ("{found}"): a fused kernel in it has a rule for the gradient only; measure '
      'with the plain implementation of that operation, for attention '
      "jax.nn.dot_product_attention(..., implementation='xla')"
    ) from error


@dataclasses.dataclass(frozen=True)
class HessianProduct:
  """The product of the Hessian of a loss with a vector, as a pure function.

  Made by `hessian_product`, `gauss_newton_product` and `empirical_fisher_product`.
  Calling it, ``product(params, batch, vector)``, gives the product.

  Attributes:
    loss_fn: ``loss_fn(params, batch) -> scalar``, whose Hessian it is.
  """

  loss_fn: LossFn

  def __call__(self, params: Params, batch: Batch, vector: Params) -> Params:
    """Multiplies the Hessian at ``params`` over ``batch`` by a vector."""
    params = at_least_float32(params)
    vector = jax.tree.map(lambda p, v: jnp.asarray(v, p.dtype), params, vector)
    with jax.default_matmul_precision('highest'):
      return hvp(lambda p: self.loss_fn(p, batch), params, vector)

  def linearize(self, params: Params, batch: Batch) -> Callable[[Params], Params]:
    """Computes what all products at ``params`` share.

    Args:
      params: where the Hessian is taken.
      batch: the data that the loss is taken over.

    Returns:
      ``matvec(vector)``, linear; a call costs two gradients instead of three. It is a
      pytree of the arrays that it keeps, the activations and their gradients, so it
      can be handed to and returned by compiled functions. Its vectors have the dtypes
      of ``params``, but float32 where those are narrower.

    >>> import jax.numpy as jnp
    >>> product = hessian_product(lambda w, x: jnp.sum(x * w ** 3))
    >>> matvec = product.linearize(jnp.array([1., 2.]), jnp.array([1., 1.]))
    >>> matvec(jnp.ones(2)).tolist()
    [6.0, 12.0]
    """
    gradient = jax.grad(lambda p: self.loss_fn(p, batch))
    with jax.default_matmul_precision('highest'), differentiated_twice():
      return jax.linearize(gradient, at_least_float32(params))[1]


def hessian_product(loss_fn: LossFn) -> HessianProduct:
  r"""Products with the Hessian of a loss, as a pure function of arrays.

  .. math:: (w, b, v) \mapsto \nabla^2 L_b(w)\, v

  The product is exact, `jax.jvp` of `jax.grad`, with matrix products of the highest
  precision. It can be used inside `jax.jit`, `jax.vmap`, `jax.lax.scan` and
  `jax.grad`. `mean_product` takes it over several batches.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over one batch.

  Returns:
    ``product(params, batch, vector)``, a pytree like ``params``; ``batch`` is one
    batch, and ``vector`` a pytree like ``params``. Parameters and vectors narrower
    than float32 are widened to float32. ``product.linearize(params, batch)`` gives a
    function of the vector alone that repeats no work.

  >>> import jax, jax.numpy as jnp
  >>> product = hessian_product(lambda w, x: jnp.mean((x @ w) ** 4))
  >>> x, v = jnp.eye(2), jnp.array([1., 0.])
  >>> jax.vmap(product, (0, None, None))(jnp.ones((3, 2)), x, v).tolist()
  [[6.0, 0.0], [6.0, 0.0], [6.0, 0.0]]
  """
  return HessianProduct(loss_fn)


@dataclasses.dataclass(frozen=True)
class MeanProduct:
  """A product averaged over stacked batches; made by `mean_product`."""

  product: Product
  weight: Callable[[Batch], Any]

  def __call__(self, params: Params, batches: Batch, vector: Params) -> Params:
    """Multiplies the mean over the leading axis of ``batches`` by a vector."""

    def add(carry, batch):
      total, examples = carry
      count = jnp.asarray(self.weight(batch), examples.dtype)
      total = jax.tree.map(
        # A batch without examples may have a loss of 0 / 0.
        lambda t, p: t + jnp.where(count > 0, count.astype(p.dtype) * p, 0),
        total,
        self.product(params, batch, vector),
      )
      return (total, examples + count), None

    total = jax.tree.map(jnp.zeros_like, at_least_float32(params))
    zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(total)))
    (total, examples), _ = jax.lax.scan(add, (total, zero), batches)
    return jax.tree.map(lambda leaf: leaf / examples.astype(leaf.dtype), total)


def mean_product(
  product: Product, *, weight: Callable[[Batch], Any] | None = None
) -> MeanProduct:
  r"""A product over several batches of one shape, one after the other.

  .. math:: (w, (b_1, \dots, b_m), v) \mapsto
            \sum_i \frac{n_i}{\sum_j n_j} A_{b_i}(w)\, v

  Args:
    product: ``product(params, batch, vector)`` over one batch, the mean over the
      examples of the batch.
    weight: ``weight(batch) -> number``, the number of examples of one batch, a pure
      function of arrays; batches with 0 examples have no part in the mean. None: the
      leading dimension of the batch's first leaf.

  Returns:
    ``mean(params, batches, vector)``, where ``batches`` is a batch whose leaves have a
    further leading axis, (m, ...). It takes the memory of one batch.

  >>> import jax.numpy as jnp
  >>> product = hessian_product(lambda w, x: jnp.mean((x * w) ** 2))
  >>> batches = jnp.array([[1., 2.], [3., 4.]])  # two batches of two examples
  >>> float(mean_product(product)(jnp.array(0.), batches, jnp.array(1.)))
  15.0
  """
  return MeanProduct(product, weight or leading_dimension)


def leading_dimension(batch: Batch) -> int:
  """The leading dimension of a batch's leaves, its number of examples."""
  leaves = jax.tree.leaves(batch)
  if not leaves or not np.ndim(leaves[0]):
    raise ValueError(
      'the first leaf of a batch has no leading dimension: pass weight= with the '
      'number of examples of a batch'
    )
  lengths = {np.shape(leaf)[0] for leaf in leaves if np.ndim(leaf)}
  if len(lengths) > 1:
    raise ValueError(
      f'the arrays of a batch have the leading dimensions {sorted(lengths)}: mend the '
      'batch, or pass weight= with its number of examples'
    )
  return np.shape(leaves[0])[0]


def require_several(batches: Any):
  """Raises TypeError of one batch in place of an iterable of them."""
  if isinstance(batches, Mapping):
    raise TypeError(
      f'batches is a {type(batches).__name__}, which is one batch: give an iterable of '
      'batches, such as [batch]'
    )


def at_least_float32(tree: Any) -> Any:
  """A pytree whose floating-point leaves narrower than float32 are widened to it."""

  def widen(leaf):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4:
      return leaf.astype(jnp.float32)
    return leaf

  return jax.tree.map(widen, tree)
