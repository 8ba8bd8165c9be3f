"""The loss on lines and surfaces, on all devices, as a run that can be killed."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sam_jax.curvature import operators
from sam_jax.landscape import directions as directions_lib
from sam_jax.landscape import record as record_lib
from sam_jax.landscape.result import Landscape

Params = Any
Batch = Any
LossFn = Callable[[Params, Batch], jax.Array]


def line(
  loss_fn: LossFn,
  params: Params,
  direction: Params,
  x: Sequence[float] | np.ndarray,
  batches: Iterable[Batch],
  *,
  weight: Callable[[Batch], float] | None = None,
  label: str = 'direction 1',
  record: str | os.PathLike[str] | None = None,
  devices: Sequence[jax.Device] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Landscape:
  """The mean loss at ``params + x * direction``.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch.
    params: the point at x = 0. Half-precision leaves are moved, and handed to
      ``loss_fn``, in float32.
    direction: pytree like ``params``; between two networks it is their `difference`.
    x: coordinates, (nx,).
    batches: as for `surface`.
    weight: number of examples of a batch; None is its leading dimension.
    label: what the direction is.
    record: as for `surface`.
    devices: as for `surface`.
    progress: called with the number of points done and of all points.

  Returns:
    The landscape, ``loss`` of shape (nx,).

  Raises:
    ValueError: ``x`` is empty, no vector, or not finite, or ``direction`` is no pytree
      like ``params``.

  >>> import jax.numpy as jnp
  >>> loss = lambda w, batch: jnp.mean(batch) * w ** 2
  >>> result = line(loss, jnp.float32(1), jnp.float32(1), [-1., 0., 1.], [jnp.ones(4)])
  >>> result.loss.tolist()
  [0.0, 1.0, 4.0]
  """
  x = axis('x', x)
  directions_lib.require_alike(params, direction, 'direction')
  plane = _Plane(loss_fn, params, (direction,), x[:, None])
  loss = plane.evaluate(batches, weight, record, devices, progress)
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
  record: str | os.PathLike[str] | None = None,
  devices: Sequence[jax.Device] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Landscape:
  r"""The mean loss at ``params + x * directions[0] + y * directions[1]``.

  Coordinates are in the lengths of the directions. Those of `random_directions` have
  the scale of the parameters, so that 1 is as far as the origin. Those of `trajectory`
  and the ``eigenvectors`` of `curvature.eigenpairs`, which can be given as they are,
  have length 1, so that coordinates are Euclidean distances: along eigenvectors the
  loss near the centre is
  :math:`L(w) + g^T(x v_1 + y v_2) + (\lambda_1 x^2 + \lambda_2 y^2) / 2`.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch. It is
      compiled once a batch shape and device.
    params: the point at (0, 0). Half-precision leaves are moved, and handed to
      ``loss_fn``, in float32.
    directions: two pytrees like ``params``.
    x: coordinates along the first direction, (nx,).
    y: coordinates along the second direction, (ny,).
    batches: pytrees of arrays, of any shapes. A list or an iterator is put on each
      device once, and must fit there; any other iterable is iterated anew for each
      point.
    weight: number of examples of a batch; None is its leading dimension.
    labels: what the directions are.
    record: file to which each point is written as it is done. Called again with the
      same file, a killed run goes on with the points that are missing. A file of other
      coordinates, parameters, directions or number of examples is started anew;
      ``loss_fn`` and the content of the batches are not compared.
    devices: the points are dealt to these devices in turn; None is all local ones.
      Parameters and directions are put whole on each.
    progress: called with the number of points done and of all points.

  Returns:
    The landscape, ``loss`` of shape (ny, nx).

  Raises:
    ValueError: ``x`` or ``y`` is empty, no vector, or not finite, or ``directions`` are
      not two pytrees like ``params``.

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
  x, y = axis('x', x), axis('y', y)
  directions_lib.require_two(params, directions)
  plane = _Plane(loss_fn, params, directions, points(x, y))
  loss = plane.evaluate(batches, weight, record, devices, progress)
  return Landscape(x=x, y=y, loss=loss.reshape(len(y), len(x)), labels=tuple(labels))


def axis(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
  """The coordinates along a direction, float64 (n,).

  Raises:
    ValueError: there are none, they are no vector, or not finite.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size or not np.isfinite(values).all():
    raise ValueError(
      f'{name} must be a vector of finite coordinates, at least one, got {values}'
    )
  return values


def points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """The points of a grid, (ny * nx, 2), x the faster."""
  return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


class _Plane:
  """Points of which the mean loss is wanted."""

  def __init__(self, loss_fn, params, directions, coordinates):
    self.loss_fn = loss_fn
    self.params = params
    self.directions = tuple(directions)
    self.coordinates = coordinates

  def evaluate(self, batches, weight, record, devices, progress) -> np.ndarray:
    """The mean loss at each point, (points,) float64."""
    devices = list(jax.local_devices() if devices is None else devices)
    if not devices:
      raise ValueError('devices=[]: give at least one, or None for all local ones')
    kept = isinstance(batches, list | tuple | Iterator)
    with jax.default_device(devices[0]):
      batches = operators.WeightedBatches(batches, weight)
    count = len(self.coordinates)
    facts = 'loss', self.coordinates, self.params, self.directions, batches.total
    with record_lib.Record(record, count, facts) as finished:
      missing = finished.missing
      places = [_Place(self, batches, kept, d) for d in devices[: len(missing)]]
      for index, value in _deal(places, missing):
        finished.add(index, value)
        if progress is not None:
          progress(len(finished.values), count)
      return finished.array((count,))


class _Place:
  """What one device needs to evaluate points."""

  def __init__(self, plane: _Plane, batches, kept: bool, device: jax.Device):
    self.plane = plane
    self.device = device
    self.params = jax.device_put(plane.params, device)
    self.directions = jax.device_put(plane.directions, device)
    self.batches = batches
    if kept:
      self.batches = [(jax.device_put(b, device), share) for b, share in batches]

  def start(self, index: int) -> list[tuple[jax.Array, float]]:
    """Starts on a point: the losses of the batches, with their shares."""
    point = tuple(self.plane.coordinates[index])
    with jax.default_matmul_precision('highest'):
      moved = directions_lib.move(self.params, self.directions, point)
      return [
        (_loss(self.plane.loss_fn, moved, jax.device_put(batch, self.device)), share)
        for batch, share in self.batches
      ]


def _deal(places: list[_Place], indices: Sequence[int]) -> Iterator[tuple[int, float]]:
  """The points with their mean losses, one after the other."""
  started: collections.deque = collections.deque()
  for turn, index in enumerate(indices):
    started.append((index, places[turn % len(places)].start(index)))
    # Each device has its next point before its last one is read: none waits.
    if len(started) > len(places):
      yield _finish(*started.popleft())
  while started:
    yield _finish(*started.popleft())


def _finish(index: int, parts: list[tuple[jax.Array, float]]) -> tuple[int, float]:
  return index, float(sum(float(part) * share for part, share in parts))


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn, params, batch):
  return loss_fn(params, batch)
