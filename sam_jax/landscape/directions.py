"""Directions through the parameters: random, between networks, of a trajectory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import layouts, perturbations
from sam_jax.curvature import products

Params = Any
Normalization = Literal['filter', 'layer', 'none']
# Columns of the displacements that are held in float64 at a time.
_CHUNK = 1 << 18
# A second direction with less of the variance than this is rounding.
_LEAST_SHARE = 1e-12


def random_directions(
  key: jax.Array,
  params: Params,
  num: int = 2,
  *,
  normalization: Normalization = 'filter',
  include_vectors: bool = False,
  layout: layouts.Layout | None = None,
) -> tuple[Params, ...]:
  r"""Random directions, orthogonal to each other, in the scale of the parameters.

  Filter normalization gives every filter of a direction the norm that this filter has
  in the parameters, :math:`d_f \leftarrow d_f |w_f| / |d_f|`, so that networks which
  differ by a rescaling of their layers show the same landscape. A filter is all weights
  that feed one output: a unit, a channel, or a feature of a head. Its place in each
  leaf is the layout's to say. Directions are made orthogonal filter by filter *before*
  they are scaled, so that both hold exactly. A leaf whose filters have fewer weights
  than there are directions is scaled as one filter.

  Args:
    key: typed PRNG key.
    params: pytree of floating-point arrays.
    num: number of directions.
    normalization: 'filter'; 'layer' takes each leaf as one filter; 'none' gives
      orthogonal Gaussian directions with the norm of the parameters they move.
    include_vectors: also move leaves that are no weights, biases and normalization
      parameters, each as one filter. They are left at 0 otherwise.
    layout: which leaves are weights and what their filters are; None is
      `layouts.automatic`.

  Returns:
    ``num`` pytrees like ``params``, in at least float32. No norm leaves the range of
    the dtype, so that entries of any size give a direction of their size.

  Raises:
    ValueError: an argument is out of range, nothing is left to move, or the layout does
      not know the filters of a weight that are to be normalized.

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
  leaves = products.at_least_float32(leaves)
  layout = layouts.automatic() if layout is None else layout
  if normalization == 'filter':
    _require_known(layout, params)
  described = [leaf for _, leaf in layout.leaves(params)]
  moved = [
    leaf.size > 0 and (include_vectors or is_weight)
    for leaf, (is_weight, _) in zip(leaves, described, strict=True)
  ]
  room = sum(leaf.size for leaf, move in zip(leaves, moved, strict=True) if move)
  if room < num:
    raise ValueError(
      f'num={num}: only {room} parameters would be moved; include_vectors=True '
      'moves biases too'
    )
  keys = jax.random.split(key, len(leaves))
  by_filter = normalization == 'filter'
  orders = [
    _order(leaf, num, axes if by_filter and is_weight else ())
    for leaf, (is_weight, axes) in zip(leaves, described, strict=True)
  ]
  drawn = [
    _draw(leaf_key, leaf, num, normalization, *order)
    if move
    else jnp.zeros((num, *leaf.shape), leaf.dtype)
    for leaf_key, order, leaf, move in zip(keys, orders, leaves, moved, strict=True)
  ]
  directions = [[draw[i] for draw in drawn] for i in range(num)]
  if normalization == 'none':
    kept = [leaf for leaf, move in zip(leaves, moved, strict=True) if move]
    directions = _orthogonal(directions, perturbations.norm(kept))
  return tuple(jax.tree.unflatten(treedef, direction) for direction in directions)


class Trajectory(NamedTuple):
  """The plane in which checkpoints moved most, and where each stands in it.

  Attributes:
    directions: two pytrees like the parameters, of length 1 and orthogonal.
    coordinates: float64 (t, 2), the checkpoints in the plane, the centre at (0, 0).
    explained: float64 (2,), the share of the variance along each direction.
  """

  directions: tuple[Params, Params]
  coordinates: np.ndarray
  explained: np.ndarray


def difference(first: Params, second: Params) -> Params:
  """The direction from one network to another, for `line`.

  Args:
    first: pytree of floating-point arrays; `line` is given it as ``params`` and has it
      at x = 0.
    second: pytree like ``first``, at x = 1.

  Returns:
    ``second - first``, in at least float32.

  Raises:
    ValueError: the trees or the shapes of their leaves differ.

  >>> import jax.numpy as jnp
  >>> difference({'w': jnp.ones(2)}, {'w': jnp.array([4., 1.])})['w'].tolist()
  [3.0, 0.0]
  """
  require_alike(first, second, 'second')
  return jax.tree.map(
    lambda a, b: jnp.subtract(*(jnp.asarray(p, _wide(a)) for p in (b, a))),
    first,
    second,
  )


def trajectory(checkpoints: Sequence[Params], *, center: int = -1) -> Trajectory:
  r"""The two principal components of the way that training took.

  With the displacements from the centre :math:`d_i = w_i - w_c` and their mean
  :math:`\bar d`, the directions are the first two eigenvectors of
  :math:`\sum_i (d_i - \bar d)(d_i - \bar d)^T`. They come from the t x t matrix of
  the products of displacements, summed in float64 on the host. The signs are such that
  the coordinate furthest from the centre is positive.

  A grid for `surface` with ``checkpoints[center]`` as ``params`` is in the units of the
  coordinates: Euclidean distances.

  Args:
    checkpoints: parameters at t >= 3 times, pytrees of floating-point arrays.
    center: index of the checkpoint at (0, 0), by default the last.

  Returns:
    The directions, the coordinates of the checkpoints, and what share of their
    variance each direction explains. A checkpoint lies in the plane only if the shares
    sum to 1; else the coordinates are its projection.

  Raises:
    ValueError: there are fewer than three checkpoints, their trees differ, they did
      not move, or they moved along one line only.

  >>> import jax.numpy as jnp
  >>> steps = [{'w': jnp.array([x, 5., y])} for x, y in ((9., 0.), (5., 2.), (1., 0.))]
  >>> found = trajectory(steps)
  >>> abs(found.coordinates).round(4).tolist()
  [[8.0, 0.0], [4.0, 2.0], [0.0, 0.0]]
  >>> abs(found.directions[1]['w']).round(4).tolist()
  [0.0, 0.0, 1.0]

  References:
    Li et al., Visualizing the loss landscape of neural nets, arXiv 1712.09913, sec. 7.
  """
  count = len(checkpoints)
  if count < 3:
    raise ValueError(f'checkpoints: {count} given, a trajectory needs at least 3')
  if not -count <= center < count:
    raise ValueError(f'center={center}: there are {count} checkpoints')
  for index, other in enumerate(checkpoints):
    require_alike(checkpoints[0], other, f'checkpoints[{index}]')
  leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(c)] for c in checkpoints]
  rows = list(zip(*leaves, strict=True))
  gram = sum(d @ d.T for row in rows for d in _displacements(row, center))
  weights, explained = _principal(gram)
  parts = [
    np.concatenate([weights.T @ d for d in _displacements(row, center)], axis=1)
    for row in rows
  ]
  directions = tuple(
    jax.tree.unflatten(
      jax.tree.structure(checkpoints[0]),
      [
        jnp.asarray(part[i].reshape(row[0].shape), _wide(row[0]))
        for part, row in zip(parts, rows, strict=True)
      ],
    )
    for i in (0, 1)
  )
  return Trajectory(directions, gram @ weights, explained)


@jax.jit
def move(params: Params, directions: Sequence[Params], coordinates: Any) -> Params:
  """The parameters plus each direction times its coordinate, in at least float32.

  Half-precision parameters are widened, as for curvature: most of a short step would be
  lost in their rounding.
  """
  params = products.at_least_float32(params)
  for direction, coordinate in zip(directions, coordinates, strict=True):
    params = jax.tree.map(
      lambda p, d, c=coordinate: (p + c * d).astype(jnp.result_type(p)),
      params,
      direction,
    )
  return params


def _displacements(row: Sequence[np.ndarray], center: int) -> Iterator[np.ndarray]:
  """One leaf of all checkpoints less that of the centre, (t, columns) at a time."""
  flat = [leaf.reshape(-1) for leaf in row]
  # A leaf without entries gives one piece without columns.
  for start in range(0, max(flat[0].size, 1), _CHUNK):
    part = np.stack([leaf[start : start + _CHUNK] for leaf in flat]).astype(np.float64)
    yield part - part[center]


def _principal(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Principal components from the products of displacements, (t, t).

  Returns:
    (t, 2), the directions as combinations of displacements, and their shares (2,).
  """
  if not 0 < np.trace(gram) < np.inf:
    raise ValueError(
      'checkpoints: the parameters did not move, or are not finite: give checkpoints '
      'of different times'
    )
  centering = np.eye(len(gram)) - 1 / len(gram)
  values, vectors = np.linalg.eigh(centering @ gram @ centering)
  values, vectors = values[::-1], vectors[:, ::-1]
  if values[1] < _LEAST_SHARE * values[0]:
    raise ValueError(
      'checkpoints: they lie on one line: give `line` the difference of two'
    )
  weights = centering @ vectors[:, :2] / np.sqrt(values[:2])
  coordinates = gram @ weights
  furthest = np.abs(coordinates).argmax(0)
  weights *= np.sign(coordinates[furthest, (0, 1)])
  return weights, values[:2] / np.maximum(values, 0).sum()


def require_alike(first: Params, second: Params, name: str) -> None:
  """Checks that two trees have the same leaves of the same shapes."""
  shapes = [
    {
      jax.tree_util.keystr(path): np.shape(leaf)
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    for tree in (first, second)
  ]
  differing = sorted(
    key
    for key in shapes[0].keys() | shapes[1].keys()
    if shapes[0].get(key) != shapes[1].get(key)
  )
  if differing:
    key = differing[0]
    one, other = (shape.get(key, 'missing') for shape in shapes)
    raise ValueError(
      f'{name}: {len(differing)} leaves differ; {key} is '
      f'{other} instead of {one}: all must be of one and the same network'
    )


def require_two(params: Params, directions: Sequence[Params]) -> None:
  """Checks that there are two directions like the parameters."""
  count = len(directions) if isinstance(directions, list | tuple) else 1
  if count != 2:
    raise ValueError(
      f'directions: {count} given, a surface takes two; the loss along one is '
      'landscape.line'
    )
  for number, direction in enumerate(directions, 1):
    require_alike(params, direction, f'direction {number}')


def _wide(leaf: Any) -> np.dtype:
  """The type of a direction at a leaf: its own, and at least float32."""
  return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _require_known(layout: layouts.Layout, params: Params) -> None:
  """Checks that the layout knows the filters of all weights."""
  unknown = layout.unknown(params)
  if unknown:
    raise ValueError(
      f'layout: where the filters of {", ".join(unknown[:3])} are, path and shape do '
      'not tell, for '
      f'{len(unknown)} leaves in all; say it with layout=layouts.rule(...), name '
      "stacked layers in layouts.automatic(stacked=...), or give normalization='layer'"
    )


def _order(leaf, num, axes):
  """The axes of a leaf, those that number its filters last, and the filters' number."""
  others = [axis for axis in range(leaf.ndim) if axis not in axes]
  count = math.prod(leaf.shape[axis] for axis in axes)
  # Filters of fewer weights than directions leave no room for orthogonal ones.
  count = count if leaf.size >= num * count else 1
  return (*others, *axes), count


def _draw(key, leaf, num, normalization, order, count):
  """(num, *leaf.shape): orthogonal within each filter, scaled like it."""
  turned = leaf.transpose(order)
  filters = turned.reshape(-1, count)
  drawn = jax.random.normal(key, (num, *filters.shape), filters.dtype)
  if normalization != 'none':
    drawn = _normalized(drawn, filters)
  back = [1 + order.index(axis) for axis in range(leaf.ndim)]
  return drawn.reshape(num, *turned.shape).transpose(0, *back)


def _normalized(drawn, filters):
  result = []
  for direction in drawn:
    for _ in range(2):
      for other in result:
        dots = (other * direction).sum(0, keepdims=True)
        direction = direction - other * dots
    norms = _norms(direction)
    result.append(direction / jnp.where(norms > 0, norms, 1))
  return jnp.stack(result) * _norms(filters)[None]


@jax.jit
def _norms(filters):
  """The norm of each column, (1, count), in the range of the dtype."""
  return jax.vmap(perturbations.norm, in_axes=1)(filters)[None]


def _orthogonal(directions, size):
  """Whole directions made orthogonal, each of this norm."""
  result = []
  for direction in directions:
    for _ in range(2):
      for other in result:
        dot = sum(jnp.vdot(a, b) for a, b in zip(other, direction, strict=True))
        direction = [d - dot * o for d, o in zip(direction, other, strict=True)]
    result.append(perturbations.on_sphere(direction))
  return [[(size * d).astype(d.dtype) for d in direction] for direction in result]
