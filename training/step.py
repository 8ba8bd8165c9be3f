"""The training step and the evaluation step, pure and written for one replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from training import losses
from training.config import Config
from training.parallel import AXIS
from training.workload import Batch

Metrics = dict[str, jax.Array]
# Scalars of the optimizer's state that are logged where it has them.
_STATE_METRICS = ('perturbed_loss', 'gradient_norm', 'rho', 'learning_rate')


class TrainState(NamedTuple):
  """What a step turns into its successor; the same on every replica.

  Attributes:
    step: int32, updates done.
    params: float32 parameters.
    batch_stats: running batch statistics, possibly empty.
    opt_state: state of the optimizer chain.
    key: typed key that every step folds its number into.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  key: jax.Array


def init_state(
    model: Any, tx: optax.GradientTransformation, example_inputs: Any, seed: int
) -> TrainState:
  """The state before the first step."""

  def init(seed):
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, example_inputs)
    params = variables['params']
    batch_stats = variables.get('batch_stats', {})
    return TrainState(jnp.int32(0), params, batch_stats, tx.init(params), key)

  return jax.jit(init)(seed)


def make_train_step(
    model: Any,
    tx: optax.GradientTransformationExtraArgs,
    config: Config,
    num_groups: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """A step ``(state, batch) -> (state, metrics)`` of one replica of the axis `AXIS`.

  A shard's loss is its sum over an equal share of the batch's total weight, so the
  mean over replicas (and groups) is the mean over the batch whatever the shards hold.
  Dropout draws the same mask in both passes. Loss, accuracy and batch statistics are
  those of the clean pass.

  Args:
    model: a flax.linen module.
    tx: the chain of `optimizers.build`.
    config: the run's configuration.
    num_groups: groups of m-sharpness, the leading axis of a batch's leaves; 0: none.
  """
  loss = losses.loss_fn(model, config)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
    total = jax.lax.psum(jnp.sum(batch['weights']), AXIS)
    share = total / jax.lax.psum(1, AXIS) / max(num_groups, 1)

    def objective(params, group=None):
      shard, group_key = batch, key
      if group is not None:
        shard = jax.tree.map(lambda leaf: leaf[group], batch)
        group_key = jax.random.fold_in(key, group)
      value, (logits, batch_stats) = loss(
          params, state.batch_stats, shard, train=True, key=group_key, normalizer=share
      )
      weight = jnp.sum(shard['weights'])
      return value, (losses.num_correct(logits, shard), weight, batch_stats)

    def value_and_grad_fn(params, *group):
      (value, _), grads = jax.value_and_grad(objective, has_aux=True)(params, *group)
      return value, grads

    if num_groups:
      # Every group takes its own clean gradient inside the method.
      value, aux = jax.lax.map(
          lambda group: objective(state.params, group), jnp.arange(num_groups)
      )
      value, grads = jnp.mean(value), jax.tree.map(jnp.zeros_like, state.params)
    else:
      (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    correct, weight, batch_stats = aux
    batch_stats = _weighted_mean(batch_stats, weight, total)
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, value_and_grad_fn=value_and_grad_fn
    )
    params = optax.apply_updates(state.params, updates)
    metrics = {
        'loss': jax.lax.pmean(value, AXIS),
        'accuracy': jax.lax.psum(jnp.sum(correct), AXIS) / total,
        'examples': total,
        **_state_metrics(opt_state),
    }
    state = TrainState(state.step + 1, params, batch_stats, opt_state, state.key)
    return state, metrics

  return train_step


def make_eval_step(
    model: Any, config: Config
) -> Callable[[tuple[Any, Any], Batch], Metrics]:
  """A step ``((params, batch_stats), batch) -> sums`` over all replicas' shards."""
  loss = losses.loss_fn(model, config)

  def eval_step(variables, batch):
    value, (logits, _) = loss(*variables, batch, normalizer=1)
    sums = {
        'loss': value,
        'correct': losses.num_correct(logits, batch),
        'examples': jnp.sum(batch['weights']),
    }
    return jax.lax.psum(sums, AXIS)

  return eval_step


def _weighted_mean(batch_stats: Any, weight: jax.Array, total: jax.Array) -> Any:
  """Mean of shards' statistics by their examples; an empty shard has no say."""

  def mean(leaf):
    weights = jnp.reshape(weight, weight.shape + (1,) * (leaf.ndim - weight.ndim))
    product = jnp.where(weights > 0, weights * leaf, 0)
    if weight.ndim:
      product = jnp.sum(product, axis=0)
    return (jax.lax.psum(product, AXIS) / total).astype(leaf.dtype)

  return jax.tree.map(mean, batch_stats)


def _state_metrics(opt_state: Any) -> Metrics:
  """Scalars recorded in the optimizer's state, those it has."""
  found = {
      name: optax.tree.get(
          opt_state, name, None, filtering=lambda _, leaf: isinstance(leaf, jax.Array)
      )
      for name in _STATE_METRICS
  }
  return {name: value for name, value in found.items() if value is not None}
