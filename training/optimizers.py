"""Optimizer chains: a sharpness-aware method over a base optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import sam_jax
from training.config import Config, require_choice
from training.errors import UsageError
from training.parallel import AXIS

_STEP_TENTHS = (3, 6, 8)  # of the epochs
_STEP_FACTOR = 0.2


class Method(NamedTuple):
  """A sharpness-aware method: its radius unless a task has its own, and its builder."""

  rho: float
  build: Callable[[Config], optax.GradientTransformationExtraArgs]


def _asam(config: Config) -> optax.GradientTransformationExtraArgs:
  return sam_jax.asam(
      config.rho,
      config.adaptive_eta,
      weights=True if config.adaptive_rule == 'all' else None,
      axis_name=AXIS,
  )


# A new method is one line here; its hyperparameters are fields of Config.
METHODS: dict[str, Method] = {
    'sam': Method(0.05, lambda config: sam_jax.sam(config.rho, axis_name=AXIS)),
    'asam': Method(0.5, _asam),
    'usam': Method(0.05, lambda config: sam_jax.usam(config.rho, axis_name=AXIS)),
}

# Builders from the learning-rate schedule. Weight decay stands before them, as L2.
BASES: dict[str, Callable[[Config, optax.Schedule], optax.GradientTransformation]] = {
    'sgd': lambda config, rate: optax.sgd(rate),
    'momentum': lambda config, rate: optax.sgd(rate, config.momentum),
    'nesterov': lambda config, rate: optax.sgd(rate, config.momentum, nesterov=True),
    'adam': lambda config, rate: optax.adam(rate),
    'adamw': lambda config, rate: optax.adamw(rate, weight_decay=config.weight_decay),
}
_DECOUPLED = ('adamw',)


def validate(config: Config, num_replicas: int = 1) -> None:
  """Checks the optimizer's names and that the groups of m-sharpness come out even.

  Raises:
    UsageError: names the field, its value and what it may be.
  """
  require_choice('optimizer', config.optimizer, (*METHODS, *BASES))
  require_choice('base_optimizer', config.base_optimizer, BASES)
  if config.optimizer in BASES:
    _refuse_without_method(config)
  if not config.m_sharpness:
    return
  if config.sync_perturbation:
    raise UsageError(
        f'--m_sharpness={config.m_sharpness} perturbs group by group and '
        '--sync_perturbation the whole batch at once: choose one.'
    )
  share = num_replicas * config.m_sharpness
  if config.batch_size % share:
    raise UsageError(
        f'--m_sharpness={config.m_sharpness}: --batch_size={config.batch_size} must be '
        f'a multiple of {share} (examples a group x {num_replicas} devices).'
    )


def _refuse_without_method(config: Config) -> None:
  if config.base_optimizer != config.optimizer:
    raise UsageError(
        f'--optimizer={config.optimizer} is a base optimizer, so '
        f'--base_optimizer={config.base_optimizer} contradicts it: drop one of them.'
    )
  for name in ('rho', 'm_sharpness', 'sync_perturbation'):
    if getattr(config, name):
      raise UsageError(
          f'--{name}={getattr(config, name)} has no effect with '
          f'--optimizer={config.optimizer}: choose a sharpness-aware method '
          f'({", ".join(METHODS)}).'
      )


def num_groups(config: Config, num_replicas: int) -> int:
  """Groups of m-sharpness on each replica; 0 when it is off."""
  if not config.m_sharpness:
    return 0
  return config.batch_size // (num_replicas * config.m_sharpness)


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
  """The learning rate as a function of the update count.

  'step' multiplies by 0.2 at 30, 60 and 80 % of the epochs (the paper's), 'cosine'
  falls to zero at the last step. Warm-up rises linearly and shifts nothing: after it
  the schedule continues where it would have been.
  """
  total = config.epochs * steps_per_epoch
  if config.schedule == 'step':
    main = _steps(config, steps_per_epoch)
  elif config.schedule == 'cosine':
    main = optax.cosine_decay_schedule(config.learning_rate, total)
  else:
    main = optax.constant_schedule(config.learning_rate)
  warmup = round(config.warmup_epochs * steps_per_epoch)
  if not warmup:
    return main
  return lambda count: main(count) * jnp.minimum((count + 1) / warmup, 1.0)


def build(
    config: Config, steps_per_epoch: int, num_replicas: int = 1
) -> optax.GradientTransformationExtraArgs:
  """The whole chain, to be updated under an axis named `parallel.AXIS`.

  [mean over replicas] -> method -> mean over replicas -> [clip] -> [L2] -> base.

  Args:
    config: a resolved, validated configuration.
    steps_per_epoch: steps in an epoch, which the schedule is counted in.
    num_replicas: replicas over which the batch is dealt out.

  Returns:
    A transformation whose state holds ``gradient_norm``, ``learning_rate`` and, with a
    method, ``rho`` and ``perturbed_loss``.
  """
  chain = []
  if config.optimizer in METHODS:
    if config.sync_perturbation:
      chain.append(sam_jax.cross_replica_mean(AXIS))
    method = METHODS[config.optimizer].build(config)
    groups = num_groups(config, num_replicas)
    chain.append(sam_jax.m_sharpness(method, groups) if groups else method)
    chain.append(sam_jax.cross_replica_mean(AXIS))
  else:
    chain += [sam_jax.cross_replica_mean(AXIS), record_gradient_norm()]
  if config.clip_norm:
    chain.append(optax.clip_by_global_norm(config.clip_norm))
  if config.weight_decay and config.base_optimizer not in _DECOUPLED:
    chain.append(optax.add_decayed_weights(config.weight_decay))
  # Injected, so that the state tells the rate of the step just taken.
  base = optax.inject_hyperparams(
      lambda learning_rate: BASES[config.base_optimizer](config, learning_rate)
  )
  chain.append(base(learning_rate=learning_rate(config, steps_per_epoch)))
  return optax.chain(*chain)


class GradientNormState(NamedTuple):
  """State of `record_gradient_norm`."""

  gradient_norm: jax.Array


def record_gradient_norm() -> optax.GradientTransformation:
  """Passes updates on unchanged and keeps their global norm in the state."""

  def update_fn(updates, state, params=None):
    del params, state
    return updates, GradientNormState(optax.tree.norm(updates))

  def init_fn(params):
    return GradientNormState(
        jnp.zeros([], jnp.result_type(*jax.tree.leaves(params)))
    )

  return optax.GradientTransformation(init_fn, update_fn)


def _steps(config: Config, steps_per_epoch: int) -> optax.Schedule:
  """The paper's schedule; a boundary inside an epoch waits for its end."""
  boundaries = [
      -(-config.epochs * tenths // 10) * steps_per_epoch for tenths in _STEP_TENTHS
  ]
  rates = [
      config.learning_rate * _STEP_FACTOR**drops for drops in range(len(boundaries) + 1)
  ]
  return lambda count: jnp.asarray(rates)[jnp.sum(count >= jnp.asarray(boundaries))]
