"""Where a loss is locally convex: extreme eigenvalues on a grid."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sam_jax import curvature
from sam_jax.curvature import operators
from sam_jax.landscape import directions as directions_lib
from sam_jax.landscape import grid
from sam_jax.landscape import record as record_lib
from sam_jax.landscape.result import Landscape

EIGEN_RATIO = '|lambda_min/lambda_max|'
# How much of a random vector, of length about 1, is in the start of a search.
_RANDOM = 0.1


def eigen_ratio(
  loss_fn: grid.LossFn,
  params: grid.Params,
  directions: tuple[grid.Params, grid.Params],
  x: Sequence[float] | np.ndarray,
  y: Sequence[float] | np.ndarray,
  batches: Iterable[grid.Batch],
  *,
  weight: Callable[[grid.Batch], float] | None = None,
  tol: float = 1e-2,
  key: jax.Array | None = None,
  max_num_matvecs: int = 500,
  labels: tuple[str, str] = ('direction 1', 'direction 2'),
  record: str | os.PathLike[str] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Landscape:
  r"""The ratio :math:`|\lambda_{min} / \lambda_{max}|` of the Hessian on a grid.

  A value near 0 says that no negative curvature is to be seen beside the largest
  positive one, as in a convex region. The extremes are the algebraic ones, each to
  ``tol * max(|lambda_min|, |lambda_max|)``; where the ratio is below 1 that is its
  error, about. Each search starts from the pairs of the point before, which takes a
  third fewer products.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch.
    params: the point at (0, 0). Half-precision leaves are moved, and handed to
      ``loss_fn``, in float32.
    directions: two pytrees like ``params``.
    x: coordinates along the first direction, (nx,).
    y: coordinates along the second direction, (ny,).
    batches: as for `curvature.hessian`.
    weight: number of examples of a batch; None is its leading dimension.
    tol: residual of the eigenpairs, relative to the largest \|lambda\|.
    key: typed PRNG key of the start vector; None is ``jax.random.key(0)``.
    max_num_matvecs: most Hessian-vector products for one point.
    labels: what the directions are.
    record: as for `surface`; ``tol``, ``key`` and ``max_num_matvecs`` must agree too.
      The start of the next search is kept beside it, as ``*.start.npz``, until all
      points are done.
    progress: called with the number of points done and of all points.

  Returns:
    The landscape, ``value`` '|lambda_min/lambda_max|' and ``loss`` the ratio, of shape
    (ny, nx). Where ``lambda_max`` is 0, but for rounding, the ratio is infinite, or 0
    if ``lambda_min`` is 0 too. It is NaN where the Hessian is not finite, or a pair did
    not converge.

  Raises:
    ValueError: ``x`` or ``y`` is empty, no vector, or not finite, or ``directions`` are
      not two pytrees like ``params``.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, batch: jnp.mean(batch) * (w[0] ** 4 - w[1] ** 2)
  >>> at, along = jnp.array([1., 0.]), (jnp.array([1., 0.]), jnp.array([0., 1.]))
  >>> eigen_ratio(loss, at, along, [0., 1.], [0.], [jnp.ones(4)]).loss.round(4).tolist()
  [[0.1667, 0.0417]]

  References:
    Li et al., Visualizing the loss landscape of neural nets, arXiv 1712.09913, fig. 6.
  """
  x, y = grid.axis('x', x), grid.axis('y', y)
  directions_lib.require_two(params, directions)
  coordinates = grid.points(x, y)
  if isinstance(batches, list | tuple | Iterator):
    batches = [jax.device_put(batch) for batch in batches]
  total = operators.WeightedBatches(batches, weight).total
  key = jax.random.key(0) if key is None else key
  search = tol, max_num_matvecs, jax.random.key_data(key)
  facts = EIGEN_RATIO, coordinates, params, directions, total, search
  with record_lib.Record(record, len(coordinates), facts) as finished:
    chain = _Chain(finished, jax.tree.structure(params), key)
    for index in finished.missing:
      moved = directions_lib.move(params, directions, tuple(coordinates[index]))
      operator = curvature.hessian(loss_fn, moved, batches, weight=weight)
      chain.add(index, *_ratio(operator, tol, key, max_num_matvecs, chain.start))
      if progress is not None:
        progress(len(finished.values), len(coordinates))
    chain.remove()
    ratio = finished.array((len(y), len(x)))
  return Landscape(x=x, y=y, loss=ratio, labels=tuple(labels), value=EIGEN_RATIO)


def _ratio(
  operator: curvature.Operator,
  tol: float,
  key: jax.Array,
  max_num_matvecs: int,
  start: Any,
) -> tuple[float, tuple[Any, ...]]:
  """The ratio of one Hessian, NaN if it cannot be told, and the eigenvectors."""
  try:
    pairs = curvature.eigenpairs(
      operator,
      1,
      tol=tol,
      key=key,
      start=start,
      max_num_matvecs=max_num_matvecs,
      verify=False,
      check_symmetry=False,  # What is lost in rounding does not converge: NaN.
    )
  except curvature.NonFiniteError:
    return np.nan, ()
  largest, smallest = pairs.eigenvalues[0], pairs.eigenvalues[-1]
  if not pairs.converged.all():
    ratio = np.nan
  elif abs(largest) <= np.finfo(operator.dtype).eps * pairs.scale:
    ratio = np.inf if pairs.scale else 0.0
  else:
    ratio = float(abs(smallest / largest))
  return ratio, pairs.eigenvectors


class _Chain:
  """Points of which each search starts from the last, in a run that can be killed.

  A file beside the record holds the last point and the start of the next search. It is
  replaced before the point is recorded, so that one of both always has it.

  Attributes:
    start: where the next search starts: the eigenvectors of the last with some of a
      random vector, without which it stays in a space that the Hessian maps into
      itself. None where there is no last.
  """

  def __init__(self, finished: record_lib.Record, treedef: Any, key: jax.Array):
    self.start = None
    self._finished = finished
    self._treedef = treedef
    self._key = key
    self._path = None
    if finished.path is not None:
      self._path = pathlib.Path(f'{os.fspath(finished.path)}.start.npz')
      if self._path.exists():
        self._restore()

  def add(self, index: int, value: float, eigenvectors: tuple[Any, ...]) -> None:
    """Keeps a finished point, and what its eigenvectors make as a start."""
    if eigenvectors:
      self.start = _mix(eigenvectors, self._key)
    if self._path is not None:
      partial = self._path.with_suffix('.partial.npz')
      leaves = jax.tree.leaves(self.start)
      np.savez(partial, *leaves, digest=self._finished.digest, index=index, value=value)
      partial.replace(self._path)
    self._finished.add(index, value)

  def remove(self) -> None:
    """Every point is done."""
    if self._path is not None:
      self._path.unlink(missing_ok=True)

  def _restore(self) -> None:
    missing = self._finished.missing
    with np.load(self._path) as arrays:
      index = int(arrays['index'])
      last = bool(missing) and index in (missing[0] - 1, missing[0])
      if str(arrays['digest']) != self._finished.digest or not last:
        return
      leaves = [arrays[f'arr_{i}'] for i in range(len(arrays.files) - 3)]
      if leaves:
        self.start = jax.tree.unflatten(self._treedef, leaves)
      if index == missing[0]:
        self._finished.add(index, float(arrays['value']))


@jax.jit
def _mix(eigenvectors, key):
  leaves, treedef = jax.tree.flatten(eigenvectors[0])
  scale = _RANDOM / np.sqrt(sum(leaf.size for leaf in leaves))
  keys = jax.random.split(key, len(leaves))
  start = [
    scale * jax.random.normal(k, leaf.shape, leaf.dtype)
    for k, leaf in zip(keys, leaves, strict=True)
  ]
  return jax.tree.map(
    lambda *parts: sum(parts), jax.tree.unflatten(treedef, start), *eigenvectors
  )
