"""The Lanczos tridiagonalization of an operator, inside compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam_jax.curvature import stacks

Params = Any
_BREAKDOWN = 20.0  # remainders below so many eps * |A| are rounding


class Tridiagonalization(NamedTuple):
  r"""A symmetric operator on a Krylov space: A Q = Q T + r e_m^T.

  Attributes:
    alphas: (m,), the diagonal of T.
    betas: (m,), the entries beside the diagonal and, as the last, |r|.
    basis: Q, pytree of (m, *shape), orthonormal vectors.
    remainder: r, a vector orthogonal to the basis.
    size: int32, the number of basis vectors. It is below m if the Krylov space ended
      before: then the beta there is 0, and what follows in alphas, betas and basis too.
  """

  alphas: jax.Array
  betas: jax.Array
  basis: Any
  remainder: Any
  size: jax.Array


def tridiagonalize(
  matvec: Callable[[Params], Params], num_matvecs: int, start: Params
) -> Tridiagonalization:
  r"""Takes a fixed number of Lanczos steps, inside `jax.jit`.

  .. math:: A Q = Q T + r e_m^T, \qquad Q^T Q = I, \qquad Q e_1 = x / |x|

  Works under `jax.jit`, `jax.vmap` (over start vectors, parameters or keys) and
  `jax.lax.scan`. Each vector is orthogonalised twice against all others, so no
  eigenvalue of T is a false copy. The eigenvalues of T and the squared first entries of
  its eigenvectors are the nodes and weights of a Gauss quadrature for
  :math:`x^T f(A) x / |x|^2`; an eigenvalue of the operator lies within
  :math:`|r|\,|s_m|` of each that has the eigenvector s.

  Where the Krylov space ends early, the rest of T is 0 and belongs to the vectors of
  zeros in the basis: its nodes have the weight 0.

  Args:
    matvec: ``matvec(vector) -> product``, linear and symmetric; such as ``lambda v:
      product(params, batch, v)`` with a product of `hessian_product`.
    num_matvecs: number m of products; the memory is m vectors.
    start: x, a pytree of floating-point arrays; narrower leaves than float32 become
      float32. From a vector of zeros everything is 0.

  Returns:
    T, Q and r.

  Raises:
    ValueError: ``num_matvecs`` is below 1, or ``start`` has no entries.
    TypeError: ``start`` has leaves that are not floating point.

  >>> import jax, jax.numpy as jnp
  >>> diagonal = jnp.array([3., 1., 0.])
  >>> result = tridiagonalize(lambda v: diagonal * v, 3, jnp.ones(3))
  >>> matrix = jnp.diag(result.alphas)
  >>> matrix += jnp.diag(result.betas[:-1], 1) + jnp.diag(result.betas[:-1], -1)
  >>> [round(abs(x), 3) for x in jnp.linalg.eigvalsh(matrix).tolist()]
  [0.0, 1.0, 3.0]
  """
  if num_matvecs < 1:
    raise ValueError(f'num_matvecs={num_matvecs}: give at least 1')
  start = jax.tree.map(
    lambda leaf, like: jnp.asarray(leaf, like.dtype), start, stacks.structure(start)
  )
  first, length = stacks.unit(start)

  def step(carry, index):
    basis, vector, scale = carry
    basis = stacks.put(basis, vector, index)
    image = jax.tree.map(lambda y, x: y.astype(x.dtype), matvec(vector), vector)
    rest, taken, left = stacks.orthogonalise(image, basis)
    alpha, beta = taken[index], stacks.norm(rest)
    scale = jnp.maximum(scale, jnp.maximum(beta, jnp.abs(taken).max()))
    rounding = _BREAKDOWN * jnp.finfo(beta.dtype).eps * scale
    # A NaN goes on.
    ended = (beta <= rounding) | (left < 0.5)
    following = stacks.unit(rest)[0]
    nothing = jax.tree.map(jnp.zeros_like, following)
    beta = jnp.where(ended, 0, beta)
    carry = basis, stacks.where(ended, nothing, following), scale
    return carry, (alpha, beta)

  carry = stacks.zeros(first, num_matvecs), first, jnp.zeros_like(length)
  carry, (alphas, betas) = jax.lax.scan(step, carry, jnp.arange(num_matvecs))
  basis, following, _ = carry
  begun = jnp.append(length[None], betas[:-1]) != 0
  return Tridiagonalization(
    alphas=alphas,
    betas=betas,
    basis=basis,
    remainder=jax.tree.map(lambda x: x * betas[-1].astype(x.dtype), following),
    size=jnp.cumprod(begun, dtype=jnp.int32).sum(dtype=jnp.int32),
  )
