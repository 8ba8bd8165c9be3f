"""The loss whose curvature is measured, as functions of the parameters and a batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training import problem as problem_lib
from training.errors import UsageError
from training.meshes import MeshParallel
from training.problem import Batch, Problem

SPLITS = ('train', 'test')


class Objective:
  """A problem's loss under some options, and its examples on the device.

  The functions hold neither parameters nor batch statistics; those stand in the batch,
  under 'batch_stats'. One object serves every network of a problem, so that each
  function is compiled once.

  Attributes:
    problem: what was trained.
    options: what is measured.
    mesh: over which parameters and examples are split; None for one device.
  """

  def __init__(self, problem: Problem, options: Any, mesh: MeshParallel | None = None):
    self.problem = problem
    self.options = options
    self.mesh = mesh
    self._drawn: dict[tuple[str, int, int], list[Batch]] = {}
    model = problem.model
    if options.batch_norm == 'train' and hasattr(model, 'dropout_rate'):
      model = model.clone(dropout_rate=0.0)
    self._measured = problem._replace(model=model)

  def loss(self, params: Any, batch: Batch) -> jax.Array:
    """The mean loss of a batch."""
    return self._evaluated(params, batch)[0]

  def outputs(self, params: Any, batch: Batch) -> jax.Array:
    """The outputs, in the batch-norm mode of the options."""
    return self._evaluated(params, batch)[1].outputs

  def weighted_losses(self, params: Any, batch: Batch) -> jax.Array:
    """The loss of each example, (B,); 0 for padding."""
    return batch['weights'] * self._evaluated(params, batch)[1].losses

  def losses_of_outputs(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """The loss of each example as a function of the outputs, (B,)."""
    return self.problem.example_losses(outputs, _parted(batch)[1])

  def loss_of_outputs(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """The mean loss of a batch as a function of the outputs."""
    return problem_lib.mean(self.losses_of_outputs(outputs, batch), batch)

  def _evaluated(self, params, batch):
    batch_stats, batch = _parted(batch)
    train = self.options.batch_norm == 'train' and bool(batch_stats)
    # Sharpness is that of the loss in full precision, whatever training computed in.
    return problem_lib.loss(
      self._measured, params, batch_stats, batch, train=train, key=jax.random.key(0)
    )

  def examples(self, split: str, batch_size: int, count: int) -> list[Batch]:
    """Batches of a split in its order, or of some of its examples at random.

    Args:
      split: 'train' or 'test'.
      batch_size: examples a batch.
      count: number of examples, drawn by the seed of the options; 0 is all.

    Raises:
      UsageError: there are none, or fewer.
    """
    what = split, batch_size, count
    if what not in self._drawn:
      place = self.mesh.place if self.mesh else jax.device_put
      self._drawn[what] = [place(batch) for batch in self._draw(*what)]
    return self._drawn[what]

  def _draw(self, split: str, batch_size: int, count: int) -> Iterator[Batch]:
    examples = getattr(self.problem, split)
    if not examples.num_examples:
      raise UsageError(f'the {split} split is empty: there is nothing to average over.')
    if count > examples.num_examples:
      raise UsageError(
        f'--num_examples={count}: the {split} split has {examples.num_examples}; give '
        'at most that, or 0 for all.'
      )
    seed = self.options.seed if count else None
    left = count or examples.num_examples
    for batch in examples.batches(batch_size, seed=seed).epoch(0):
      weights = np.array(batch['weights'])
      # The examples too many in the last batch keep their place, without weight.
      weights[np.cumsum(weights) > left] = 0
      left -= weights.sum()
      yield cast({**batch, 'weights': weights}, self.options.dtype)
      if left <= 0:
        return


def _parted(batch: Batch) -> tuple[Any, Batch]:
  """A batch's statistics, and the batch as the problem knows it."""
  rest = dict(batch)
  return rest.pop('batch_stats', {}), rest


@functools.partial(jax.jit, static_argnums=0)
def example_scores(
  objective: Objective, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Loss and main score of each example in evaluation mode, (B,) each."""
  batch_stats, batch = _parted(batch)
  found = problem_lib.loss(objective.problem, params, batch_stats, batch)[1]
  return found.losses, objective.problem.scores.of_examples(found.outputs, batch)


@functools.partial(jax.jit, static_argnums=0)
def example_curvatures(
  objective: Objective, params: Any, direction: Any, batch: Batch
) -> jax.Array:
  """What each example adds to the product direction . A direction, (B,)."""
  operator = objective.options.operator

  def outputs(t):
    moved = jax.tree.map(lambda p, d: p + t * d, params, direction)
    return objective.outputs(moved, batch)

  zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
  one = jnp.ones_like(zero)
  if operator == 'gauss_newton':
    # The loss is curved, the network is replaced by its tangent.
    value, tangent = jax.jvp(outputs, (zero,), (one,))
    along = lambda t: objective.losses_of_outputs(value + t * tangent, batch)
  else:
    along = lambda t: objective.losses_of_outputs(outputs(t), batch)
  slope = lambda t: jax.jvp(along, (t,), (one,))[1]
  if operator == 'fisher':
    return slope(zero) ** 2
  return jax.jvp(slope, (zero,), (one,))[1]


def of_examples(parts: list[jax.Array], batches: list[Batch]) -> np.ndarray:
  """Values of the batches' real examples, float64 (num_examples,)."""
  return np.concatenate(
    [
      np.asarray(part, np.float64)[np.asarray(batch['weights']) > 0]
      for part, batch in zip(parts, batches, strict=True)
    ]
  )


def cast(tree: Any, dtype: str) -> Any:
  """Floating-point leaves in a type, on the host."""
  return jax.tree.map(
    lambda leaf: (
      np.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )


def width(params: Any) -> str:
  """The type in which a network is measured while it is trained."""
  wide = any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(params))
  return 'float64' if wide else 'float32'
