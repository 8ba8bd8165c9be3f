"""Batch sharpness while a network trains, against its two plateaus."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from measurements import band_figure, blocks, edges
from measurements.edges_program import curvature_params, num_ascent_steps
from sam_jax import edges as library
from sam_jax.measuring.entries import plain
from training import config as config_lib
from training import methods, optimizers
from training import problem as problem_lib
from training.config import Config
from training.errors import UsageError
from training.hooks import Hook
from training.problem import Batch, Problem
from training.step import TrainState

NAME = 'batch_sharpness'
FILE_NAME = 'batch_sharpness.png'
# Batches of a measurement; a split that has fewer gives all.
NUM_BATCHES = 32
# Methods along whose step it is measured too, and whether they divide by the norm.
_ALONG = {'sam': True, 'usam': False}
_PLATEAUS = ('small_batch_plateau', 'large_batch_plateau')
# Keeps the batches of measurements apart from those that are trained on.
_STREAM = 1


class BatchSharpness(Hook):
  """Tracks batch sharpness; see `track`.

  Attributes:
    name: 'batch_sharpness'.
  """

  name = NAME

  def __init__(self, problem: Problem, config: Config, every: int):
    """Takes what `track` has checked."""
    self._problem, self._config, self._every = problem, config, every
    train, size = problem.train, config.batch_size
    sequence = np.random.SeedSequence(config.seed, spawn_key=(_STREAM,))
    seed = int(sequence.generate_state(1)[0])
    self._batches = train.batches(size, seed=seed)
    self._steps_per_epoch = self._batches.steps_per_epoch
    self._rate = optimizers.learning_rate(config, self._steps_per_epoch)

  def due(self, step: int, steps_per_epoch: int) -> bool:
    """Whether a number of steps is a multiple."""
    return step % (self._every or steps_per_epoch) == 0

  def __call__(self, state: TrainState, step: int) -> dict[str, Any]:
    """Measures the network as the next step finds it."""
    config = self._config
    params, rate = curvature_params(state.params), float(self._rate(step))
    rho = self._rho(step)
    batches = [
      {**batch, 'batch_stats': state.batch_stats, 'rho': np.float32(rho or 0)}
      for batch in self._drawn(step)
    ]
    batches = jax.device_put(batches)
    found = library.batch_sharpness(self._loss, params, batches)
    line = {
      'batch_sharpness': found.value,
      'standard_error': found.standard_error,
      'num_batches': found.num_batches,
      'batch_size': config.batch_size,
      **self._plateaus(rate),
      'learning_rate': rate,
      'rho': rho,
    }
    if _has_step(config):
      found = library.batch_sharpness(
        self._loss, params, batches, direction=self._along_sam
      )
      line['batch_sharpness_of_sam'] = found.value
      line['standard_error_of_sam'] = found.standard_error
    return plain(line)

  def draw(self, workdir: pathlib.Path, lines: Sequence[dict[str, Any]]) -> bool:
    """Draws `batch_sharpness.png`, whole or not at all."""
    name = 'along the gradient of the batch'
    bands = [band_figure.Band('batch_sharpness', 'standard_error', name, 'C0')]
    if _has_step(self._config):
      bands.append(
        band_figure.Band(
          'batch_sharpness_of_sam',
          'standard_error_of_sam',
          "along SAM's step on the batch",
          'C3',
        )
      )
    band_figure.save(
      workdir / FILE_NAME,
      lines,
      bands,
      self._lines_of_edges(),
      ylabel='batch sharpness',
      title=config_lib.title(self._config),
    )
    return True

  def summarize(self, lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """Means over the last third of the steps, see `summarize` of this module."""
    return summarize(lines, step)

  def _drawn(self, step: int) -> Iterator[Batch]:
    """Some full batches of the training size, without repeats, by seed and step."""
    size = self._config.batch_size
    full = (b for b in self._batches.epoch(step) if b['weights'].sum() == size)
    return itertools.islice(full, NUM_BATCHES)

  def _loss(self, params: Any, batch: Batch) -> jax.Array:
    rest = {name: x for name, x in batch.items() if name not in ('batch_stats', 'rho')}
    return problem_lib.loss(self._problem, params, batch['batch_stats'], rest)[0]

  def _along_sam(self, params: Any, batch: Batch) -> Any:
    """The gradient at the perturbed point; its radius is no constant of a program."""
    normalized = _ALONG[self._config.optimizer]
    direction = library.perturbed_direction(
      self._loss, batch['rho'], normalized=normalized
    )
    return direction(params, batch)

  def _rho(self, step: int) -> float | None:
    """The radius of SAM in the step that comes, 0 where it does not perturb."""
    if not _has_step(self._config):
      return None
    phase = optimizers.phase(self._config, self._steps_per_epoch, step)
    return 0.0 if phase is False else self._config.rho

  def _plateaus(self, rate: float) -> dict[str, float | None]:
    """Both at a learning rate; None where none is known."""
    momentum = _momentum(self._config)
    if momentum is None or not rate:
      return dict.fromkeys(_PLATEAUS)
    found = library.batch_sharpness_plateaus(rate, momentum)
    return dict(zip(_PLATEAUS, map(float, found), strict=True))

  def _lines_of_edges(self) -> list[band_figure.Edge]:
    small, large = _PLATEAUS
    if not _momentum(self._config):
      return [band_figure.Edge(large, '2 / eta', 'k--')]
    return [
      band_figure.Edge(small, '2 (1 - b) / eta', 'k:'),
      band_figure.Edge(large, '2 (1 + b) / eta', 'k--'),
    ]


def _has_step(config: Config) -> bool:
  """Whether batch sharpness is measured along SAM's step, of one ascent step."""
  return config.optimizer in _ALONG and num_ascent_steps(config) == 1


def _momentum(config: Config) -> float | None:
  """Decay rate of the velocity of heavy ball; None where plateaus are not known."""
  return {'sgd': 0.0, 'momentum': config.momentum}.get(config.base_optimizer)


def summarize(lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
  """Numbers of a run from the lines of the tracker.

  Args:
    lines: by step.
    step: the run's last.

  Returns:
    Means over the last third of the steps, `mean_...`, of batch sharpness over each of
    its plateaus, and of that along SAM's step; each with the half-width of its 95 %
    interval, `..._interval`, of the means of consecutive blocks (`blocks.late_mean`);
    and the number of lines.
  """
  found, told = {'measured': len(lines)}, []
  for end in ('', '_of_sam'):
    if end and not any(f'batch_sharpness{end}' in line for line in lines):
      continue
    for plateau in _PLATEAUS:
      ratios = [
        (line['step'], line[f'batch_sharpness{end}'] / line[plateau])
        for line in lines
        if line.get(f'batch_sharpness{end}') is not None and line[plateau]
      ]
      name = f'mean_batch_sharpness{end}_over_{plateau}'
      found[name], found[f'{name}_interval'] = blocks.late_mean(ratios, step)
      if found[name] is not None:
        shown = blocks.show(found[name], found[f'{name}_interval'])
        told.append(f'batch sharpness{end} / {plateau}'.replace('_', ' ') + f' {shown}')
  text = f'means of the last third: {", ".join(told)}' if told else ''
  return {**found, 'text': text}


def track(problem: Problem, config: Config, every: int = 0) -> BatchSharpness:
  r"""Batch sharpness of a run, tracked while it trains; a hook of the loop.

  .. math:: \mathbb{E}_B \frac{d_B^T H_B d_B}{|d_B|^2}

  over up to `NUM_BATCHES` full batches of the run's size, drawn without repeats by the
  run's seed and the step, in another order than those that are trained on. The
  direction d is the gradient of the batch and, for SAM and unnormalised SAM, also the
  gradient at their perturbed point, at the radius of the step that comes. The loss is
  that in evaluation mode, without augmentation and without weight decay, in float32 or
  wider. Batches go through one compiled function one after the other; graphs, whose
  batches have several shapes, through one a shape.

  Args:
    problem: what is trained.
    config: the run's.
    every: steps between measurements; 0 is the end of each epoch.

  Raises:
    UsageError: the arguments, or a method whose steps batch sharpness says nothing of.

  References:
    Andreyev and Beneventano, Edge of stochastic stability, arXiv 2412.20553; arXiv
    2604.14108 (the plateaus under momentum).
  """
  check(config, every)
  return BatchSharpness(problem, config, every)


def check(config: Config, every: int = 0) -> None:
  """Checks the arguments of `track` as far as that needs no data.

  Raises:
    UsageError: an argument, or a method of which it says nothing.
  """
  edges.check_every(every)
  if methods.get(config.optimizer) is not None:
    edges.check_clean_gradient(config, NAME, 'leave batch_sharpness out.')
  if config.optimizer in _ALONG and config.rho is None:
    raise UsageError(
      f'--track={NAME}: --optimizer={config.optimizer} has no value of --rho, the '
      'radius of its step; give one.'
    )
