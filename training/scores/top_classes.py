"""Classification among many classes: whether the label is among the first few."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training.problem import Batch, Score
from training.scores import calibration


@dataclasses.dataclass(frozen=True)
class TopClasses:
  """Scores of logits (B, C) against int labels (B,), C so large that no table is made.

  Attributes:
    num_classes: C.
    class_names: by default the numbers of the classes.
    first: how many classes of the largest logits count as found.
  """

  num_classes: int
  class_names: tuple[str, ...] = ()
  first: int = 5

  main = Score('accuracy', 'accuracy', 100, '%')

  def of_examples(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """1 where the largest logit is the label's, else 0, (B,)."""
    correct = jnp.argmax(outputs, axis=-1) == batch['labels']
    return correct.astype(batch['weights'].dtype)

  def totals(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Sums by class, (C,), and those of the calibration.

    Args:
      outputs: float (B, C), logits.
      batch: int 'labels' (B,) and 'weights' (B,).

    Returns:
      `examples`, total weight, `right`, that recognised, `among_first`, that among the
      first few, and what `calibration.totals` gives.
    """
    labels, weights = batch['labels'], batch['weights']
    own = jnp.take_along_axis(outputs, labels[:, None], axis=-1)
    # A class of an equal logit and a smaller number comes first, as with argmax.
    number = jnp.arange(outputs.shape[-1])[None]
    before = (outputs > own) | ((outputs == own) & (number < labels[:, None]))
    place = jnp.sum(before, axis=-1)
    nothing = jnp.zeros(self.num_classes, weights.dtype)
    by_class = {
      name: nothing.at[labels].add(weights * (place < limit))
      for name, limit in (
        ('examples', self.num_classes),
        ('right', 1),
        ('among_first', self.first),
      )
    }
    return {**by_class, **calibration.totals(outputs, batch)}

  def summarize(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy among the first few, recalls, their mean, and the calibration."""
    examples, right = totals['examples'], totals['right']
    recalls = [
      float(r / n) if n else None for r, n in zip(right, examples, strict=True)
    ]
    known = [recall for recall in recalls if recall is not None]
    names = self.class_names or tuple(map(str, range(self.num_classes)))
    total = float(examples.sum())
    return {
      f'top_{self.first}_accuracy': float(totals['among_first'].sum()) / total,
      'balanced_accuracy': sum(known) / len(known),
      'recalls': dict(zip(names, recalls, strict=True)),
      'calibration': calibration.summarize(totals),
    }

  def describe(self, found: dict[str, Any]) -> str:
    """The accuracy among the first few."""
    return f'top-{self.first} {100 * found[f"top_{self.first}_accuracy"]:.2f} %'

  def draw(self, folder: pathlib.Path, found: dict[str, Any], title: str) -> None:
    """Draws nothing: a table of so many classes cannot be read."""
    del folder, found, title
