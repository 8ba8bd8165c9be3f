"""Regression: squared errors of real targets."""

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
class SquaredError:
  """Scores of outputs against float labels of the same shape, (B,) or (B, K).

  Attributes:
    unit_name: the unit of the targets, for readers.
  """

  unit_name: str = ''

  @property
  def main(self) -> Score:
    """The mean absolute error, over examples and outputs."""
    return Score(
      'absolute_error', 'absolute error', unit=self.unit_name, higher_is_better=False
    )

  def of_examples(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """The absolute error of each example, the mean over its outputs, (B,)."""
    return _per_example(jnp.abs(_difference(outputs, batch)))

  def totals(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Sums of squared errors, of targets and of their squares, and of weights."""
    weights, targets = batch['weights'], batch['labels']
    squares = _per_example(_difference(outputs, batch) ** 2)
    return {
      'squared_error': jnp.sum(weights * squares),
      'target': jnp.sum(weights * _per_example(targets)),
      'target_squared': jnp.sum(weights * _per_example(targets**2)),
      'weight': jnp.sum(weights),
    }

  def summarize(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
    """Root mean squared error, and the share of the targets' variance explained."""
    weight = float(totals['weight'])
    error = float(totals['squared_error']) / weight
    target = float(totals['target']) / weight
    variance = float(totals['target_squared']) / weight - target**2
    return {
      'root_mean_squared_error': math.sqrt(error),
      'r_squared': 1 - error / variance if variance > 0 else None,
    }

  def describe(self, found: dict[str, Any]) -> str:
    """The root mean squared error and R squared."""
    share = found['r_squared']
    shown = '' if share is None else f', R^2 {share:.4f}'
    return f'root mean squared error {found["root_mean_squared_error"]:.4f}{shown}'

  def draw(self, folder: pathlib.Path, found: dict[str, Any], title: str) -> None:
    """Draws nothing."""


def squared_error(outputs: jax.Array, batch: Batch) -> jax.Array:
  r"""The losses of a `Problem`: half the squared error, the mean over outputs.

  .. math:: \frac{1}{2 K} \sum_k (f_k - y_k)^2

  Args:
    outputs: float (B,) or (B, K).
    batch: with float 'labels' of the same shape.

  Returns:
    float (B,), in squared units of the targets.

  >>> import jax.numpy as jnp
  >>> squared_error(jnp.array([[1.0, 3.0]]), {'labels': jnp.array([[1.0, 1.0]])})
  Array([1.], dtype=float32)
  """
  return _per_example(_difference(outputs, batch) ** 2) / 2


def _difference(outputs: jax.Array, batch: Batch) -> jax.Array:
  targets = batch['labels']
  if outputs.shape != targets.shape:
    raise ValueError(
      f'outputs of shape {outputs.shape} do not go with targets of shape '
      f'{targets.shape}: a network for (B,) targets drops its last axis.'
    )
  return outputs - targets.astype(outputs.dtype)


def _per_example(values: jax.Array) -> jax.Array:
  return jnp.mean(values.reshape(values.shape[0], -1), axis=1)
