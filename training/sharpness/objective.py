"""The loss whose curvature is measured, as functions of the parameters and a batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import curvature
from training import losses
from training.errors import UsageError
from training.sharpness import network as network_lib
from training.sharpness.network import Network
from training.sharpness.options import Options
from training.workload import Batch


class Objective:
  """A network's loss under some options, its batches and its operators.

  Every function is a method of one object, so that each is compiled once.

  Attributes:
    params: the parameters, in the type of the options.
    batches: the examples whose mean loss is measured.
    scale: the diagonal of the preconditioner, or None.
  """

  def __init__(self, network: Network, options: Options):
    self._network = network
    self._options = options
    # Sharpness is that of the loss in full precision, whatever training computed in.
    self._config = dataclasses.replace(network.config, dtype='float32')
    self.params = cast(network.params, options.dtype)
    self._batch_stats = cast(network.batch_stats, options.dtype)
    self._train_mode = options.batch_norm == 'train' and bool(network.batch_stats)
    self._model = network.workload.model
    if self._train_mode and hasattr(self._model, 'dropout_rate'):
      self._model = self._model.clone(dropout_rate=0.0)
    self.batches = list(
      self.draw(options.split, options.batch_size, options.num_examples)
    )
    self.scale = self._preconditioner()

  def loss(self, params: Any, batch: Batch) -> jax.Array:
    """The mean loss of a batch."""
    return self.loss_of_logits(self.logits(params, batch), batch)

  def loss_of_logits(self, logits: jax.Array, batch: Batch) -> jax.Array:
    """The mean loss of a batch as a function of the logits."""
    total = jnp.sum(batch['weights'] * self.losses_of_logits(logits, batch))
    return total / jnp.sum(batch['weights'])

  def losses_of_logits(self, logits: jax.Array, batch: Batch) -> jax.Array:
    """The loss of each example, (B,)."""
    return losses.smoothed_kl(logits, batch['labels'], self._config.label_smoothing)

  def weighted_losses(self, params: Any, batch: Batch) -> jax.Array:
    """The loss of each example, (B,); 0 for padding."""
    return batch['weights'] * self.losses_of_logits(self.logits(params, batch), batch)

  def logits(self, params: Any, batch: Batch) -> jax.Array:
    """The logits, in the batch-norm mode of the options."""
    return losses.apply(
      self._model,
      params,
      self._batch_stats,
      batch['inputs'],
      train=self._train_mode,
      key=jax.random.key(0),
    )[0]

  def evaluation_logits(self, params: Any, batch: Batch) -> jax.Array:
    """The logits in evaluation mode."""
    return losses.apply(self._model, params, self._batch_stats, batch['inputs'])[0]

  def operator(self, batches: list[Batch]) -> curvature.Operator:
    """The operator that the options name, over batches, preconditioned, restricted."""
    weight = losses.num_examples
    if self._options.operator == 'gauss_newton':
      made = curvature.gauss_newton(
        self.logits, self.loss_of_logits, self.params, batches, weight=weight
      )
    elif self._options.operator == 'fisher':
      made = curvature.empirical_fisher(
        self.weighted_losses, self.params, batches, weight=weight
      )
    else:
      made = curvature.hessian(self.loss, self.params, batches, weight=weight)
    if self.scale is not None:
      made = curvature.preconditioned(made, self.scale)
    return self.restrict(made, self._options.params_regex)

  def restrict(self, operator: curvature.Operator, regex: str) -> curvature.Operator:
    """The block of an operator of the parameters whose path has a match."""
    try:
      return curvature.restricted(operator, regex) if regex else operator
    except ValueError as error:
      reason = str(error).partition(' matches ')[2]
      raise UsageError(f'--params_regex={regex} matches {reason}.') from error

  def direction(self, vector: Any) -> Any:
    """A vector of `operator` as a direction through all parameters."""
    # A restricted vector has None where a parameter is left out.
    whole = jax.tree.map(
      lambda p, v: jnp.zeros_like(p) if v is None else v, self.params, vector
    )
    if self.scale is None:
      return whole
    return jax.tree.map(jnp.multiply, self.scale, whole)

  def draw(self, split: str, batch_size: int, count: int) -> Iterator[Batch]:
    """Batches of a split in its order, or of some of its examples at random."""
    examples = getattr(self._network.workload, split)
    if not examples.num_examples:
      raise UsageError(f'the {split} split is empty: there is nothing to average over.')
    if count > examples.num_examples:
      raise UsageError(
        f'--num_examples={count}: the {split} split has {examples.num_examples}; give '
        'at most that, or 0 for all.'
      )
    seed = self._options.seed if count else None
    left = count or examples.num_examples
    for batch in examples.batches(batch_size, seed=seed).epoch(0):
      weights = np.array(batch['weights'])
      # The examples too many in the last batch keep their place, without weight.
      weights[np.cumsum(weights) > left] = 0
      left -= weights.sum()
      yield cast({**batch, 'weights': weights}, self._options.dtype)
      if left <= 0:
        return

  def _preconditioner(self) -> Any:
    if self._options.preconditioner == 'adaptive':
      return jax.tree.map(jnp.abs, self.params)
    if self._options.preconditioner == 'adam':
      if self._config.base_optimizer not in ('adam', 'adamw'):
        raise UsageError(
          f'--preconditioner=adam: the run was trained with '
          f'{self._config.base_optimizer}, which keeps no second moments.'
        )
      state = network_lib.optimizer_state(self._network)
      return cast(curvature.adam_preconditioner(state), self._options.dtype)
    return None


@functools.partial(jax.jit, static_argnums=0)
def example_scores(
  objective: Objective, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Loss of each example in evaluation mode, and whether it is classified right."""
  logits = objective.evaluation_logits(params, batch)
  correct = jnp.argmax(logits, axis=-1) == batch['labels']
  return objective.losses_of_logits(logits, batch), correct


@functools.partial(jax.jit, static_argnums=(0, 1))
def example_curvatures(
  objective: Objective, operator: str, params: Any, direction: Any, batch: Batch
) -> jax.Array:
  """What each example adds to the product direction . A direction, (B,)."""

  def logits(t):
    moved = jax.tree.map(lambda p, d: p + t * d, params, direction)
    return objective.logits(moved, batch)

  zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
  one = jnp.ones_like(zero)
  if operator == 'gauss_newton':
    # The loss is curved, the network is replaced by its tangent.
    value, tangent = jax.jvp(logits, (zero,), (one,))
    along = lambda t: objective.losses_of_logits(value + t * tangent, batch)
  else:
    along = lambda t: objective.losses_of_logits(logits(t), batch)
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
  """Floating-point leaves in a type."""
  return jax.tree.map(
    lambda leaf: (
      np.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )
