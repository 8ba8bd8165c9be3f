"""What a task hands to the training loop."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Batch = dict[str, Any]  # inputs (B, ...), labels int32 (B,), weights float32 (B,)


class Batches(Protocol):
  """Batches in an order that is a pure function of (seed, epoch)."""

  @property
  def steps_per_epoch(self) -> int: ...

  def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...

  # Which examples the batches hold, -1 for an empty slot, and the batch of some.
  def steps(self, epoch: int, start: int = 0) -> Sequence[np.ndarray]: ...

  def collate(self, indices: np.ndarray) -> Batch: ...


class Split(Protocol):
  """The training or the test half of a data set."""

  @property
  def num_examples(self) -> int: ...

  # Inputs and labels, of which batches are rows; None where they are not.
  @property
  def arrays(self) -> Batch | None: ...

  def batches(
    self, batch_size: int, *, shards: tuple[int, ...] = (), seed: int | None = None
  ) -> Batches: ...


class Workload(NamedTuple):
  """A model with its data.

  Attributes:
    model: a `flax.linen.Module` with ``apply(variables, inputs, train=bool)`` ->
      logits (B, num_classes).
    train: the training split.
    test: the test split.
    num_classes: number of classes.
    example_inputs: the 'inputs' of one batch, for the model's initialisation.
    augment: ``augment(key, inputs) -> inputs`` of any leading axes, pure, part of each
      training step; None for none.
    class_names: names of the classes; by default their numbers.
  """

  model: Any
  train: Split
  test: Split
  num_classes: int
  example_inputs: Any
  augment: Callable[[Any, Any], Any] | None = None
  class_names: Sequence[str] = ()
