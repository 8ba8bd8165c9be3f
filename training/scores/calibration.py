"""Whether the probabilities of a classifier are what it gets right."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training.problem import Batch

NUM_BINS = 15


def totals(outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
  """Sums over the examples of a batch.

  Args:
    outputs: float (B, C), logits.
    batch: int 'labels' (B,) and 'weights' (B,).

  Returns:
    `nll` and `brier`, and `bins` (15, 4): for each bin of equal width of the largest
    probability p the sums of the weights, of p, of correct answers, and of p (1 - p).
  """
  weights = batch['weights']
  log_probs = jax.nn.log_softmax(outputs)
  probs = jnp.exp(log_probs)
  right = batch['labels'][:, None] == jnp.arange(outputs.shape[-1])[None]
  nll = -jnp.sum(jnp.where(right, log_probs, 0), axis=-1)
  brier = jnp.sum((probs - right) ** 2, axis=-1)
  largest = jnp.max(probs, axis=-1)
  correct = jnp.argmax(outputs, axis=-1) == batch['labels']
  columns = [jnp.ones_like(largest), largest, correct, largest * (1 - largest)]
  # The upper edge of a bin is its own.
  number = jnp.clip(jnp.ceil(largest * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
  bins = jnp.zeros((NUM_BINS, 4), weights.dtype)
  rows = weights[:, None] * jnp.stack(columns, axis=-1)
  return {
    'nll': jnp.sum(weights * nll),
    'brier': jnp.sum(weights * brier),
    'bins': bins.at[number].add(rows.astype(bins.dtype)),
  }


def summarize(sums: dict[str, np.ndarray]) -> dict[str, Any]:
  r"""The calibration error and two proper scores.

  .. math:: ECE = \sum_b \frac{n_b}{n} |acc_b - conf_b|

  with 15 bins of equal width of the largest probability (Guo et al., arXiv
  1706.04599). It is biased: chance alone makes each difference larger than 0, and bins
  hide what cancels inside them. `ece_by_chance` is what a network whose probabilities
  are right would show on as many examples, :math:`\sum_b \sqrt{2 v_b / \pi} / n` for
  the sum :math:`v_b` of p (1 - p) in a bin; an ECE is to be read beside it.

  Args:
    sums: of `totals`, added up over the batches of a split.

  Returns:
    `ece`, `ece_by_chance`, `brier` (the squared distance of the probabilities from the
    one-hot label, 0 to 2) and `nll` (nats), means over the examples.

  >>> import numpy as np
  >>> bins = np.zeros((15, 4))
  >>> bins[11] = 10, 8.0, 6, 1.6  # ten answers at .8, of which six are right
  >>> found = summarize({'bins': bins, 'nll': 6.0, 'brier': 5.0})
  >>> round(found['ece'], 6), round(found['ece_by_chance'], 6), found['nll']
  (0.2, 0.100925, 0.6)
  """
  weight, confidence, correct, variance = np.asarray(sums['bins'], np.float64).T
  whole = weight.sum()
  return {
    'ece': float(np.abs(correct - confidence).sum() / whole),
    'ece_by_chance': float(np.sqrt(2 / math.pi * variance).sum() / whole),
    'brier': float(sums['brier'] / whole),
    'nll': float(sums['nll'] / whole),
  }
