"""The noise kernel norm of SGD while a network trains."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from measurements import band_figure, blocks, edges, tangent_kernel
from measurements.edges_program import curvature_params
from sam_jax import curvature
from sam_jax import edges as library
from sam_jax.measuring.entries import plain
from training import config as config_lib
from training import optimizers
from training import problem as problem_lib
from training.config import Config
from training.errors import TrainingDiverged, UsageError
from training.hooks import Hook
from training.problem import Batch, Problem
from training.step import TrainState

NAME = 'noise'
FILE_NAME = 'noise.png'
# Outputs of all examples up to which the kernel is diagonalised.
EXACT_UP_TO = 2000
# Examples that products of the estimate take at once.
_TOGETHER = 1000
# Of the estimate: pairs that are exact, and probes for the rest with their steps.
_ESTIMATE = {'num_pairs': 10, 'num_probes': 4, 'num_matvecs': 20}
# The 97.5 % quantile of Student's t with 3 degrees of freedom, of four probes.
_QUANTILE = 3.182446


class Noise(Hook):
  """Tracks the noise kernel norm; see `track`.

  Attributes:
    name: 'noise'.
  """

  name = NAME

  def __init__(self, problem: Problem, config: Config, every: int):
    """Takes what `track` has checked.

    Raises:
      UsageError: the loss is not a squared error.
    """
    self._problem, self._config, self._every = problem, config, every
    train = problem.train
    steps_per_epoch = train.batches(config.batch_size).steps_per_epoch
    self._rate = optimizers.learning_rate(config, steps_per_epoch)
    self._squared = self._squared_error()
    outputs = round(self._squared.num_outputs * train.num_examples)
    variables, inputs = problem.variables(), problem.example_inputs
    self._exact = outputs <= EXACT_UP_TO and tangent_kernel.applies(
      problem.model, variables, inputs
    )
    # The kernel is of all examples at once.
    count = 1 if self._exact else -(-train.num_examples // _TOGETHER)
    self._examples = train.batches(-(-train.num_examples // count))
    self._kernel = jax.jit(self._kernel_of)
    self._placed: list[Batch] = []

  def due(self, step: int, steps_per_epoch: int) -> bool:
    """Whether a number of steps is a multiple."""
    return step % (self._every or steps_per_epoch) == 0

  def __call__(self, state: TrainState, step: int) -> dict[str, Any]:
    """Measures the network as the next step finds it.

    Raises:
      TrainingDiverged: its tangent kernel is not finite.
    """
    config, rate = self._config, float(self._rate(step))
    settings = {
      'learning_rate': rate,
      'batch_size': config.batch_size,
      'momentum': _momentum(config),
    }
    find = self._diagonalised if self._exact else self._estimated
    try:
      found = find(state, step, settings)
    except curvature.NonFiniteError as error:
      raise TrainingDiverged(
        f'--track={NAME}: the tangent kernel is not finite after step {step}: try a '
        'lower --learning_rate.'
      ) from error
    return plain(
      {
        'noise_kernel_norm': found.value,
        'standard_error': found.standard_error,
        'edge': 1.0,
        'infinite': bool(np.isinf(found.value)),
        'exact': self._exact,
        'num_matvecs': found.num_matvecs,
        **settings,
      }
    )

  def draw(self, workdir: pathlib.Path, lines: Sequence[dict[str, Any]]) -> bool:
    """Draws `noise.png`, whole or not at all."""
    label = 'exact' if self._exact else 'estimate, with its 95 % band'
    band_figure.save(
      workdir / FILE_NAME,
      lines,
      [
        band_figure.Band(
          'noise_kernel_norm', 'standard_error', label, 'C0', half_width=_QUANTILE
        )
      ],
      [band_figure.Edge('edge', 'above this the noise grows', 'k--')],
      ylabel='noise kernel norm K',
      title=config_lib.title(self._config),
    )
    return True

  def summarize(self, lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """The mean over the last third of the steps, see `summarize` of this module."""
    return summarize(lines, step)

  # The norm.

  def _diagonalised(
    self, state: TrainState, step: int, settings: dict[str, Any]
  ) -> curvature.Estimate:
    del step
    (batch,) = self._batches()
    params = curvature_params(state.params)
    kernel = self._kernel(params, state.batch_stats, batch['inputs'])
    kernel = np.asarray(kernel, np.float64)
    if not np.isfinite(kernel).all():
      raise curvature.NonFiniteError('the tangent kernel is not finite')
    train, scale = self._problem.train, self._squared.second_derivative
    values = np.linalg.eigvalsh(kernel) * scale / train.num_examples
    value = library.noise_kernel_norm_of_spectrum(
      values,
      num_examples=train.num_examples,
      num_outputs=self._squared.num_outputs,
      **settings,
    )
    return curvature.Estimate(value, 0.0, 0)

  def _estimated(
    self, state: TrainState, step: int, settings: dict[str, Any]
  ) -> curvature.Estimate:
    # Probes of each step are others, so that the mean over steps is more precise.
    key = jax.random.fold_in(jax.random.key(self._config.seed), step)
    return library.noise_kernel_norm(
      self._outputs,
      self._loss,
      curvature_params(state.params),
      [{**batch, 'batch_stats': state.batch_stats} for batch in self._batches()],
      weight=problem_lib.num_examples,
      key=key,
      **_ESTIMATE,
      **settings,
    )

  def _kernel_of(self, params, batch_stats, inputs):
    return tangent_kernel.of_dense_layers(
      self._problem.model, params, batch_stats, inputs
    )

  def _batches(self) -> list[Batch]:
    """The training split, on the device."""
    if not self._placed:
      self._placed = jax.device_put(list(self._examples.epoch(0)))
    return self._placed

  def _outputs(self, params: Any, batch: Batch) -> jax.Array:
    stats = batch['batch_stats']
    return problem_lib.outputs(self._problem.model, params, stats, batch['inputs'])[0]

  def _loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    rest = {name: x for name, x in batch.items() if name != 'batch_stats'}
    return problem_lib.mean(self._problem.example_losses(outputs, rest), rest)

  def _squared_error(self) -> library.SquaredError:
    """What the loss is made of, told by a few examples and any parameters."""
    variables = self._problem.variables()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
    batch = next(iter(self._problem.train.batches(2).epoch(0)))
    batch = {**batch, 'batch_stats': zeros.get('batch_stats', {})}
    try:
      return library.squared_error(
        self._outputs,
        self._loss,
        zeros['params'],
        [batch],
        weight=problem_lib.num_examples,
      )
    except ValueError as error:
      if 'squared error' not in str(error):
        raise
      raise UsageError(
        f'--track={NAME}: the loss of --task={self._config.task} is not a squared '
        'error, for which alone the noise kernel norm is defined; track '
        'batch_sharpness, which is defined for any loss.'
      ) from error


def _momentum(config: Config) -> float:
  return config.momentum if config.base_optimizer == 'momentum' else 0.0


def summarize(lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
  """Numbers of a run from the lines of the tracker.

  Args:
    lines: by step.
    step: the run's last.

  Returns:
    The mean over the last third of the steps of the norm, whose edge is 1, where it is
    finite and the learning rate is not 0, `mean_noise_kernel_norm`, with the half-width
    of its 95 % interval, `..._interval`, of the means of consecutive blocks
    (`blocks.late_mean`); the share of that third's lines in which it is infinite; and
    the number of lines.
  """
  values = [
    (line['step'], line['noise_kernel_norm'])
    for line in lines
    # At a learning rate of 0 nothing moves, and the norm is 0 whatever the network.
    if line['noise_kernel_norm'] is not None and line['learning_rate']
  ]
  mean, interval = blocks.late_mean(values, step)
  infinite = [(line['step'], float(line['infinite'])) for line in lines]
  text = ''
  if mean is not None:
    text = f'mean of the last third: K {blocks.show(mean, interval)}'
  return {
    'measured': len(lines),
    'mean_noise_kernel_norm': mean,
    'mean_noise_kernel_norm_interval': interval,
    'share_infinite': blocks.late_mean(infinite, step)[0],
    'text': text,
  }


def track(problem: Problem, config: Config, every: int = 0) -> Noise:
  r"""The noise kernel norm of a run, tracked while it trains; a hook of the loop.

  .. math:: K = \frac1C \Big(\frac1B - \frac1D\Big) \sum_a
            \frac{1 + \beta}{1 - \beta}
            \frac{\eta l_a}{2 (1 + \beta) - \eta l_a}

  over the whole training split, at the batch size of the run, the learning rate of the
  step that comes, and the momentum :math:`\beta`, 0 for plain SGD. A network of dense
  layers with at most `EXACT_UP_TO` outputs over all examples has its tangent kernel
  diagonalised; otherwise top eigenvalues are exact and the rest is estimated, with the
  standard error of four random probes. All is in evaluation mode, without weight decay,
  in float32 or wider.

  Args:
    problem: what is trained, with a squared error.
    config: the run's.
    every: steps between measurements; 0 is the end of each epoch.

  Raises:
    UsageError: the arguments, a loss that is not a squared error, or another optimizer
      than SGD with or without momentum.

  References:
    Agarwala and Pennington, High dimensional analysis reveals conservative sharpening
    and a stochastic edge of stability, arXiv 2404.19261.
  """
  check(config, every)
  return Noise(problem, config, every)


def check(config: Config, every: int = 0) -> None:
  """Checks the arguments of `track` as far as that needs no data.

  Raises:
    UsageError: an argument, or a method of which it says nothing.
  """
  edges.check_every(every)
  if config.optimizer not in ('sgd', 'momentum'):
    raise UsageError(
      f'--track={NAME}: the noise kernel norm is known of --optimizer=sgd and '
      f'momentum, not of {config.optimizer}; leave noise out.'
    )
