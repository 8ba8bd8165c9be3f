"""The loss that training minimises and whose Hessian is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from training.config import Config
from training.workload import Batch


def smoothed_kl(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
  r"""KL divergence of the model from label-smoothed targets, for each example.

  .. math:: \sum_c t_c (\log t_c - \log p_c), \quad
            t = (1 - s) \text{ on the label},\; s / (C - 1) \text{ elsewhere}

  Args:
    logits: float (B, C).
    labels: int (B,), in [0, C).
    smoothing: s, in [0, 1).

  Returns:
    float (B,), in nats; 0 where the model gives exactly the target.

  >>> import jax.numpy as jnp
  >>> logits = jnp.log(jnp.array([[0.9, 0.05, 0.05]]))
  >>> loss = smoothed_kl(logits, jnp.array([0]), 0.1)
  >>> abs(round(float(loss[0]), 6))
  0.0
  """
  num_classes = logits.shape[-1]
  log_probs = jax.nn.log_softmax(logits)
  off_target = smoothing / (num_classes - 1)
  targets = jnp.where(
    labels[:, None] == jnp.arange(num_classes)[None, :], 1 - smoothing, off_target
  ).astype(log_probs.dtype)
  entropy_terms = jnp.where(targets > 0, targets * jnp.log(targets), 0)
  return jnp.sum(entropy_terms - targets * log_probs, axis=-1)


def loss_fn(model: Any, config: Config) -> Callable[..., tuple[jax.Array, Any]]:
  """The loss of a model under a configuration.

  Args:
    model: a flax.linen module, see `training.Workload`.
    config: its label smoothing and dtype are used.

  Returns:
    ``loss(params, batch_stats, batch, *, train=False, key=None, normalizer=None)`` ->
    ``(value, (logits, batch_stats))``. The value is the sum of the weighted losses over
    ``normalizer``, by default the batch's total weight, which makes it the mean. With
    ``train=True`` dropout draws from ``key``, and batch statistics are the batch's own.
  """

  def loss(params, batch_stats, batch, *, train=False, key=None, normalizer=None):
    logits, batch_stats = apply(
      model,
      params,
      batch_stats,
      batch['inputs'],
      train=train,
      key=key,
      dtype=config.dtype,
    )
    losses = smoothed_kl(logits, batch['labels'], config.label_smoothing)
    weights = batch['weights']
    if normalizer is None:
      normalizer = jnp.sum(weights)
    return jnp.sum(weights * losses) / normalizer, (logits, batch_stats)

  return loss


def mean_loss(
  model: Any, config: Config, batch_stats: Any
) -> Callable[[Any, Batch], jax.Array]:
  """The loss in evaluation mode as ``mean(params, batch)``, for curvature.

  The same function as in training, without dropout and with fixed batch statistics.
  Weight batches by `num_examples` to average over a split.
  """
  loss = loss_fn(model, config)
  return lambda params, batch: loss(params, batch_stats, batch)[0]


def num_examples(batch: Batch) -> jax.Array:
  """Number of real examples in a batch: its total weight."""
  return batch['weights'].sum()


def apply(
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
    The logits in at least float32 and, with ``train=True``, the updated statistics.
  """
  if dtype != 'float32':
    params, inputs = _cast(params, dtype), _cast(inputs, dtype)
  variables = {'params': params}
  if batch_stats:
    variables['batch_stats'] = batch_stats
  if train:
    logits, updated = model.apply(
      variables, inputs, train=True, rngs={'dropout': key}, mutable=['batch_stats']
    )
    batch_stats = updated.get('batch_stats', batch_stats)
  else:
    logits = model.apply(variables, inputs, train=False)
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), batch_stats


def _cast(tree: Any, dtype: str) -> Any:
  """Casts floating-point leaves; indices and counts stay."""
  return jax.tree.map(
    lambda leaf: (
      leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )


def confusion(logits: jax.Array, batch: Batch) -> jax.Array:
  """Total weight by true class (rows) and predicted class (columns), (C, C)."""
  num_classes = logits.shape[-1]
  cell = batch['labels'] * num_classes + jnp.argmax(logits, axis=-1)
  counts = jnp.zeros(num_classes**2, batch['weights'].dtype)
  return counts.at[cell].add(batch['weights']).reshape(num_classes, num_classes)


def num_correct(logits: jax.Array, batch: Batch) -> jax.Array:
  """Total weight of the examples whose largest logit is their label's."""
  correct = jnp.argmax(logits, axis=-1) == batch['labels']
  return jnp.sum(jnp.where(correct, batch['weights'], 0))
