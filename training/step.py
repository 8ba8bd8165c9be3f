"""The training step and the evaluation step, pure and written for one replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sam_jax
from training import losses, optimizers
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
  phase: bool | None = None,
  augment: Callable[[jax.Array, Any], Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """A step ``(state, batch) -> (state, metrics)`` of one replica of the axis `AXIS`.

  A shard's loss is its sum over an equal share of the batch's total weight, so the
  mean over replicas (and groups) is the mean over the batch whatever the shards hold.
  Dropout draws the same mask in both passes. Loss, accuracy and batch statistics are
  those of the clean pass; a method with one gradient has none, and its loss and
  statistics are those of the point where it takes it, logged as ``perturbed_loss``.

  Args:
    model: a flax.linen module.
    tx: the chain of `optimizers.build`.
    config: the run's configuration.
    num_groups: groups of m-sharpness, the leading axis of a batch's leaves; 0: none.
    phase: whether a periodic method ascends in this step; None for all others.
    augment: changes the inputs, the same in both passes, see `training.Workload`.
  """
  method = optimizers.METHODS.get(config.optimizer)
  one_gradient = method is not None and method.one_gradient
  chooses_examples = method is not None and method.chooses_examples

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
    if augment is not None:
      key, augment_key = jax.random.split(key)
      batch = {**batch, 'inputs': augment(augment_key, batch['inputs'])}
    shard = _Shard(model, config, state.batch_stats, batch, key, num_groups)
    point = sam_jax.gradient_point(state.opt_state, state.params)
    value, grads, (correct, weight, batch_stats, each) = shard.clean_pass(point)
    extra = {'value_and_grad_fn': shard.value_and_grad, 'value': value, 'phase': phase}
    if chooses_examples:
      extra['example_losses_fn'] = shard.example_losses
      extra['example_losses'] = each
      extra['example_weights'] = batch['weights']
    batch_stats = _weighted_mean(batch_stats, weight, shard.total)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      **({} if one_gradient else {'loss': jax.lax.pmean(value, AXIS)}),
      'accuracy': jax.lax.psum(jnp.sum(correct), AXIS) / shard.total,
      'examples': shard.total,
      **_state_metrics(opt_state),
    }
    state = TrainState(state.step + 1, params, batch_stats, opt_state, state.key)
    return state, metrics

  return train_step


class _Shard:
  """The losses of one replica's shard of a batch; dropout is the same in all passes.

  Attributes:
    total: weight of the batch, over all replicas.
  """

  def __init__(self, model, config, batch_stats, batch, key, num_groups):
    self._loss = losses.loss_fn(model, config)
    self._smoothing = config.label_smoothing
    self._batch_stats = batch_stats
    self._batch = batch
    self._key = key
    self._num_groups = num_groups
    self.total = jax.lax.psum(jnp.sum(batch['weights']), AXIS)
    self._share = self.total / jax.lax.psum(1, AXIS) / max(num_groups, 1)

  def clean_pass(self, params):
    """The loss, its gradient, and what `_of` tells of it.

    With groups the gradient is zero: each takes its own inside the method.
    """
    if self._num_groups:
      groups = jnp.arange(self._num_groups)
      value, facts = jax.lax.map(lambda group: self._of_group(params, group), groups)
      return jnp.mean(value), jax.tree.map(jnp.zeros_like, params), facts
    (value, facts), grads = jax.value_and_grad(self._of, has_aux=True)(params)
    return value, grads, facts

  def value_and_grad(self, params, *which):
    """Loss and gradient of the shard, of a group of it, or of chosen examples."""
    function = self._of_group if self._num_groups else self._of_examples
    function = function if which else self._of
    (value, _), grads = jax.value_and_grad(function, has_aux=True)(params, *which)
    return value, grads

  def example_losses(self, params):
    """The loss of each example."""
    _, (logits, _) = self._loss(
      params, self._batch_stats, self._batch, train=True, key=self._key
    )
    return losses.smoothed_kl(logits, self._batch['labels'], self._smoothing)

  def _of(self, params, batch=None, key=None, normalizer=None):
    """The loss, and (number correct, weight, batch statistics, each example's loss)."""
    batch = self._batch if batch is None else batch
    value, (logits, batch_stats) = self._loss(
      params,
      self._batch_stats,
      batch,
      train=True,
      key=self._key if key is None else key,
      normalizer=self._share if normalizer is None else normalizer,
    )
    each = losses.smoothed_kl(logits, batch['labels'], self._smoothing)
    weight = jnp.sum(batch['weights'])
    return value, (losses.num_correct(logits, batch), weight, batch_stats, each)

  def _of_group(self, params, group):
    batch = jax.tree.map(lambda leaf: leaf[group], self._batch)
    return self._of(params, batch, jax.random.fold_in(self._key, group))

  def _of_examples(self, params, indices):
    batch, weight = _subset(self._batch, indices)
    # The chosen speak for the shard: their mean, times the shard's part of the batch.
    part = jnp.sum(self._batch['weights']) / self._share
    normalizer = weight / jnp.where(part > 0, part, 1)
    return self._of(params, batch, normalizer=jnp.where(weight > 0, normalizer, 1))


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
      'confusion': losses.confusion(logits, batch),
    }
    return jax.lax.psum(sums, AXIS)

  return eval_step


def _subset(batch: Batch, indices: jax.Array) -> tuple[Batch, jax.Array]:
  """The chosen examples and their total weight.

  Rows of an array are taken out. Graphs cannot be cut out of a packed batch: all stay,
  and those that are not chosen weigh nothing.
  """
  if isinstance(batch['inputs'], jax.Array):
    chosen = jax.tree.map(lambda leaf: leaf[indices], batch)
  else:
    mask = jnp.zeros_like(batch['weights']).at[indices].set(1)
    chosen = {**batch, 'weights': mask * batch['weights']}
  return chosen, jnp.sum(chosen['weights'])


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
