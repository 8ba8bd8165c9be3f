"""Top eigenpairs along a path: each search starts where the last one ended."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sam_jax import curvature
from sam_jax.curvature import stacks

_GUARDS = 3


class Follower:
  """The top eigenpairs of the Hessian of a loss at parameters that move.

  The first search starts from a full block of random vectors, as the later ones from a
  full block of known ones, so that one program serves all.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``.
    batch: the data of the loss.
    which: 'largest' or 'magnitude', as in `top_eigenpairs`.
    tol: wanted residual, relative to the largest eigenvalue.
    key: typed PRNG key; None is ``jax.random.key(0)``.
    block: where the first search starts; None for random vectors.

  Attributes:
    block: where the next search starts.
  """

  def __init__(self, loss_fn, batch, which, tol, key, block=None):
    self._search = functools.partial(_search, loss_fn, which, tol)
    self._batch = batch
    self._key = jax.random.key(0) if key is None else key
    self.block = block

  def __call__(self, params: Any, count: int, number: int) -> curvature.TopEigenpairs:
    """The first ``count`` pairs; ``number`` tells the calls' random vectors apart."""
    key = jax.random.fold_in(self._key, number)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    block = _filled(self.block, params, min(count + _GUARDS, size), key)
    found = self._search(count, params, self._batch, block, key)
    self.block = found.block
    return found


def _filled(block: Any, params: Any, count: int, key: jax.Array) -> Any:
  """A block with random vectors added up to a number of vectors."""
  there = 0 if block is None else jax.tree.leaves(block)[0].shape[0]
  if there >= count:
    return block
  more = [
    stacks.random(jax.random.fold_in(key, i), params) for i in range(there, count)
  ]
  added = jax.tree.map(lambda *leaves: jnp.stack(leaves), *more)
  if block is None:
    return added
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), block, added)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(loss_fn, which, tol, count, params, batch, block, key):
  product = curvature.hessian_product(loss_fn)
  return curvature.top_eigenpairs(
    lambda vector: product(params, batch, vector),
    params,
    count,
    which,
    start=block,
    key=key,
    tol=tol,
    num_guards=_GUARDS,
    max_num_matvecs=400,
  )
