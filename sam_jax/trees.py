"""Whether a method sees the parameters as the loss takes them."""

from __future__ import annotations

from typing import Any

import jax
import optax


class TreeError(ValueError):
  """What stands around a method changes the tree of the parameters."""


def require_whole(params: optax.Params) -> None:
  """Raises TreeError where a part of the parameters is masked."""
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
    raise TreeError(
      'The method sees a part of the parameters only, because optax.masked or '
      'optax.multi_transform stands around it, and the loss takes all of them: put the '
      'method before that, and leave parameters out of its perturbation with '
      'perturbation=optax.selective_transform(...).'
    )


def require_alike(tree: Any, params: optax.Params) -> None:
  """Raises TreeError unless a tree has the structure of the parameters."""
  if jax.tree.structure(tree) != jax.tree.structure(params):
    raise TreeError(
      'The method does not see the tree of the parameters, because optax.flatten or '
      'the like stands around it: put that around the base optimizer, after the method.'
    )
