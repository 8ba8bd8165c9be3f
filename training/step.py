"""The training step and the evaluation step: pure functions of a state and a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sam_jax
from training import methods, microbatches, optimizers
from training import problem as problem_lib
from training.config import Config
from training.problem import Batch, Problem
from training.sharing import Sharing

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
  """What a step turns into its successor; the same on every replica.

  Attributes:
    step: int32, updates done.
    params: parameters.
    batch_stats: running batch statistics, possibly empty.
    opt_state: state of the optimizer chain.
    key: typed key that every step folds its number into.
    hyperparams: scalars by name, those of `optimizers.VARIABLE` that differ between
      the members of a population; those that are not here are the configuration's,
      and constants of the compiled step.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  key: jax.Array
  hyperparams: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for jax.jit
class Stepper:
  """A training run's steps, as pure functions that anything may map.

  Without an axis name the functions take whole batches: under `jax.jit`, on one device
  or with arrays that are sharded over a mesh. With one they are written for one replica
  of a mapped axis, under `jax.pmap` or `jax.vmap`. Under `jax.vmap` over states with
  `hyperparams` they train a population.

  Attributes:
    problem: what is trained.
    config: a resolved configuration.
    steps_per_epoch: steps in an epoch, in which schedules are counted.
    sharing: who perturbs with whom, from `sharing.of`.
    axis_name: the mapped axis over the replicas, None for whole batches.
  """

  problem: Problem
  config: Config
  steps_per_epoch: int
  sharing: Sharing = Sharing()
  axis_name: str | None = None

  def init(
    self, seed: Any, hyperparams: Mapping[str, Any] | None = None, dtype: Any = None
  ) -> TrainState:
    """The state before the first step.

    Args:
      seed: of parameters and dropout, an int or a traced scalar.
      hyperparams: see `TrainState`; none by default.
      dtype: of the parameters; the model's own by default.
    """
    hyperparams = {
      name: jnp.asarray(x, jnp.result_type(float))
      for name, x in (hyperparams or {}).items()
    }
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = self.problem.model.init(init_key, self.problem.example_inputs)
    params, stats = variables['params'], variables.get('batch_stats', {})
    if dtype is not None:
      params, stats = (problem_lib.cast(tree, dtype) for tree in (params, stats))
    opt_state = self._chain({**hyperparams, 'seed': seed}).init(params)
    return TrainState(jnp.int32(0), params, stats, opt_state, key, hyperparams)

  def train(
    self, state: TrainState, batch: Batch, *, phase: bool | None = None
  ) -> tuple[TrainState, Metrics]:
    """One update.

    A shard's loss is its sum over an equal share of the batch's total weight, so the
    mean over replicas (and groups) is the mean over the batch whatever the shards hold.
    Dropout draws the same mask in all passes. With microbatches every gradient is
    accumulated over all of them, each with batch statistics and dropout of its own; the
    step is otherwise that of the whole share. Loss, score and batch statistics are
    those of the clean pass; a method with one gradient has none, and its loss and
    statistics are those of the point where it takes it, logged as ``perturbed_loss``.

    Args:
      state: of `init`, or of the step before.
      batch: inputs, labels and weights, with a leading axis of groups if the sharing
        has groups.
      phase: whether a periodic method ascends in this step; None for all others.
    """
    shard = _Shard.of(self, state, batch)
    point = sam_jax.gradient_point(state.opt_state, state.params)
    value, grads, facts = shard.clean_pass(point)
    method = methods.get(self.config.optimizer)
    extra = {'value_and_grad_fn': shard.value_and_grad, 'value': value, 'phase': phase}
    if method is not None and method.traits.chooses_examples:
      extra['example_losses_fn'] = shard.example_losses
      extra['example_losses'] = facts.losses
      extra['example_weights'] = batch['weights']
    tx = self._chain(state.hyperparams)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    one_gradient = method is not None and method.traits.one_gradient
    metrics = {
      **({} if one_gradient else {'loss': shard.mean(value)}),
      self.problem.scores.main.name: shard.score(facts),
      'examples': shard.total,
      **optimizers.recorded(opt_state),
    }
    state = state._replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=shard.new_batch_stats(facts),
      opt_state=opt_state,
    )
    return state, metrics

  def evaluate(self, variables: tuple[Any, Any], batch: Batch) -> Metrics:
    """Sums over a batch in evaluation mode of ``(params, batch_stats)``."""
    problem = self.problem
    value, seen = problem_lib.loss(
      problem, *variables, batch, dtype=self.config.dtype, normalizer=1
    )
    main = problem.scores.of_examples(seen.outputs, batch)
    sums = {
      'loss': value,
      problem.scores.main.name: problem_lib.mean(main, batch, 1),
      'examples': jnp.sum(batch['weights']),
      'totals': problem.scores.totals(seen.outputs, batch),
    }
    return sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)

  def _chain(self, hyperparams):
    return optimizers.build(
      self.config, self.steps_per_epoch, self.sharing, self.axis_name, hyperparams
    )


class _Facts(NamedTuple):
  """What the clean pass tells; with groups every leaf has an axis of them."""

  score: jax.Array  # summed over the examples
  weight: jax.Array
  batch_stats: Any
  losses: jax.Array

  def joined(self, part: _Part) -> _Facts:
    """Those of a part from those of its microbatches, along their leading axis."""
    return _Facts(
      jnp.sum(self.score),
      jnp.sum(self.weight),
      _mean_stats(self.batch_stats, self.weight),
      microbatches.join(self.losses, len(part.batch['weights'])),
    )


class _Shard(NamedTuple):
  """One replica's shard of a batch, and the losses of all, a group, or some of it.

  Attributes:
    stepper: whose problem and sharing these are.
    batch_stats: running statistics before the step.
    batch: the shard.
    key: of dropout, the same in all passes.
    total: weight of the batch, over all replicas.
    share: the part of it that the shard, or a group of it, stands for.
  """

  stepper: Stepper
  batch_stats: Any
  batch: Batch
  key: jax.Array
  total: jax.Array
  share: jax.Array

  @classmethod
  def of(cls, stepper: Stepper, state: TrainState, batch: Batch) -> _Shard:
    """Takes a batch, with its inputs augmented."""
    axis, augment = stepper.axis_name, stepper.problem.augment
    key = jax.random.fold_in(state.key, state.step)
    key = jax.random.fold_in(key, 0 if axis is None else jax.lax.axis_index(axis))
    if augment is not None:
      key, augment_key = jax.random.split(key)
      batch = {**batch, 'inputs': augment(augment_key, batch['inputs'])}
    total, num_replicas = jnp.sum(batch['weights']), 1
    if axis is not None:
      total, num_replicas = jax.lax.psum((total, num_replicas), axis)
    share = total / num_replicas / max(stepper.sharing.groups, 1)
    return cls(stepper, state.batch_stats, batch, key, total, share)

  def clean_pass(self, params: Any) -> tuple[jax.Array, Any, _Facts]:
    """Loss, gradient, and what else the pass tells.

    With groups the gradient is zero: each takes its own inside the method.
    """
    groups = self.stepper.sharing.groups
    if not groups:
      (value, facts), grads = self._value_and_grad(params)
      return value, grads, facts
    values, facts = jax.lax.map(lambda g: self._forward(params, g), jnp.arange(groups))
    return jnp.mean(values), jax.tree.map(jnp.zeros_like, params), facts

  def value_and_grad(
    self, params: Any, which: jax.Array | None = None
  ) -> tuple[jax.Array, Any]:
    """Loss and gradient of the shard, of a group of it, or of chosen examples."""
    (value, _), grads = self._value_and_grad(params, which)
    return value, grads

  def example_losses(self, params: Any) -> jax.Array:
    """The loss of each example, (B,)."""
    return self._forward(params)[1].losses

  def score(self, facts: _Facts) -> jax.Array:
    """The main score, the mean over all replicas' examples."""
    return self._sum(jnp.sum(facts.score)) / self.total

  def new_batch_stats(self, facts: _Facts) -> Any:
    """Mean of all parts' statistics by their examples; an empty one has no say."""

    def mean(leaf):
      weight = facts.weight
      weight = jnp.reshape(weight, weight.shape + (1,) * (leaf.ndim - weight.ndim))
      product = jnp.where(weight > 0, weight * leaf, 0)
      if facts.weight.ndim:
        product = jnp.sum(product, axis=0)
      return (self._sum(product) / self.total).astype(leaf.dtype)

    return jax.tree.map(mean, facts.batch_stats)

  def mean(self, tree: Any) -> Any:
    """The mean over the replicas."""
    axis = self.stepper.axis_name
    return tree if axis is None else jax.lax.pmean(tree, axis)

  def _sum(self, tree: Any) -> Any:
    axis = self.stepper.axis_name
    return tree if axis is None else jax.lax.psum(tree, axis)

  def _value_and_grad(self, params, which=None):
    part, num = self._part(which), self.stepper.sharing.microbatches
    function = jax.value_and_grad(self._loss, has_aux=True)
    if num > 1:
      function = sam_jax.accumulate(function, has_aux=True)
    (value, facts), grads = function(params, part if num == 1 else part.split(num))
    facts = facts if num == 1 else facts.joined(part)
    if self.stepper.sharing.whole:
      value, grads = self.mean((value, grads))
    return (value, facts), grads

  def _forward(self, params, which=None) -> tuple[jax.Array, _Facts]:
    """The loss without its gradient, in the same parts."""
    part, num = self._part(which), self.stepper.sharing.microbatches
    if num == 1:
      return self._loss(params, part)
    values, facts = jax.lax.map(lambda x: self._loss(params, x), part.split(num))
    return jnp.mean(values), facts.joined(part)

  def _loss(self, params, part) -> tuple[jax.Array, _Facts]:
    problem, config = self.stepper.problem, self.stepper.config
    batch = part.batch
    value, seen = problem_lib.loss(
      problem,
      params,
      self.batch_stats,
      batch,
      train=True,
      key=part.key,
      dtype=config.dtype,
      normalizer=part.divisor,
    )
    score = problem.scores.of_examples(seen.outputs, batch)
    weight = jnp.sum(batch['weights'])
    total_score = problem_lib.mean(score, batch, 1)
    # Of microbatches means are taken, and their losses are to be summed.
    value = self.stepper.sharing.microbatches * value
    return value, _Facts(total_score, weight, seen.batch_stats, seen.losses)

  def _part(self, which) -> _Part:
    """All examples, a group, or chosen ones."""
    if which is None:
      return _Part(self.batch, self.key, self.share)
    if self.stepper.sharing.groups:
      group = jax.tree.map(lambda leaf: leaf[which], self.batch)
      return _Part(group, jax.random.fold_in(self.key, which), self.share)
    batch, weight = _subset(self.batch, which)
    # The chosen speak for the shard: their mean, times the shard's part of the batch.
    part = jnp.sum(self.batch['weights']) / self.share
    divisor = weight / jnp.where(part > 0, part, 1)
    return _Part(batch, self.key, jnp.where(weight > 0, divisor, 1))


class _Part(NamedTuple):
  """Examples whose loss is taken at once.

  Attributes:
    batch: the examples.
    key: of their dropout.
    divisor: of the weighted sum of their losses.
  """

  batch: Batch
  key: jax.Array
  divisor: jax.Array

  def split(self, num: int) -> _Part:
    """Microbatches along a leading axis; the sum of their losses is that of all."""
    keys = jax.vmap(lambda j: jax.random.fold_in(self.key, j))(jnp.arange(num))
    divisors = jnp.full(num, self.divisor)
    return _Part(microbatches.split(self.batch, num), keys, divisors)


def _mean_stats(batch_stats: Any, weights: jax.Array) -> Any:
  """The mean over a leading axis by weights (k,); what weighs nothing has no say."""

  def mean(leaf):
    weight = jnp.reshape(weights, weights.shape + (1,) * (leaf.ndim - 1))
    product = jnp.where(weight > 0, weight * leaf, 0)
    return (jnp.sum(product, axis=0) / jnp.sum(weights)).astype(leaf.dtype)

  return jax.tree.map(mean, batch_stats)


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
