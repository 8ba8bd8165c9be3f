"""The edge of stability while a network trains: sharpness, edges, alignments."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from measurements import edges_figure
from measurements.edges_program import ADAMS, Found, Program, num_ascent_steps, stacked
from sam_jax import curvature
from sam_jax.measuring.entries import plain
from training import config as config_lib
from training import methods, microbatches, optimizers
from training.config import Config
from training.errors import UsageError
from training.hooks import Hook
from training.problem import Batch, Problem
from training.step import TrainState

NAME = 'edges'
FILE_NAME = 'edges.png'
_SPLITS = ('batch', 'train')
# Residual of the top eigenpair over its eigenvalue, at which a search ends.
_TOL = 5e-3
# Gradients that a product costs: with what it repeats kept, and without.
_KEPT, _REPEATED = 2, 3


class Edges(Hook):
  """Tracks sharpness against the edges of stability; see `track`.

  Attributes:
    name: 'edges'.
  """

  name = NAME

  def __init__(
    self, problem: Problem, config: Config, every: int, on: str, share: float
  ):
    """Takes what `track` has checked."""
    self._problem, self._config = problem, config
    self._every, self._on, self._share = every, on, share
    # No more examples at once than a step takes.
    self._at_once = config.batch_size // config.grad_accum_steps
    batches = problem.train.batches(config.batch_size, seed=config.seed)
    self._batches, self._steps_per_epoch = batches, batches.steps_per_epoch
    self._program = Program(problem, config, self._steps_per_epoch, _TOL)
    self._adam = config.base_optimizer in ADAMS
    self._num_blocks = 2 if self._adam else 1
    self._fixed = self._fixed_examples()
    self.recall({})

  def due(self, step: int, steps_per_epoch: int) -> bool:
    """Whether a number of steps is a multiple, and the share allows it.

    The share is that of gradients, each over its examples, so that a run which was
    killed and started again measures at the same steps.
    """
    if step % (self._every or steps_per_epoch):
      return False
    if not self._share or not step:
      return True
    then = self._spent + self._last
    return then <= self._share * (then + step * self._cost_of_step())

  def __call__(self, state: TrainState, step: int) -> dict[str, Any]:
    """Measures the network as the next step finds it."""
    batches = self._examples(step)
    if self._blocks is None:
      self._blocks = (self._program.cold(state.params),) * self._num_blocks
    scale = self._scale(state, step)
    found, self._blocks = self._program(state, batches, self._blocks, scale)
    found = jax.device_get(found)
    self._count(found, batches)
    return plain(self._line(found, step))

  def check(self, lines: Sequence[dict[str, Any]]) -> None:
    """Refuses to go on from lines over other examples."""
    check_lines(lines, self._on)

  def memory(self) -> dict[str, np.ndarray]:
    """The blocks from which the next search starts, and the gradients spent."""
    if self._blocks is None:
      return {}
    blocks = {f'block/{number}': x for number, x in enumerate(self._blocks)}
    return {**blocks, 'spent': np.array([self._spent, self._last])}

  def recall(self, memory: dict[str, np.ndarray]) -> None:
    """Takes them back; blocks of another network or number are not used."""
    self._spent, self._last = memory.get('spent', np.zeros(2)).tolist()
    self._blocks = None
    if not memory:
      return
    like = jax.eval_shape(self._program.cold, self._problem.variables()['params'])
    found = [memory.get(f'block/{number}') for number in range(self._num_blocks)]
    if all(np.shape(block) == like.shape for block in found):
      self._blocks = tuple(jax.device_put(found))

  def draw(self, workdir: pathlib.Path, lines: Sequence[dict[str, Any]]) -> bool:
    """Draws `edges.png`, whole or not at all."""
    title = config_lib.title(self._config)
    edges_figure.save(workdir / FILE_NAME, lines, title)
    return True

  def summarize(self, lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """Medians over the last third of the steps, see `summarize` of this module."""
    return summarize(lines, step)

  # Examples.

  def _fixed_examples(self) -> Batch | None:
    """The examples of every call, on the device; None if each has a batch of its own.

    Raises:
      UsageError: several batches that do not make a stack.
    """
    train, size = self._problem.train, self._at_once
    if self._on == 'batch' and self._steps_per_epoch > 1:
      return None
    if self._on in _SPLITS:
      found = list(train.batches(size).epoch(0))
    else:
      found = self._drawn(int(self._on))
    whole = stacked(found)
    if whole is None:
      raise UsageError(
        f'--track_on={self._on}: the examples are graphs, whose batches differ in '
        f'shape; give batch, or a number up to --batch_size={size}.'
      )
    return jax.device_put(whole)

  def _drawn(self, count: int) -> list[Batch]:
    """Batches of some examples, drawn by the seed."""
    size = min(count, self._at_once)
    found = []
    for batch in self._problem.train.batches(size, seed=self._config.seed).epoch(0):
      weights = np.array(batch['weights'])
      weights[np.cumsum(weights) > count] = 0
      found.append({**batch, 'weights': weights})
      count -= int(weights.sum())
      if not count:
        break
    return found

  def _examples(self, step: int) -> Batch:
    """The fixed examples, or those of the step that comes."""
    if self._fixed is not None:
      return self._fixed
    epoch, start = divmod(step, self._steps_per_epoch)
    batch = next(iter(self._batches.epoch(epoch, start)))
    # At least an example each: nothing has a mean over none.
    num = min(self._config.grad_accum_steps, int(batch['weights'].sum()))
    return microbatches.split(batch, num) if num > 1 else batch

  # Cost, in gradients times examples.

  def _cost_of_step(self) -> float:
    return self._config.batch_size * gradients_of_step(self._config)

  def _count(self, found: Found, batches: Batch) -> None:
    weights = batches['weights']
    product = _REPEATED if weights.ndim > 1 else _KEPT
    gradients = gradients_of_step(self._config) + product * int(found.num_matvecs)
    self._last = float(gradients * weights.size)
    self._spent += self._last

  def _scale(self, state: TrainState, step: int) -> Any:
    """What Adam divides by, to the power -1/2; ones before the first step."""
    if not self._adam:
      return None
    if not step:
      return jax.tree.map(np.ones_like, state.params)
    return curvature.adam_preconditioner(state.opt_state)

  # Lines.

  def _line(self, found: Found, step: int) -> dict[str, Any]:
    eigenvalue = float(found.eigenvalue)
    line = {
      'on': self._on,
      # Where the largest by size is negative nothing is known of the largest.
      'lambda_max': eigenvalue if eigenvalue >= 0 else None,
      'operator_norm': abs(eigenvalue),
      'eigenvalue': eigenvalue,
      'residual': float(found.residual),
      'converged': bool(found.converged),
      'edge': float(found.edge),
      'sam_edge': float(found.sam_edge),
      'gradient_norm': float(found.gradient_norm),
      'loss': float(found.loss),
      'learning_rate': float(found.learning_rate),
      'rho': float(found.rho),
      'gradient_alignment': float(found.gradient_alignment),
      'update_alignment': float(found.update_alignment),
      'num_matvecs': int(found.num_matvecs),
    }
    if found.scaled is not None:
      value, residual = found.scaled if step else (None, None)
      line['preconditioned_lambda_max'] = value if value is None else float(value)
      line['preconditioned_residual'] = value if value is None else float(residual)
    return line


def gradients_of_step(config: Config) -> int:
  """Gradients that a step takes: with a method those of its ascent and one more."""
  return 1 + num_ascent_steps(config) if methods.is_method(config.optimizer) else 1


def summarize(lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
  """Numbers of a run from the lines of the tracker.

  Args:
    lines: by step.
    step: the run's last.

  Returns:
    Medians over the last third of the steps, `median_...`, of the ratios of lambda_max
    (with Adam of the preconditioned Hessian's) to the edges, of their distances from 1,
    and of the alignments; the largest ratio of the run; the largest residual over its
    eigenvalue; and the number of lines and of products. What was never measured is
    None.
  """
  last = [line for line in lines if 3 * line['step'] >= 2 * step]

  def ratios(chosen, edge):
    return [
      _sharpness(line) / line[edge]
      for line in chosen
      if _sharpness(line) is not None and line[edge]
    ]

  def alignments(name):
    return [line[name] for line in last if line[name] is not None]

  found = {'measured': len(lines), 'num_matvecs': sum(x['num_matvecs'] for x in lines)}
  for edge in ('edge', 'sam_edge'):
    late = ratios(last, edge)
    found[f'median_lambda_over_{edge}'] = _median(late)
    found[f'median_distance_from_{edge}'] = _median([abs(x - 1) for x in late])
    found[f'max_lambda_over_{edge}'] = max(ratios(lines, edge), default=None)
  for name in ('gradient_alignment', 'update_alignment'):
    found[f'median_{name}'] = _median(alignments(name))
  found['max_relative_residual'] = max(
    (
      line['residual'] / line['operator_norm']
      for line in lines
      if line['operator_norm'] and line['residual'] is not None
    ),
    default=None,
  )
  return {**found, 'text': _text(found)}


def _sharpness(line: dict[str, Any]) -> float | None:
  """What is compared with the edges."""
  return line.get('preconditioned_lambda_max', line['lambda_max'])


def _median(values: Sequence[float]) -> float | None:
  return float(np.median(values)) if values else None


def _text(found: dict[str, Any]) -> str:
  """The medians in a few words."""
  words = [
    (f'lambda_max / {name}', found[f'median_lambda_over_{edge}'])
    for name, edge in (('edge', 'edge'), ('SAM-edge', 'sam_edge'))
  ]
  words += [
    (f'alignment of the {name}', found[f'median_{name}_alignment'])
    for name in ('gradient', 'update')
  ]
  told = [f'{name} {value:.3f}' for name, value in words if value is not None]
  return f'medians of the last third: {", ".join(told)}' if told else ''


def track(
  problem: Problem, config: Config, every: int = 0, on: str = 'batch', share: float = 0
) -> Edges:
  r"""The edge of stability of a run, tracked while it trains; a hook of the loop.

  At :math:`w_t`, before step t + 1 is taken, it measures over the same examples the
  loss, the clean gradient, the eigenvalue of the Hessian of the largest absolute value
  with its residual, what the method hands to its base optimizer (for SAM the
  gradient at w + eps-hat) and the :math:`|\cos|` of both gradients with the top
  eigenvector, and gives the edges that belong to the learning rate, the radius and the
  gradient norm of that step. All is that of the loss in evaluation mode, without
  augmentation and without weight decay, in float32 or wider. A search starts from the
  vectors of the one before, which a checkpoint keeps.

  Args:
    problem: what is trained.
    config: the run's.
    every: steps between measurements; 0 is the end of each epoch.
    on: 'batch', the examples of the step that comes; 'train', the whole training split;
      or a number of its examples, drawn once by the seed.
    share: largest share of the gradients of a run that may be spent on it, estimated
      from the number of products; measurements come more seldom then. 0: no bound.

  Raises:
    UsageError: the arguments, or a method whose steps have no such edge.

  References:
    Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of
    Stability, arXiv 2103.00065; Long and Bartlett, Sharpness-Aware Minimization and the
    Edge of Stability, arXiv 2309.12488.
  """
  check(config, every, on, share)
  if on not in _SPLITS and int(on) > problem.train.num_examples:
    raise UsageError(
      f'--track_on={on}: the training split has {problem.train.num_examples} '
      'examples; give at most that, or train for all.'
    )
  return Edges(problem, config, every, on, share)


def check_every(every: int) -> None:
  """Refuses a number of steps between measurements that is negative."""
  if every < 0:
    raise UsageError(f'--track_every={every}: must not be negative.')


def check(config: Config, every: int = 0, on: str = 'batch', share: float = 0) -> None:
  """Checks the arguments of `track` as far as that needs no data.

  Raises:
    UsageError: an argument, or a method whose steps have no such edge.
  """
  check_every(every)
  if not 0 <= share < 1:
    raise UsageError(f'--track_share={share:g}: must be at least 0 and below 1.')
  if on not in _SPLITS and not (on.isascii() and on.isdecimal() and int(on)):
    raise UsageError(
      f'--track_on={on}: give batch, train, or a number of training examples.'
    )
  _check_method(config)


def check_lines(lines: Sequence[dict[str, Any]], on: str) -> None:
  """Checks that the lines of a run are over the examples that are asked for.

  Args:
    lines: of the tracker; those that do not tell, of earlier versions, are accepted.
    on: as `track` takes it.

  Raises:
    UsageError: they are over others, and the medians of both would mean nothing.
  """
  for earlier in {line.get('on', on) for line in lines} - {on}:
    raise UsageError(
      f'--track_on={on}: this run was tracked with --track_on={earlier} so far, and '
      'sharpness over other examples is not comparable: give that again, or choose '
      'another --workdir.'
    )


def _check_method(config: Config) -> None:
  if methods.get(config.optimizer) is None:
    return
  start = f'--track={NAME}'
  instead = 'train with --measure=eigenvalues, which tells lambda_max.'
  check_clean_gradient(config, NAME, instead)
  tx, _ = optimizers.descent(config, 1)
  like = {'w': jax.ShapeDtypeStruct((1,), np.float32)}
  state = jax.eval_shape(tx.init, like)
  if 'rho' not in optimizers.recorded(state):
    raise UsageError(
      f'{start}: the state of --optimizer={config.optimizer} holds no rho, the radius '
      f'that its schedule has reached, without which there is no edge; {instead}'
    )


def check_clean_gradient(config: Config, name: str, instead: str) -> None:
  """Refuses methods that do not step from the gradient of a batch at w.

  Args:
    config: the run's, with a method.
    name: of the tracker.
    instead: what the user can do, the end of a sentence.

  Raises:
    UsageError: the method, or its groups.
  """
  traits, start = methods.get(config.optimizer).traits, f'--track={name}'
  if traits.one_gradient:
    raise UsageError(
      f'{start}: --optimizer={config.optimizer} takes no gradient at w, so that its '
      f'norm, its alignment and the edge are not known; {instead}'
    )
  if traits.chooses_examples:
    raise UsageError(
      f'{start}: --optimizer={config.optimizer} descends on examples that it chooses '
      f'in each step, whose edge is not known; {instead}'
    )
  if (config.m_sharpness or config.batch_size) != config.batch_size:
    raise UsageError(
      f'{start}: with --m_sharpness={config.m_sharpness} each group has a gradient '
      f'norm and an edge of its own; leave it out, or {instead}'
    )
