"""Loss landscapes: the loss along directions through the parameters."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.curvature import operators

Params = Any
Batch = Any
LossFn = Callable[[Params, Batch], jax.Array]
Normalization = Literal['filter', 'layer', 'none']


@dataclasses.dataclass(frozen=True)
class Landscape:
  """The loss on a line or on a grid through the parameters.

  Attributes:
    x: float64 (nx,), coordinates along the first direction, in its own length.
    y: float64 (ny,), along the second direction; None on a line.
    loss: float64 (nx,) on a line, (ny, nx) on a surface; may hold infinity or NaN.
    labels: what the directions are, for the axes of a figure.
  """

  x: np.ndarray
  y: np.ndarray | None
  loss: np.ndarray
  labels: tuple[str, ...] = ('direction 1', 'direction 2')

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes an npz file that `load` reads."""
    arrays = {'x': self.x, 'loss': self.loss, 'labels': np.array(self.labels)}
    if self.y is not None:
      arrays['y'] = self.y
    np.savez(path, **arrays)


def load(path: str | os.PathLike[str]) -> Landscape:
  """Reads a landscape that `Landscape.save` wrote."""
  with np.load(path) as arrays:
    return Landscape(
      x=arrays['x'],
      y=arrays.get('y'),
      loss=arrays['loss'],
      labels=tuple(str(label) for label in arrays['labels']),
    )


def random_directions(
  key: jax.Array,
  params: Params,
  num: int = 2,
  *,
  normalization: Normalization = 'filter',
  include_vectors: bool = False,
) -> tuple[Params, ...]:
  r"""Random directions, orthogonal to each other, in the scale of the parameters.

  Filter normalization gives every filter of a direction the norm that this filter has
  in the parameters, :math:`d_f \leftarrow d_f |w_f| / |d_f|`, so that networks which
  differ by a rescaling of their layers show the same landscape. A filter is what feeds
  one output: a slice along the last axis. Directions are made orthogonal filter by
  filter *before* they are scaled, so that both hold exactly. A leaf whose filters have
  fewer weights than there are directions is scaled as one filter.

  Args:
    key: typed PRNG key.
    params: pytree of floating-point arrays.
    num: number of directions.
    normalization: 'filter'; 'layer' takes each leaf as one filter; 'none' gives
      orthogonal Gaussian directions with the norm of the parameters they move.
    include_vectors: also move leaves of fewer than two dimensions: biases and
      normalization parameters. They are left at 0 otherwise.

  Returns:
    ``num`` pytrees like ``params``.

  Raises:
    ValueError: an argument is out of range, or nothing is left to move.

  >>> import jax, jax.numpy as jnp
  >>> params = {'kernel': jnp.arange(6.).reshape(3, 2), 'bias': jnp.ones(2)}
  >>> first, second = random_directions(jax.random.key(0), params)
  >>> bool(jnp.allclose(jnp.linalg.norm(first['kernel'], axis=0),
  ...                   jnp.linalg.norm(params['kernel'], axis=0)))
  True
  >>> abs(float(jnp.vdot(first['kernel'], second['kernel']))) < 1e-5
  True
  >>> first['bias'].tolist()
  [0.0, 0.0]

  References:
    Li et al., Visualizing the loss landscape of neural nets, arXiv 1712.09913.
  """
  if normalization not in ('filter', 'layer', 'none'):
    raise ValueError(
      f"normalization={normalization!r}: give 'filter', 'layer' or 'none'"
    )
  if num < 1:
    raise ValueError(f'num={num}: give at least one direction')
  leaves, treedef = jax.tree.flatten(params)
  leaves = [jnp.asarray(leaf) for leaf in leaves]
  moved = [leaf.size > 0 and (include_vectors or leaf.ndim >= 2) for leaf in leaves]
  room = sum(leaf.size for leaf, move in zip(leaves, moved, strict=True) if move)
  if room < num:
    raise ValueError(
      f'num={num}: only {room} parameters would be moved; include_vectors=True '
      'moves biases too'
    )
  keys = jax.random.split(key, len(leaves))
  groups = [_filters(leaf, num, normalization) for leaf in leaves]
  drawn = [
    _draw(leaf_key, group, num, normalization)
    if move
    else jnp.zeros((num, *leaf.shape), leaf.dtype)
    for leaf_key, group, leaf, move in zip(keys, groups, leaves, moved, strict=True)
  ]
  directions = [
    [draw[i].reshape(leaf.shape) for draw, leaf in zip(drawn, leaves, strict=True)]
    for i in range(num)
  ]
  if normalization == 'none':
    kept = [leaf * move for leaf, move in zip(leaves, moved, strict=True)]
    directions = _orthogonal(directions, kept)
  return tuple(jax.tree.unflatten(treedef, direction) for direction in directions)


def line(
  loss_fn: LossFn,
  params: Params,
  direction: Params,
  x: Sequence[float] | np.ndarray,
  batches: Iterable[Batch],
  *,
  weight: Callable[[Batch], float] | None = None,
  label: str = 'direction 1',
  progress: Callable[[int, int], None] | None = None,
) -> Landscape:
  """The mean loss at ``params + x * direction``.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch.
    params: the point at x = 0.
    direction: pytree like ``params``; between two networks it is their difference.
    x: coordinates, (nx,).
    batches: as for `curvature.hessian`.
    weight: number of examples of a batch; None is its leading dimension.
    label: what the direction is.
    progress: called with the number of points done and of all points.

  Returns:
    The landscape, ``loss`` of shape (nx,).

  >>> import jax.numpy as jnp
  >>> loss = lambda w, batch: jnp.mean(batch) * w ** 2
  >>> result = line(loss, jnp.float32(1), jnp.float32(1), [-1., 0., 1.], [jnp.ones(4)])
  >>> result.loss.tolist()
  [0.0, 1.0, 4.0]
  """
  x = np.asarray(x, np.float64)
  points = [((value,), index) for index, value in enumerate(x)]
  loss = np.empty(x.shape)
  _evaluate(loss_fn, params, (direction,), points, loss, batches, weight, progress)
  return Landscape(x=x, y=None, loss=loss, labels=(label,))


def surface(
  loss_fn: LossFn,
  params: Params,
  directions: tuple[Params, Params],
  x: Sequence[float] | np.ndarray,
  y: Sequence[float] | np.ndarray,
  batches: Iterable[Batch],
  *,
  weight: Callable[[Batch], float] | None = None,
  labels: tuple[str, str] = ('direction 1', 'direction 2'),
  progress: Callable[[int, int], None] | None = None,
) -> Landscape:
  """The mean loss at ``params + x * directions[0] + y * directions[1]``.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch.
    params: the point at (0, 0).
    directions: two pytrees like ``params``.
    x: coordinates along the first direction, (nx,).
    y: coordinates along the second direction, (ny,).
    batches: as for `curvature.hessian`.
    weight: number of examples of a batch; None is its leading dimension.
    labels: what the directions are.
    progress: called with the number of points done and of all points.

  Returns:
    The landscape, ``loss`` of shape (ny, nx).

  >>> import jax.numpy as jnp
  >>> loss = lambda w, batch: jnp.mean(batch) * w['a'] ** 2 + w['b']
  >>> params = {'a': jnp.float32(0), 'b': jnp.float32(0)}
  >>> along_a = {'a': jnp.float32(1), 'b': jnp.float32(0)}
  >>> along_b = {'a': jnp.float32(0), 'b': jnp.float32(1)}
  >>> result = surface(loss, params, (along_a, along_b), [0., 1.], [0., 2.],
  ...                  [jnp.ones(4)])
  >>> result.loss.tolist()
  [[0.0, 1.0], [2.0, 3.0]]
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  points = [((x[j], y[i]), (i, j)) for i in range(len(y)) for j in range(len(x))]
  loss = np.empty((len(y), len(x)))
  _evaluate(loss_fn, params, directions, points, loss, batches, weight, progress)
  return Landscape(x=x, y=y, loss=loss, labels=labels)


def _evaluate(loss_fn, params, directions, points, loss, batches, weight, progress):
  """Fills in the mean loss at each point, from the host."""
  batches = operators.WeightedBatches(batches, weight)
  done = 0
  pending = None
  for coordinates, index in points:
    with jax.default_matmul_precision('highest'):
      moved = _move(params, directions, coordinates)
      parts = [(_loss(loss_fn, moved, batch), share) for batch, share in batches]
    # Read the point before only now: the device is busy with this one meanwhile.
    done += _collect(pending, loss, progress, done, len(points))
    pending = index, parts
  _collect(pending, loss, progress, done, len(points))


def _collect(pending, loss, progress, done, total) -> int:
  if pending is None:
    return 0
  index, parts = pending
  loss[index] = sum(float(part) * share for part, share in parts)
  if progress is not None:
    progress(done + 1, total)
  return 1


@jax.jit
def _move(params, directions, coordinates):
  for direction, coordinate in zip(directions, coordinates, strict=True):
    params = jax.tree.map(
      lambda p, d, c=coordinate: (p + c * d).astype(jnp.result_type(p)),
      params,
      direction,
    )
  return params


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn, params, batch):
  return loss_fn(params, batch)


def _filters(leaf, num, normalization):
  """A leaf as (filter size, number of filters)."""
  columns = leaf.reshape(-1, leaf.shape[-1]) if leaf.ndim >= 2 else leaf.reshape(-1, 1)
  if normalization != 'filter' or columns.shape[0] < num:
    columns = leaf.reshape(-1, 1)
  return columns


def _draw(key, filters, num, normalization):
  """(num, filter size, filters): orthogonal within a filter, scaled like it."""
  drawn = jax.random.normal(key, (num, *filters.shape), filters.dtype)
  if normalization == 'none':
    return drawn
  result = []
  for direction in drawn:
    for _ in range(2):
      for other in result:
        dots = (other * direction).sum(0, keepdims=True)
        direction = direction - other * dots
    norms = jnp.linalg.norm(direction, axis=0, keepdims=True)
    result.append(direction / jnp.where(norms > 0, norms, 1))
  return jnp.stack(result) * jnp.linalg.norm(filters, axis=0)[None, None]


def _orthogonal(directions, kept):
  """Whole directions made orthogonal, with the norm of the parameters they move."""
  size = _norm(kept)
  result = []
  for direction in directions:
    for _ in range(2):
      for other in result:
        dot = sum(jnp.vdot(a, b) for a, b in zip(other, direction, strict=True))
        direction = [
          d - dot / size**2 * o for d, o in zip(direction, other, strict=True)
        ]
    factor = size / _norm(direction)
    result.append([factor * d for d in direction])
  return result


def _norm(leaves):
  return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in leaves))
