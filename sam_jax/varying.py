"""What varies over the axes of `jax.shard_map`, where jax keeps track of it.

With ``check_vma=True``, the default, every value of a mapped function has the set of
mesh axes over which it varies. The gradient with respect to a value that does not vary
is summed over the axis, so that its mean over the replicas is no mean. Under
`jax.pmap`, `jax.vmap` and ``check_vma=False`` nothing is tracked: all sets are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax

AxisName = Hashable | tuple[Hashable, ...]


def axes(x: Any) -> frozenset[Hashable]:
  """The axes over which an array, or the result of `jax.eval_shape`, varies."""
  return jax.typeof(x).manual_axis_type.varying


def over(tree: Any, names: frozenset[Hashable]) -> Any:
  """The same values, which from here on count as varying over these axes too."""

  def cast(x):
    missing = tuple(names - axes(x))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(cast, tree)


def as_much_as(tree: Any, like: Any) -> Any:
  """The same values, each leaf varying over the axes of the leaf of ``like`` too."""
  return jax.tree.map(lambda x, y: over(x, axes(y)), tree, like)


def require(tree: Any, axis_name: AxisName) -> None:
  """Raises unless gradients vary over a mapped axis, where that is tracked.

  Raises:
    ValueError: a leaf does not, so that it is a sum over the replicas already, or the
      mean over them.
  """
  names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
  for name in names:
    tracked = name in axes(jax.lax.axis_index(name))
    for path, leaf in jax.tree.leaves_with_path(tree) if tracked else ():
      if name not in axes(leaf):
        raise ValueError(
          f'the gradient at {jax.tree_util.keystr(path) or "the root"} does not vary '
          f'over {name!r}: jax.shard_map(check_vma=True) sums the gradients of '
          'replicated parameters over the axis, so take them at '
          f'jax.lax.pcast(params, {name!r}, to="varying"), or map with '
          'check_vma=False; a cross_replica_mean before a method needs '
          'keep_varying=True.'
        )


def cond(predicate: jax.Array, if_true: Callable, if_false: Callable) -> Any:
  """`jax.lax.cond` without operands; the branches may vary over different axes."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return jax.lax.cond(predicate, if_true, if_false)
  shapes = [jax.eval_shape(branch) for branch in (if_true, if_false)]
  branches = [
    lambda branch=branch, other=other: as_much_as(branch(), other)
    for branch, other in zip((if_true, if_false), reversed(shapes), strict=True)
  ]
  return jax.lax.cond(predicate, *branches)


def scan_start(start: Any, body: Callable, first: Any) -> Any:
  """A first carry for `jax.lax.scan` that varies over the axes of the later ones."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return start
  return as_much_as(start, jax.eval_shape(body, start, first)[0])
