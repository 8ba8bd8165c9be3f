"""Language modelling: the next token at every position."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training.problem import Batch, Score


@dataclasses.dataclass(frozen=True)
class NextToken:
  """Scores of logits (B, T, V) against int labels (B, T), the next tokens."""

  main = Score('token_accuracy', 'token accuracy', 100, '%')

  def of_examples(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """The share of positions whose largest logit is the label's, (B,)."""
    correct = jnp.argmax(outputs, axis=-1) == batch['labels']
    return jnp.mean(correct.astype(batch['weights'].dtype), axis=1)

  def totals(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Sums of the cross-entropies and of the weights."""
    weights = batch['weights']
    losses = next_token_loss(outputs, batch)
    return {'cross_entropy': jnp.sum(weights * losses), 'weight': jnp.sum(weights)}

  def summarize(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
    """Perplexity, e to the mean cross-entropy in nats."""
    mean = float(totals['cross_entropy']) / float(totals['weight'])
    return {'perplexity': math.exp(min(mean, 700.0)), 'cross_entropy': mean}

  def describe(self, found: dict[str, Any]) -> str:
    """The perplexity."""
    return f'perplexity {found["perplexity"]:.3f}'

  def draw(self, folder: pathlib.Path, found: dict[str, Any], title: str) -> None:
    """Draws nothing."""


def next_token_loss(outputs: jax.Array, batch: Batch) -> jax.Array:
  r"""The losses of a `Problem`: cross-entropy, the mean over positions.

  .. math:: -\frac{1}{T} \sum_t \log p_t(y_t)

  Args:
    outputs: float (B, T, V), logits.
    batch: with int 'labels' (B, T).

  Returns:
    float (B,), in nats a token.

  >>> import jax.numpy as jnp
  >>> loss = next_token_loss(jnp.zeros((1, 2, 4)), {'labels': jnp.zeros((1, 2), int)})
  >>> round(float(loss[0]), 4)  # the logarithm of 4
  1.3863
  """
  log_probs = jax.nn.log_softmax(outputs)
  chosen = jnp.take_along_axis(log_probs, batch['labels'][..., None], axis=-1)
  return -jnp.mean(chosen[..., 0], axis=-1)
