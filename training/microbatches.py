"""A replica's batch in parts, whose gradients a step accumulates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import sam_jax
from training.errors import UsageError
from training.problem import Batch, Problem


def check(problem: Problem, num: int) -> None:
  """Checks that batches of a problem can be split.

  Raises:
    UsageError: its inputs are not arrays with the examples along the leading axis, such
      as graphs that are packed one after the other.
  """
  leaves = jax.tree.leaves(problem.example_inputs)
  if num > 1 and len({jnp.shape(leaf)[:1] for leaf in leaves}) > 1:
    raise UsageError(
      f'--grad_accum_steps={num}: the inputs are graphs packed into one array, which '
      'cannot be split in a step: leave it out, or give a smaller --batch_size.'
    )


def split(batch: Batch, num: int) -> Batch:
  """Splits a batch into `num` parts along a new leading axis.

  The last batch of an epoch may be smaller than the others: it is filled up with
  examples of zeros that weigh nothing.
  """
  missing = -len(batch['weights']) % num

  def fill(leaf):
    return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))

  batch = jax.tree.map(fill, batch) if missing else batch
  return sam_jax.microbatches(batch, num)


def join(values: jax.Array, size: int) -> Any:
  """Values of the examples of each part, (num, B / num), in their order in the batch.

  Args:
    values: of the parts of a batch as `split` makes them.
    size: examples of the batch, without those that fill it up.

  Returns:
    (size,).
  """
  return jnp.ravel(values.T)[:size]
