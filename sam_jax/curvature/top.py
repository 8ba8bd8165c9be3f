"""The top eigenpairs of an operator, inside compiled functions.

The search space grows by the residual of one wanted pair at a time (the generalized
Davidson method without a preconditioner), which from one start vector is Lanczos, and
from the vectors of an earlier search begins where that ended. The images A V are kept,
so residuals are measured, and the memory is 2 max_basis_size vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import placing
from sam_jax.curvature import stacks

Params = Any
TopWhich = Literal['largest', 'smallest', 'magnitude']
_ORDERS = {'largest': lambda x: x, 'smallest': jnp.negative, 'magnitude': jnp.abs}

_NOISE = 0.3  # share of the random direction in the last guard


class TopEigenpairs(NamedTuple):
  """Eigenpairs found inside a compiled function, the most wanted first.

  Attributes:
    eigenvalues: (k,), Rayleigh quotients, with their signs.
    eigenvectors: pytree of (k, *shape), of length 1 and orthogonal to each other.
    residuals: (k,), the measured ``|A v - theta v|``: an eigenvalue of the operator
      lies within it of each theta, up to rounding.
    converged: bool (k,), residual <= tol times the largest |theta| met.
    num_matvecs: int32, products taken.
    block: pytree of (k + num_guards, *shape), orthonormal: the eigenvectors and the
      next ones as far as they are known. A search at a near operator starts from it.
  """

  eigenvalues: jax.Array
  eigenvectors: Any
  residuals: jax.Array
  converged: jax.Array
  num_matvecs: jax.Array
  block: Any


def top_eigenpairs(
  matvec: Callable[[Params], Params],
  like: Params,
  k: int = 1,
  which: TopWhich = 'largest',
  *,
  start: TopEigenpairs | Params | None = None,
  key: jax.Array | None = None,
  tol: float = 1e-4,
  max_num_matvecs: int = 100,
  num_guards: int = 3,
  explore: int = 1,
  max_basis_size: int | None = None,
) -> TopEigenpairs:
  r"""The top eigenpairs of an operator, to a tolerance, inside `jax.jit`.

  Works under `jax.jit`, `jax.vmap` and `jax.lax.scan`. It iterates until each pair has
  :math:`|A v - \theta v| \le tol \max|\theta|`, one product a turn, and compiles the
  product once. `eigenpairs` certifies more and restarts after a kill, from the host.

  A search that starts from an earlier one's result multiplies its block of k +
  num_guards vectors first. The guards find a pair that overtakes another, and let
  crowded eigenvalues converge. A little of a random direction is added to the last of
  them, and a product spent on its residual, so that over a few searches even pairs turn
  up that the block knew nothing of, and further copies of a repeated eigenvalue. A
  small residual says that there is an eigenvalue near, not that none is larger.

  Args:
    matvec: ``matvec(vector) -> product``, linear and symmetric; such as ``lambda v:
      product(params, batch, v)`` with a product of `hessian_product`, or
      ``product.linearize(params, batch)``, which is faster where its memory is there.
    like: pytree of arrays or of ``jax.ShapeDtypeStruct`` with the shapes of a vector;
      narrower leaves than float32 become float32. On a mesh the vectors are sharded as
      these are, where that is known: an array knows it outside of `jax.jit`, inside it
      only on explicit axes. So on a mesh with automatic axes hand in shapes with a
      ``sharding``, such as `Operator.structure`, or the compiler chooses.
    k: number of pairs.
    which: the 'largest' or the 'smallest' algebraically, or those of the largest
      absolute value, 'magnitude'.
    start: the result of a search at a near operator, or a pytree of (b, *shape) with
      start vectors that need not be orthogonal or of length 1; None is one random
      vector.
    key: typed PRNG key; None is ``jax.random.key(0)``. Give another at each call.
    tol: wanted residual, relative to the largest |theta|. 0 takes all products.
    max_num_matvecs: number of products at which to stop with what was reached; at
      least k and the number of start vectors.
    num_guards: further vectors in the block, beyond k.
    explore: number of products that a search from ``start`` spends on the last guard.
    max_basis_size: number of vectors at which the search space shrinks to the block;
      more needs memory and may save products. None is 2 (k + num_guards) + 16.

  Returns:
    The pairs. NaN or infinity in a product ends the search and comes out in them.

  Raises:
    ValueError: an argument is out of range, ``like`` has no entries, or ``start`` does
      not have the shapes of ``like``.
    TypeError: ``like`` has leaves that are not floating point.

  >>> import jax, jax.numpy as jnp
  >>> @jax.jit
  ... def sharpest(diagonal, start=None):
  ...   return top_eigenpairs(lambda v: diagonal * v, diagonal, k=2, start=start)
  >>> diagonal = jnp.append(jnp.linspace(-9., 1., 50), jnp.array([7., 5.]))
  >>> first = sharpest(diagonal)
  >>> [round(x, 3) for x in first.eigenvalues.tolist()], bool(first.converged.all())
  ([7.0, 5.0], True)
  >>> then = sharpest(1.5 * diagonal, first)
  >>> [round(x, 3) for x in then.eigenvalues.tolist()]
  [10.5, 7.5]
  >>> bool(then.num_matvecs < first.num_matvecs)
  True

  References:
    Stathopoulos and Saad, Restarting techniques for the (Jacobi-)Davidson symmetric
    eigenvalue methods, Electronic Transactions on Numerical Analysis 7 (1998).
  """
  structure = stacks.structure(like)
  size = sum(leaf.size for leaf in jax.tree.leaves(structure))
  key = jax.random.key(0) if key is None else key
  queue = _queue(structure, start, k, key)
  count = jax.tree.leaves(queue)[0].shape[0]
  _check(size, k, which, num_guards, explore, max_num_matvecs, count, max_basis_size)
  block = min(k + num_guards, size)
  rows = min(max_basis_size or max(2 * block + 16, count + 1), size)
  explore = 0 if start is None or block == k else explore
  order = _ORDERS[which]
  search = _Search(matvec, structure, k, block, rows, size, order, key, explore)
  state = search.begin(queue)

  def go_on(state):
    done = (state.residuals <= tol * state.scale).all()
    done &= state.num_matvecs >= count + explore
    finite = jnp.isfinite(state.projected).all()
    left = state.num_matvecs < max_num_matvecs
    return left & finite & ~done & ~search.complete(state)

  def turn(state):
    # The shrinking has a loop of its own, so that the inner one adds its vectors in
    # place: a branch that returns the stacks copies them at every product.
    state = jax.lax.cond(state.size == rows, search.shrink, lambda s: s, state)
    return jax.lax.while_loop(
      lambda s: go_on(s) & (s.size < rows), lambda s: search.step(s, queue), state
    )

  state = jax.lax.while_loop(go_on, turn, state)
  found = stacks.combine(state.basis, state.rotation[:, :block])
  found = stacks.place_stack(found, structure)
  return TopEigenpairs(
    eigenvalues=state.values[:k],
    eigenvectors=jax.tree.map(lambda leaf: leaf[:k], found),
    residuals=state.residuals,
    converged=state.residuals <= tol * state.scale,
    num_matvecs=state.num_matvecs,
    block=found,
  )


class _State(NamedTuple):
  """The search space V, its images A V, and Rayleigh-Ritz on it.

  Attributes:
    basis: V, (rows, *shape); zeros beyond its size.
    images: A V.
    projected: V^T A V, (rows, rows).
    size: number of vectors in V.
    values: Ritz values in the order wanted, (rows,).
    rotation: the columns are their coefficients in V, (rows, rows).
    residuals: of the k wanted pairs; infinite while there are fewer.
    scale: the largest |Ritz value| met.
    expansion: the largest residual vector, by which V grows next.
    num_matvecs: products taken.
  """

  basis: Any
  images: Any
  projected: jax.Array
  size: jax.Array
  values: jax.Array
  rotation: jax.Array
  residuals: jax.Array
  scale: jax.Array
  expansion: Any
  num_matvecs: jax.Array


@dataclasses.dataclass(frozen=True)
class _Search:
  """One search; its methods are pure functions of the state."""

  matvec: Callable[[Params], Params]
  structure: Any
  k: int
  block: int
  rows: int
  size: int
  order: Callable[[jax.Array], jax.Array]
  key: jax.Array
  explore: int

  def begin(self, queue: Any) -> _State:
    first = stacks.take(queue, 0)
    empty = stacks.place_stack(stacks.zeros(first, self.rows), self.structure)
    dtype = jnp.result_type(*jax.tree.leaves(first))
    square = jnp.zeros((self.rows, self.rows), dtype)
    return _State(
      basis=empty,
      images=empty,
      projected=square,
      size=jnp.int32(0),
      values=square[0],
      rotation=square,
      residuals=jnp.full(self.k, jnp.inf, dtype),
      scale=jnp.zeros((), dtype),
      expansion=stacks.take(empty, 0),
      num_matvecs=jnp.int32(0),
    )

  def complete(self, state: _State) -> jax.Array:
    """Whether V is the whole space."""
    return state.size >= self.size

  def step(self, state: _State, queue: Any) -> _State:
    """Multiplies the next vector of the queue, or once that is done an expansion."""
    count = jax.tree.leaves(queue)[0].shape[0]
    number = state.num_matvecs
    queued = stacks.take(queue, jnp.minimum(number, count - 1))
    candidate = stacks.where(number < count, queued, state.expansion)
    fresh = jax.random.fold_in(self.key, number)
    vector = stacks.orthonormal(candidate, state.basis, fresh)
    vector = placing.place(vector, self.structure)
    image = placing.place(self.matvec(vector), self.structure)
    basis = stacks.put(state.basis, vector, state.size)
    images = stacks.put(state.images, image, state.size)
    # Of the product itself: a vector taken from the new stack makes XLA copy the old.
    column = stacks.dots(basis, image)
    projected = state.projected.at[:, state.size].set(column)
    projected = projected.at[state.size, :].set(column)
    size = state.size + 1
    values, rotation = self._ritz(projected, size)
    state = state._replace(
      basis=basis,
      images=images,
      projected=projected,
      size=size,
      values=values,
      rotation=rotation,
      scale=jnp.maximum(state.scale, jnp.abs(values).max()),
      num_matvecs=number + 1,
    )
    # Those of the wanted pairs and, to explore, that of the lowest guard.
    columns = [*range(self.k), *[self.block - 1] * (self.explore > 0)]
    rest = self._residuals(state, jnp.array(columns))
    there = jnp.arange(self.k) < size
    norms = jax.vmap(stacks.norm)(rest)[: self.k]
    target = jnp.argmax(jnp.where(there, norms, -1))
    if self.explore:
      explores = (number + 1 >= count) & (number + 1 < count + self.explore)
      target = jnp.where(explores, self.k, target)
    return state._replace(
      residuals=jnp.where(there, norms, jnp.inf), expansion=stacks.take(rest, target)
    )

  def _residuals(self, state: _State, columns: jax.Array) -> Any:
    """A x - theta x of some Ritz pairs, a stack."""
    rotation, values = state.rotation[:, columns], state.values[columns]
    return jax.tree.map(
      lambda y, x: y - x * values.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)),
      stacks.combine(state.images, rotation),
      stacks.combine(state.basis, rotation),
    )

  def _ritz(self, projected: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ritz values and coefficients in the order wanted; 0 beyond the size."""
    largest = jnp.abs(projected).max()
    unit = jnp.where(largest > 0, largest, 1)
    used = jnp.arange(self.rows) < size
    # Rows without a vector get an eigenvalue that no Ritz value can have.
    outside = jnp.where(used, 0.0, -2.0 * self.rows).astype(projected.dtype)
    values, vectors = jnp.linalg.eigh(projected / unit + jnp.diag(outside))
    inside = ~(values < -1.5 * self.rows)  # NaN comes out.
    order = jnp.argsort(jnp.where(inside, -self.order(values), jnp.inf))
    vectors = jnp.where(used[:, None] & inside[None], vectors, 0)
    return jnp.where(inside, values * unit, 0)[order], vectors[:, order]

  def shrink(self, state: _State) -> _State:
    """Keeps the span of the Ritz vectors that are most wanted, a block of them."""
    if self.rows == self.size:
      return state
    kept = jnp.arange(self.rows) < self.block
    rotation = jnp.where(kept[None], state.rotation, 0)
    return state._replace(
      basis=stacks.combine(state.basis, rotation),
      images=stacks.combine(state.images, rotation),
      projected=jnp.diag(jnp.where(kept, state.values, 0)),
      size=jnp.int32(self.block),
    )


def _queue(structure: Any, start: Any, k: int, key: jax.Array) -> Any:
  """The vectors to multiply first, the last guard with a random direction added."""
  noise = stacks.unit(stacks.random(key, structure))[0]
  if start is None:
    return jax.tree.map(lambda leaf: leaf[None], noise)
  block = start.block if isinstance(start, TopEigenpairs) else start
  shapes = [leaf.shape for leaf in jax.tree.leaves(structure)]
  counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(block)}
  given = [np.shape(leaf)[1:] for leaf in jax.tree.leaves(block)]
  if jax.tree.structure(block) != jax.tree.structure(structure) or given != shapes:
    raise ValueError(
      f'start= has vectors with leaves of shapes {given}, but like= has {shapes}: give '
      'a stack of vectors like those of the operator, with one leading axis more'
    )
  if len(counts) != 1 or 0 in next(iter(counts)):
    raise ValueError(
      f'start= has leading dimensions {sorted(counts)}: give one above 0'
    )
  block = jax.tree.map(lambda leaf, s: jnp.asarray(leaf, s.dtype), block, structure)
  last = next(iter(counts))[0] - 1
  if last < k:  # There is no guard.
    return block
  known, _ = stacks.unit(stacks.take(block, last))
  mixed = jax.tree.map(lambda x, z: x + _NOISE * z, known, noise)
  return stacks.put(block, mixed, last)


def _check(size, k, which, num_guards, explore, max_num_matvecs, count, max_basis_size):
  if not (isinstance(k, int | np.integer) and 1 <= k <= size):
    raise ValueError(f'k={k}: give a whole number from 1 to the size, {size}')
  if which not in _ORDERS:
    raise ValueError(f'which={which!r}: give one of {sorted(_ORDERS)}')
  if num_guards < 0 or explore < 0:
    raise ValueError(f'num_guards={num_guards}, explore={explore}: give 0 or more')
  if max_num_matvecs < max(k, count):
    raise ValueError(
      f'max_num_matvecs={max_num_matvecs}: {k} pairs from {count} start vectors need '
      f'at least {max(k, count)} products'
    )
  least = min(max(k + num_guards, count) + 1, size)
  if max_basis_size is not None and max_basis_size < least:
    raise ValueError(
      f'max_basis_size={max_basis_size}: k={k}, num_guards={num_guards} and {count} '
      f'start vectors need at least {least}'
    )
