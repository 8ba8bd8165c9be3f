"""Classification: label-smoothed losses, accuracy, and scores of each class."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training.problem import Batch, Score
from training.scores import calibration

FILE_NAME = 'confusion.png'
# Above these numbers of classes a picture has no room for counts, and for names.
_MAX_WRITTEN, _MAX_NAMED = 20, 60


@dataclasses.dataclass(frozen=True)
class Classification:
  """Scores of outputs (B, C) against int labels (B,).

  Attributes:
    num_classes: C.
    class_names: by default the numbers of the classes.
    logits: whether the softmax of the outputs are probabilities, whose calibration is
      measured; False where the network is trained on squared errors.
  """

  num_classes: int
  class_names: tuple[str, ...] = ()
  logits: bool = True

  main = Score('accuracy', 'accuracy', 100, '%')

  def of_examples(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """1 where the largest logit is the label's, else 0, (B,)."""
    correct = jnp.argmax(outputs, axis=-1) == batch['labels']
    return correct.astype(batch['weights'].dtype)

  def totals(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The confusion matrix, and the sums of the calibration.

    Args:
      outputs: float (B, C).
      batch: int 'labels' (B,) and 'weights' (B,).

    Returns:
      `confusion`, total weight by true class (rows) and predicted class (columns), (C,
      C), and of logits what `calibration.totals` gives.
    """
    cell = batch['labels'] * self.num_classes + jnp.argmax(outputs, axis=-1)
    counts = jnp.zeros(self.num_classes**2, batch['weights'].dtype)
    counts = counts.at[cell].add(batch['weights'])
    confusion = counts.reshape(self.num_classes, self.num_classes)
    more = calibration.totals(outputs, batch) if self.logits else {}
    return {'confusion': confusion, **more}

  def summarize(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
    """Recall, precision and F1 of each class, their means, and the calibration."""
    found = scores(totals['confusion'], self.class_names)
    if self.logits:
      found['calibration'] = calibration.summarize(totals)
    return found

  def describe(self, found: dict[str, Any]) -> str:
    """The macro F1, and the calibration error beside what chance makes of it."""
    text = f'macro F1 {found["macro_f1"]:.4f}'
    if error := found.get('calibration'):
      text += (
        f'; calibration error {error["ece"]:.4f} (by chance '
        f'{error["ece_by_chance"]:.4f})'
      )
    return text

  def draw(self, folder: pathlib.Path, found: dict[str, Any], title: str) -> None:
    """Draws `confusion.png`."""
    draw(folder, found, title)


def smoothed_kl(
  label_smoothing: float,
) -> Callable[[jax.Array, Batch], jax.Array]:
  r"""The losses of a `Problem`: KL divergence from label-smoothed targets.

  .. math:: \sum_c t_c (\log t_c - \log p_c), \quad
            t = (1 - s) \text{ on the label},\; s / (C - 1) \text{ elsewhere}

  Args:
    label_smoothing: s, in [0, 1); 0 is cross-entropy.

  Returns:
    ``example_losses(logits, batch)`` of float (B, C) and int labels (B,) -> float (B,),
    in nats; 0 where the model gives exactly the target.

  >>> import jax.numpy as jnp
  >>> logits = jnp.log(jnp.array([[0.9, 0.05, 0.05]]))
  >>> loss = smoothed_kl(0.1)(logits, {'labels': jnp.array([0])})
  >>> abs(round(float(loss[0]), 6))
  0.0
  """
  return functools.partial(_smoothed_kl, label_smoothing)


def _smoothed_kl(smoothing: float, logits: jax.Array, batch: Batch) -> jax.Array:
  num_classes = logits.shape[-1]
  log_probs = jax.nn.log_softmax(logits)
  off_target = smoothing / (num_classes - 1)
  targets = jnp.where(
    batch['labels'][:, None] == jnp.arange(num_classes)[None, :],
    1 - smoothing,
    off_target,
  ).astype(log_probs.dtype)
  entropy_terms = jnp.where(targets > 0, targets * jnp.log(targets), 0)
  return jnp.sum(entropy_terms - targets * log_probs, axis=-1)


def one_hot_error(factor: float) -> Callable[[jax.Array, Batch], jax.Array]:
  r"""The losses of a `Problem`: squared distance of the outputs from one-hot targets.

  .. math:: c \sum_k (f_k - [k = y])^2

  Args:
    factor: c; 1/C is the mean over the C outputs, 1/2 half the squared distance.

  Returns:
    ``example_losses(outputs, batch)`` of float (B, C) and int labels (B,) -> (B,).

  >>> import jax.numpy as jnp
  >>> outputs, batch = jnp.array([[0.0, 3.0]]), {'labels': jnp.array([1])}
  >>> float(one_hot_error(1 / 2)(outputs, batch)[0])
  2.0
  """
  return functools.partial(_one_hot_error, factor)


def _one_hot_error(factor: float, outputs: jax.Array, batch: Batch) -> jax.Array:
  targets = jax.nn.one_hot(batch['labels'], outputs.shape[-1], dtype=outputs.dtype)
  return factor * jnp.sum((outputs - targets) ** 2, axis=-1)


def scores(confusion: np.ndarray, names: Sequence[str] = ()) -> dict[str, Any]:
  """Scores of a confusion matrix.

  Recall is the share of a class's examples that are recognised, precision the share of
  what is taken for a class that belongs to it, F1 their harmonic mean
  2 TP / (2 TP + FP + FN). A ratio without a denominator is None and left out of the
  means, which weigh every class the same.

  Args:
    confusion: (C, C) counts, a row for each true class, a column for each predicted.
    names: of the classes; by default their numbers.

  Returns:
    `macro_f1`, `balanced_accuracy` (the mean recall) and `classes`: for each its
    `name`, `examples`, `recall`, `precision`, `f1` and `predicted`, its row.

  >>> import numpy as np
  >>> found = scores(np.array([[8, 2], [0, 2]]), ['common', 'rare'])
  >>> found['balanced_accuracy'], found['classes'][1]['precision']
  (0.9, 0.5)
  """
  counts = np.rint(np.asarray(confusion)).astype(int)
  names = list(names) or [str(label) for label in range(len(counts))]
  right, true, taken = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
  classes = [
    {
      'name': name,
      'examples': int(true[label]),
      'recall': _ratio(right[label], true[label]),
      'precision': _ratio(right[label], taken[label]),
      'f1': _ratio(2 * right[label], true[label] + taken[label]),
      'predicted': counts[label].tolist(),
    }
    for label, name in enumerate(names)
  ]
  return {
    'macro_f1': _mean(found['f1'] for found in classes),
    'balanced_accuracy': _mean(found['recall'] for found in classes),
    'classes': classes,
  }


def draw(folder: pathlib.Path, found: dict[str, Any], title: str) -> None:
  """Draws the confusion matrix of `scores`, each row as shares of its class."""
  from matplotlib.figure import Figure  # Slow to import, and needed once a run.

  classes = found['classes']
  counts = np.array([entry['predicted'] for entry in classes])
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  size = 2.6 + 0.42 * min(len(classes), _MAX_WRITTEN)
  figure = Figure(figsize=(size + 0.8, size), layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  figure.colorbar(image, label='share of the true class', shrink=0.8)
  if len(classes) <= _MAX_NAMED:
    names = [entry['name'] for entry in classes]
    small = {} if len(classes) <= _MAX_WRITTEN else {'fontsize': 5}
    axes.set_xticks(range(len(names)), names, rotation=45, ha='right', **small)
    axes.set_yticks(range(len(names)), names, **small)
  if len(classes) <= _MAX_WRITTEN:
    for (row, column), count in np.ndenumerate(counts):
      colour = 'white' if shares[row, column] > 0.5 else 'black'
      axes.text(column, row, count, color=colour, ha='center', va='center', fontsize=8)
  axes.set(xlabel='predicted class', ylabel='true class', title=title)
  with warnings.catch_warnings():
    # Names in scripts that the font lacks become boxes; summary.json has them.
    warnings.filterwarnings('ignore', 'Glyph .* missing')
    figure.savefig(folder / FILE_NAME, dpi=160)


def _ratio(part: int, whole: int) -> float | None:
  return float(part / whole) if whole else None


def _mean(values) -> float | None:
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if known else None
