"""What is trained and measured: a model, its data, a loss for each example, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# inputs (B, ...), labels (B, ...), weights float32 (B,): 1 an example, 0 padding.
Batch = dict[str, Any]


class Batches(Protocol):
  """Batches in an order that is a pure function of (seed, epoch)."""

  @property
  def steps_per_epoch(self) -> int: ...

  def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Split(Protocol):
  """The training or the test half of a data set, in memory or streamed.

  The batches of several seeds lie side by side along a leading axis, one of each.
  """

  @property
  def num_examples(self) -> int: ...

  def batches(
    self,
    batch_size: int,
    *,
    shards: tuple[int, ...] = (),
    seed: int | Sequence[int] | None = None,
  ) -> Batches: ...


class LocalBatches(Batches, Protocol):
  """Batches of which a process can make its own shards alone, as of streamed images.

  ``local`` takes a process's part of an array with the axes of the shards. What comes
  is the same as if it were taken of each batch of ``epoch``.
  """

  def local_epoch(
    self, epoch: int, start: int, local: Callable[[np.ndarray], np.ndarray]
  ) -> Iterator[Batch]: ...


class ResidentSplit(Split, Protocol):
  """A split whose batches are rows of arrays, so that devices can make them.

  Its batches also tell which rows they hold: ``indices(epoch, start)``, a sequence of
  int arrays (*shards, slots), -1 for an empty slot.
  """

  @property
  def arrays(self) -> Batch: ...


class Score(NamedTuple):
  """How a number about examples is called and shown.

  Attributes:
    name: its name in the files of a run.
    label: its name for readers.
    scale: shown times this, with `unit` behind.
    unit: '%' for shares.
    higher_is_better: which epoch is the best.
  """

  name: str
  label: str
  scale: float = 1.0
  unit: str = ''
  higher_is_better: bool = True

  def show(self, value: float) -> str:
    """The value for readers, as ``accuracy 98.02 %``."""
    return f'{self.label} {self.format(value)}'

  def format(self, value: float) -> str:
    """The value without its name."""
    digits = 2 if self.unit == '%' else 4
    return f'{self.scale * value:.{digits}f}' + (f' {self.unit}' if self.unit else '')


class Scores(Protocol):
  """What is told of outputs besides the loss; see the folder `scores`.

  Attributes:
    main: the score that is logged at every step and chooses the best epoch.
  """

  main: Score

  def of_examples(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """The main score of each example, (B,); padding may have any."""

  def totals(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Weighted sums over a batch from which `summarize` makes further numbers."""

  def summarize(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
    """Further numbers of a split, from the sums over all its batches; for JSON."""

  def describe(self, found: dict[str, Any]) -> str:
    """The numbers of `summarize` in a few words; '' for none."""

  def draw(self, folder: Any, found: dict[str, Any], title: str) -> None:
    """Draws the numbers of `summarize` into a folder, where there is a picture."""


class Problem(NamedTuple):
  """A model with its data, its loss and its scores: plain values and functions.

  Attributes:
    model: a `flax.linen.Module` with ``apply(variables, inputs, train=bool)`` ->
      outputs, whose leading axis is that of the examples.
    train: the training split.
    test: the test split.
    example_losses: ``example_losses(outputs, batch)`` -> (B,), the loss of each example
      as a function of the model's outputs; padding may have any finite value.
    scores: what is told of outputs besides the loss.
    example_inputs: the 'inputs' of one batch, for the model's initialisation.
    augment: ``augment(key, inputs) -> inputs`` of any leading axes, pure, part of each
      training step; None for none.
    loss_name: the loss and its unit, for readers.
  """

  model: Any
  train: Split
  test: Split
  example_losses: Callable[[jax.Array, Batch], jax.Array]
  scores: Scores
  example_inputs: Any
  augment: Callable[[Any, Any], Any] | None = None
  loss_name: str = 'loss'

  def variables(self) -> Any:
    """Shapes and types of the model's variables, nothing computed."""
    return jax.eval_shape(self.model.init, jax.random.key(0), self.example_inputs)


class Evaluated(NamedTuple):
  """What one pass through the model tells besides the loss.

  Attributes:
    outputs: of the model, in at least float32.
    losses: of each example, (B,).
    batch_stats: as this pass left them.
  """

  outputs: jax.Array
  losses: jax.Array
  batch_stats: Any


def loss(
  problem: Problem,
  params: Any,
  batch_stats: Any,
  batch: Batch,
  *,
  train: bool = False,
  key: Any = None,
  dtype: str = 'float32',
  normalizer: Any = None,
) -> tuple[jax.Array, Evaluated]:
  """The loss of a batch: the one that training minimises and that is measured.

  Args:
    problem: what is trained.
    params: parameters of its model.
    batch_stats: running batch statistics, possibly empty.
    batch: inputs, labels and weights.
    train: whether dropout is on and batch statistics are the batch's own.
    key: typed key of dropout.
    dtype: type of the computation, see `outputs`.
    normalizer: the weighted sum of the losses is divided by this, by default by the
      batch's total weight, which makes it the mean over the examples.

  Returns:
    ``(value, Evaluated)``.
  """
  found, batch_stats = outputs(
    problem.model,
    params,
    batch_stats,
    batch['inputs'],
    train=train,
    key=key,
    dtype=dtype,
  )
  losses = problem.example_losses(found, batch)
  return mean(losses, batch, normalizer), Evaluated(found, losses, batch_stats)


def mean(values: jax.Array, batch: Batch, normalizer: Any = None) -> jax.Array:
  """The mean of (B,) values over a batch's examples, or their sum / normalizer."""
  weights = batch['weights']
  if normalizer is None:
    normalizer = jnp.sum(weights)
  return jnp.sum(weights * values) / normalizer


def num_examples(batch: Batch) -> jax.Array:
  """Number of real examples in a batch: its total weight."""
  return batch['weights'].sum()


def outputs(
  model: Any,
  params: Any,
  batch_stats: Any,
  inputs: Any,
  *,
  train: bool = False,
  key: Any = None,
  dtype: str = 'float32',
) -> tuple[jax.Array, Any]:
  """Runs a model; its batch statistics may be empty.

  Args:
    model: a flax.linen module.
    params: float32 parameters.
    batch_stats: running batch statistics.
    inputs: a batch's inputs.
    train: whether dropout is on and batch statistics are the batch's own.
    key: typed key of dropout.
    dtype: 'bfloat16' casts parameters and inputs for the computation only.

  Returns:
    The outputs in at least float32 and, with ``train=True``, the updated statistics.
  """
  if dtype != 'float32':
    params, inputs = cast(params, dtype), cast(inputs, dtype)
  variables = {'params': params}
  if batch_stats:
    variables['batch_stats'] = batch_stats
  if train:
    found, updated = model.apply(
      variables, inputs, train=True, rngs={'dropout': key}, mutable=['batch_stats']
    )
    batch_stats = updated.get('batch_stats', batch_stats)
  else:
    found = model.apply(variables, inputs, train=False)
  return found.astype(jnp.promote_types(found.dtype, jnp.float32)), batch_stats


def cast(tree: Any, dtype: Any) -> Any:
  """Casts floating-point leaves; indices, counts and keys stay."""
  return jax.tree.map(
    lambda leaf: (
      leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )
