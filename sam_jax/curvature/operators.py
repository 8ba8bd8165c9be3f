"""Symmetric linear operators on parameter pytrees, known by their products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import placing
from sam_jax.curvature import products, stacks
from sam_jax.curvature.products import Batch, LossFn, Params


class Operator:
  """A symmetric operator on pytrees, known by its products with vectors.

  Attributes:
    structure: pytree of ``jax.ShapeDtypeStruct``: what its vectors look like, and how
      they lie on a mesh of several devices.
    size: number of entries of a vector.
    dtype: the floating-point type of a vector (the widest of its leaves).
    num_matvecs: number of products taken so far.
  """

  def __init__(self, matvec: Callable[[Params], Params], like: Params):
    self._matvec = matvec
    self.structure = jax.tree.map(stacks.describe, like)
    leaves = jax.tree.leaves(self.structure)
    self.size = sum(math.prod(leaf.shape) for leaf in leaves)
    if not self.size:
      raise ValueError('the operator has no entries: give a pytree with parameters')
    self.dtype = np.dtype(jnp.result_type(*leaves))
    self.num_matvecs = 0

  def matvec(self, vector: Params) -> Params:
    """Product with one vector; vector and result are pytrees like the parameters."""
    self.num_matvecs += 1
    # Of some kernels JAX says only when it compiles that they have no such derivative.
    with jax.default_matmul_precision('highest'), products.differentiated_twice():
      return self._matvec(vector)


def operator(matvec: Callable[[Params], Params], like: Params) -> Operator:
  """Makes an operator of a function that multiplies a symmetric matrix by a vector.

  Args:
    matvec: ``matvec(vector) -> product``, pytrees like ``like``; linear, symmetric.
    like: pytree of floating-point arrays or of ``jax.ShapeDtypeStruct``.

  Returns:
    The operator; it counts its products.

  Raises:
    TypeError: a leaf of ``like`` is not floating point.
    ValueError: ``like`` has no entries.

  >>> import jax.numpy as jnp
  >>> op = operator(lambda v: 2 * v, jnp.zeros(3))
  >>> op.matvec(jnp.ones(3)).tolist(), op.size, op.num_matvecs
  ([2.0, 2.0, 2.0], 3, 1)
  """
  return Operator(matvec, like)


class HessianOperator(Operator):
  """The Hessian of a loss over a data set; made by `hessian`.

  `gauss_newton` and `empirical_fisher` make one too, of a loss whose network is
  replaced by its tangent.

  Attributes:
    params: where the Hessian is taken.
    num_examples: the sum of the weights of the batches.
  """

  def __init__(
    self,
    product: products.HessianProduct,
    params: Params,
    batches: WeightedBatches,
    max_cache_gib: float,
  ):
    self.params = products.at_least_float32(params)
    self.num_examples = batches.total
    self._of_batch = product
    self._batches = batches
    self._linear: dict[int, Callable[[Params], Params]] = {}
    self._room = max_cache_gib * 2**30
    super().__init__(self._product, self.params)

  def _product(self, vector: Params) -> Params:
    shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(self.structure))
    total = stacks.zero(self.structure) if any(shardings) else _zeros(self.params)
    for index, (batch, fraction) in enumerate(self._batches):
      if index not in self._linear:
        _require_kept(self.params)
        self._linearize(index, batch)
      linear = self._linear.get(index)
      if linear is None:
        _require_kept(self.params)
        arguments = self._of_batch, self.params, batch, vector, total, fraction
        total = _add_product(shardings, *arguments)
      else:
        total = _add_linear(shardings, linear, vector, total, fraction)
    return total

  def _linearize(self, index: int, batch: Batch) -> None:
    """Keeps the linearized gradient of a batch, while there is room."""
    if not self._room:
      return
    abstract = jax.eval_shape(
      functools.partial(_linearize, self._of_batch), self.params, batch
    )
    need = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    if need > self._room:
      self._room = 0
      return
    self._room -= need
    self._linear[index] = _linearize(self._of_batch, self.params, batch)


def hessian(
  loss_fn: LossFn,
  params: Params,
  batches: Iterable[Batch],
  *,
  weight: Callable[[Batch], float] | None = None,
  max_cache_gib: float = 2.0,
) -> HessianOperator:
  r"""The Hessian of the mean loss over a data set, as an operator.

  .. math:: H = \sum_b \frac{n_b}{\sum_c n_c} \nabla^2 L_b(w)

  Each product runs one compiled function a batch shape, from the host, under matrix
  products of the highest precision.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch. Give
      the same function object to several calls and it is compiled once.
    params: where the Hessian is taken, any pytree. Leaves narrower than float32 are
      widened to float32. Where they lie on a mesh of devices, vectors lie as they do,
      and a search's basis is divided among all devices.
    batches: pytrees of arrays, of any shapes. A list or an iterator is put on the
      device once; any other iterable is iterated anew for each product.
    weight: number of examples of a batch, ``weight(batch) -> number``. None: the
      leading dimension of the batch's first leaf.
    max_cache_gib: memory in GiB for what all products at ``params`` share, the
      activations and their gradients; a product then costs two gradients. Batches for
      which there is no room compute it anew each time, a third more. The result is the
      same. On a mesh it counts what all devices hold together.

  Returns:
    The operator.

  Raises:
    TypeError: a leaf of ``params`` is not floating point.
    ValueError: there are no examples, a weight is negative or not finite, or at a
      product the parameters have been donated.
    SecondDerivativeError: at the first product, if the loss holds a fused kernel, as of
      attention, that has a rule for its gradient only; it is a TypeError.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, x: 0.5 * jnp.mean((x @ w) ** 2)
  >>> data = [jnp.array([[1., 0.], [0., 2.]]), jnp.array([[3., 0.]])]
  >>> op = hessian(loss, jnp.zeros(2), data)
  >>> [round(x, 4) for x in op.matvec(jnp.ones(2)).tolist()]
  [3.3333, 1.3333]
  """
  return HessianOperator(
    products.hessian_product(loss_fn),
    params,
    WeightedBatches(batches, weight),
    max_cache_gib,
  )


class WeightedBatches:
  """Batches with the fraction of all examples that each holds.

  Iterating gives ``(batch, fraction)``; batches without an example are left out.

  Args:
    batches: pytrees of arrays.
    weight: number of examples of a batch; None is its leading dimension.
    sums: whether functions of a batch are sums over its examples, not their mean: the
      fraction is then one example's.

  Attributes:
    total: number of examples in all batches.
  """

  def __init__(
    self,
    batches: Iterable[Batch],
    weight: Callable[[Batch], float] | None = None,
    *,
    sums: bool = False,
  ):
    products.require_several(batches)
    self._weight = weight or products.leading_dimension
    if isinstance(batches, list | tuple | Iterator):
      batches = [jax.tree.map(_on_device, batch) for batch in batches]
    self._batches = batches
    weights = [float(self._weight(batch)) for batch in batches]
    if not all(math.isfinite(w) and w >= 0 for w in weights):
      raise ValueError(
        f'weight= answered {weights}: it must give the number of examples of a '
        'batch, finite and not negative'
      )
    self.total = sum(weights)
    if not self.total:
      raise ValueError(
        'batches holds no examples: give at least one batch with a weight above 0'
      )
    self._fractions = [(bool(w) if sums else w) / self.total for w in weights]

  def __iter__(self) -> Iterator[tuple[Batch, float]]:
    for batch, fraction in zip(self._batches, self._fractions, strict=True):
      if fraction:
        yield batch, fraction


def _on_device(leaf):
  """A leaf of a batch; what lies on the devices of several processes stays there."""
  there = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
  return leaf if there else jax.device_put(leaf)


def _require_kept(params: Params):
  """Raises ValueError of parameters that were given away, which JAX may not survive."""
  if any(leaf.is_deleted() for leaf in jax.tree.leaves(params)):
    raise ValueError(
      'the parameters have been donated or deleted since the operator was made: copy '
      'them before (jax.tree.map(jnp.copy, params)), or measure first'
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _add_product(shardings, product, params, batch, vector, total, fraction):
  return _add(shardings, total, fraction, product(params, batch, vector))


@jax.jit
def _zeros(params):
  return jax.tree.map(jnp.zeros_like, params)


@functools.partial(jax.jit, static_argnums=0)
def _linearize(product, params, batch):
  return product.linearize(params, batch)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _add_linear(shardings, linear, vector, total, fraction):
  return _add(shardings, total, fraction, linear(vector))


def _add(shardings, total, fraction, product):
  product = _placed(shardings, product)
  return _placed(shardings, jax.tree.map(lambda t, p: t + fraction * p, total, product))


def _placed(shardings, tree):
  """A tree whose leaves lie as the parameters do."""
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten(map(placing.placed, leaves, shardings))
