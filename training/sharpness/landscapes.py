"""The loss around a trained network, as files and figures."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sam_jax import curvature, landscape, plotting
from training import checkpoints, losses
from training import config as config_lib
from training.config import Config
from training.errors import UsageError
from training.sharpness import files, network
from training.sharpness.network import Network, label
from training.sharpness.objective import Objective, cast
from training.sharpness.options import Options
from training.ticker import Ticker

_FEWEST_CHECKPOINTS = 3
# A trajectory is drawn with this share of its extent around it.
_MARGIN = 0.25
_LINE_POINTS = 51


@dataclasses.dataclass(frozen=True)
class Drawer:
  """Evaluates and draws what the options ask for."""

  network: Network
  objective: Objective
  options: Options
  folder: pathlib.Path
  parts: files.Parts
  ticker: Ticker
  key: jax.Array

  def run(self, pairs: curvature.Eigenpairs) -> dict[str, Any]:
    """Writes the files; what the summary says of them."""
    facts = {}
    if self.options.landscape_points or self.options.eigen_ratio_points:
      plane = self._plane(pairs)
      if self.options.landscape_points:
        facts['landscape'] = self._surface(plane)
      if self.options.eigen_ratio_points:
        self._eigen_ratio(plane)
    if self.options.landscape_towards:
      facts['line'] = self._line()
    return facts

  def _surface(self, plane: Plane) -> dict[str, Any]:
    x, y = (self._axis(i, plane, self.options.landscape_points) for i in (0, 1))
    result = landscape.surface(
      self.objective.loss,
      self.objective.params,
      plane.directions,
      x,
      y,
      self.objective.batches,
      weight=losses.num_examples,
      labels=plane.labels,
      record=self.parts.record('landscape'),
      progress=self._show('landscape'),
    )
    result = dataclasses.replace(result, path=plane.path, explained=plane.explained)
    self._write(result, files.LANDSCAPE, files.LANDSCAPE_FIGURE)
    if self.options.vtk:
      result.save_vtk(self.folder / files.LANDSCAPE_VTK)
    return {
      'directions': self.options.landscape_directions,
      'explained_variance': list(plane.explained),
      'loss_range': [float(np.nanmin(result.loss)), float(np.nanmax(result.loss))],
    }

  def _eigen_ratio(self, plane: Plane) -> None:
    """The map of |lambda_min / lambda_max|, on a grid of its own."""
    x, y = (self._axis(i, plane, self.options.eigen_ratio_points) for i in (0, 1))
    result = landscape.eigen_ratio(
      self.objective.loss,
      self.objective.params,
      plane.directions,
      x,
      y,
      self.objective.batches,
      weight=losses.num_examples,
      key=self.key,
      labels=plane.labels,
      record=self.parts.record('eigen_ratio'),
      progress=self._show('eigen-ratio map'),
    )
    self._write(result, files.EIGEN_RATIO, files.EIGEN_RATIO_FIGURE, 'heatmap')

  def _line(self) -> dict[str, Any]:
    """The loss on the way to another network, and past both."""
    other = pathlib.Path(self.options.landscape_towards)
    params = cast(params_of(other, self.network), self.options.dtype)
    result = landscape.line(
      self.objective.loss,
      self.objective.params,
      landscape.difference(self.objective.params, params),
      np.linspace(-0.5, 1.5, _LINE_POINTS),
      self.objective.batches,
      weight=losses.num_examples,
      label=f'{_name(self.network.config)} at 0, {_name(config_lib.load(other))} at 1',
      record=self.parts.record('line'),
      progress=self._show('line'),
    )
    self._write(result, files.LINE, files.LINE_FIGURE)
    between = result.loss[(result.x >= 0) & (result.x <= 1)]
    ends = max(between[0], between[-1])
    return {'towards': str(other), 'barrier': float(between.max() - ends)}

  def _plane(self, pairs: curvature.Eigenpairs) -> Plane:
    """The directions that the options name."""
    kind = self.options.landscape_directions
    if kind == 'eigenvectors':
      if len(pairs.eigenvalues) < 2:
        raise UsageError(
          '--landscape_directions=eigenvectors: needs --top_k=2 or more.'
        )
      directions = tuple(
        self.objective.direction(pairs.eigenvectors[i]) for i in (0, 1)
      )
      return Plane(directions, ('eigenvector of lambda_max', 'eigenvector of lambda_2'))
    if kind == 'trajectory':
      return self._trajectory()
    directions = landscape.random_directions(
      self.key,
      self.objective.params,
      normalization='none' if kind == 'gaussian' else kind,
      include_vectors=self.options.landscape_biases,
    )
    return Plane(directions)

  def _trajectory(self) -> Plane:
    steps = [cast(p, self.options.dtype) for p in network.trajectory(self.network)]
    try:
      found = landscape.trajectory(steps)
    except ValueError as error:
      raise UsageError(
        f'--landscape_directions=trajectory: {error}; train with --keep_checkpoints=0 '
        'to keep them all.'
      ) from error
    labels = ('principal component 1', 'principal component 2')
    return Plane(
      found.directions,
      labels,
      found.coordinates,
      tuple(float(share) for share in found.explained),
    )

  def _axis(self, index: int, plane: Plane, points: int) -> np.ndarray:
    extent = self.options.landscape_extent
    if plane.path is None:
      return np.linspace(-extent, extent, points)
    along = plane.path[:, index]
    margin = _MARGIN * extent * np.ptp(plane.path, axis=0).max()
    return np.linspace(along.min() - margin, along.max() + margin, points)

  def _write(self, result, name, figure_name, kind='contour') -> None:
    result.save(self.folder / name)
    figure = plotting.landscape(result, kind, title=title(self.network))
    figure.savefig(self.folder / figure_name)

  def _show(self, name: str) -> Callable[[int, int], None]:
    return lambda done, total: self.ticker.show(f'{name}: point {done}/{total}')


@dataclasses.dataclass(frozen=True)
class Plane:
  """Two directions, and the path that gave them if one did."""

  directions: tuple[Any, Any]
  labels: tuple[str, str] = ('direction 1', 'direction 2')
  path: np.ndarray | None = None
  explained: tuple[float, ...] = ()


def check(measured: Network, options: Options) -> None:
  """Refuses what could not be drawn, before anything is measured.

  Raises:
    UsageError: the other network does not fit, or there are too few checkpoints.
  """
  if options.landscape_towards:
    params_of(pathlib.Path(options.landscape_towards), measured)
  found = len([s for s in checkpoints.steps(measured.workdir) if s <= measured.step])
  wanted = options.landscape_points or options.eigen_ratio_points
  along = options.landscape_directions == 'trajectory'
  if wanted and along and found < _FEWEST_CHECKPOINTS:
    raise UsageError(
      f'--landscape_directions=trajectory: {measured.workdir} has {found} checkpoints, '
      f'and a plane needs {_FEWEST_CHECKPOINTS}; train with --keep_checkpoints=0 to '
      'keep them all.'
    )


def params_of(workdir: pathlib.Path, measured: Network) -> Any:
  """The parameters of another run of the same model.

  Raises:
    UsageError: there are none, they are of another model, or hold NaN or infinity.
  """
  try:
    checkpoint = checkpoints.load(workdir)
    found = network.variables(workdir, measured.workload, checkpoint)[0]
  except UsageError as error:
    raise UsageError(f'--landscape_towards={workdir}: {error}') from error
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
    raise UsageError(
      f'--landscape_towards={workdir}: its parameters hold NaN or infinity.'
    )
  return found


def title(measured: Network) -> str:
  """What a figure of a network is headed with."""
  config = measured.config
  return f'{config.task}: {_name(config)}, step {measured.step:,}'


def _name(config: Config) -> str:
  return f'{label(config)}, seed {config.seed}'
