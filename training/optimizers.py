"""Optimizer chains: a sharpness-aware method over a base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sam_jax
from training.config import Config, require_choice
from training.errors import UsageError
from training.parallel import AXIS

_STEP_TENTHS = (3, 6, 8)  # of the epochs
_STEP_FACTOR = 0.2


class Surroundings(NamedTuple):
  """What some methods have to know of the chain they stand in.

  Attributes:
    base: what follows the method: mean over replicas, clipping, decay, base optimizer.
    learning_rate: its schedule.
    steps_per_epoch: updates in an epoch.
    total_steps: updates in the run.
  """

  base: optax.GradientTransformationExtraArgs
  learning_rate: optax.Schedule
  steps_per_epoch: int
  total_steps: int


class Method(NamedTuple):
  """A sharpness-aware method.

  Attributes:
    rho: its radius, unless a task has its own.
    build: the transformation from a configuration and the chain around it.
    wraps_base: whether it takes the base chain's place instead of preceding it.
    one_gradient: whether its loss is known only where it takes its one gradient.
    period: steps between its ascents, where these are a phase of its own.
    chooses_examples: whether its gradient function takes indices.
  """

  rho: float
  build: Callable[[Config, Surroundings], optax.GradientTransformationExtraArgs]
  wraps_base: bool = False
  one_gradient: bool = False
  period: Callable[[Config, int], int] | None = None
  chooses_examples: bool = False


def _asam(config, around):
  del around
  weights = True if config.adaptive_rule == 'all' else None
  return sam_jax.asam(config.rho, config.adaptive_eta, weights=weights, axis_name=AXIS)


def _gsam(config, around):
  rho = config.rho
  if config.gsam_rho_min is not None:
    rates = jax.vmap(around.learning_rate)(jnp.arange(around.total_steps))
    rho = sam_jax.gsam_rho(
      around.learning_rate,
      learning_rate_min=float(rates.min()),
      learning_rate_max=float(rates.max()),
      rho_min=config.gsam_rho_min,
      rho_max=config.rho,
    )
  return sam_jax.gsam(rho, config.gsam_alpha, axis_name=AXIS)


def _msam(config, around):
  buffer = 'mu' if config.base_optimizer in ('adam', 'adamw') else 'trace'
  return sam_jax.msam(around.base, config.rho, momentum=buffer, axis_name=AXIS)


def _universal(method, **fixed):
  """A builder of one of the instances of Universal SAM."""

  def build(config, around):
    del around
    given = {'lam': config.universal_lam, 'num_probes': config.num_probes or None}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {name: getattr(config, field) for name, field in fixed.items()}
    return method(
      config.rho,
      antithetic=config.antithetic,
      key=config.seed,
      axis_name=AXIS,
      **given,
    )

  return build


# A new method is one entry here; its hyperparameters are fields of Config.
METHODS: dict[str, Method] = {
  'sam': Method(
    0.05,
    lambda config, around: sam_jax.sam(
      config.rho, num_ascent_steps=config.num_ascent_steps, axis_name=AXIS
    ),
  ),
  'asam': Method(0.5, _asam),
  'usam': Method(0.05, lambda config, _: sam_jax.usam(config.rho, axis_name=AXIS)),
  'gsam': Method(0.05, _gsam),
  'wsam': Method(
    0.05,
    lambda config, around: sam_jax.wsam(config.rho, config.wsam_gamma, axis_name=AXIS),
  ),
  'decoupled_wsam': Method(
    0.05,
    lambda config, around: sam_jax.decoupled_wsam(
      around.base,
      around.learning_rate,
      config.rho,
      config.wsam_gamma,
      axis_name=AXIS,
    ),
    wraps_base=True,
  ),
  'looksam': Method(
    0.05,
    lambda config, around: sam_jax.looksam(
      config.rho, config.looksam_every, config.looksam_alpha, axis_name=AXIS
    ),
    period=lambda config, steps_per_epoch: config.looksam_every,
  ),
  'friendly_sam': Method(
    0.05,
    lambda config, around: sam_jax.friendly_sam(
      config.rho, config.friendly_sigma, config.friendly_decay, axis_name=AXIS
    ),
  ),
  'msam': Method(0.3, _msam, wraps_base=True, one_gradient=True),
  'esam': Method(
    0.05,
    lambda config, around: sam_jax.esam(
      config.rho,
      config.esam_beta,
      config.esam_gamma,
      key=config.seed,
      axis_name=AXIS,
    ),
    chooses_examples=True,
  ),
  'graphsam': Method(
    0.05,
    lambda config, around: sam_jax.graphsam(
      config.rho,
      config.graphsam_beta,
      config.graphsam_gamma,
      config.graphsam_epochs,
      steps_per_epoch=around.steps_per_epoch,
      axis_name=AXIS,
    ),
    one_gradient=True,
    period=lambda config, steps_per_epoch: steps_per_epoch,
  ),
  'trace_sam': Method(0.01, _universal(sam_jax.trace_sam)),
  'frob_sam': Method(0.005, _universal(sam_jax.frob_sam)),
  'det_sam': Method(1.0, _universal(sam_jax.det_sam, half_width='det_half_width')),
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
# What only a method heeds, with the value at which it says nothing.
_OF_METHODS = {
  'rho': None,
  'm_sharpness': 0,
  'sync_perturbation': False,
  'perturb_every': 1,
  'perturb_from': 0.0,
  'perturb_until': 0.0,
}
_UNIVERSAL = ('trace_sam', 'frob_sam', 'det_sam')
# The methods that heed a field which others do not.
_OWNERS = {
  'adaptive_eta': ('asam',),
  'adaptive_rule': ('asam',),
  'num_ascent_steps': ('sam',),
  'gsam_alpha': ('gsam',),
  'gsam_rho_min': ('gsam',),
  'wsam_gamma': ('wsam', 'decoupled_wsam'),
  'looksam_every': ('looksam',),
  'looksam_alpha': ('looksam',),
  'friendly_sigma': ('friendly_sam',),
  'friendly_decay': ('friendly_sam',),
  'esam_beta': ('esam',),
  'esam_gamma': ('esam',),
  'graphsam_beta': ('graphsam',),
  'graphsam_gamma': ('graphsam',),
  'graphsam_epochs': ('graphsam',),
  'universal_lam': _UNIVERSAL,
  'num_probes': _UNIVERSAL,
  'antithetic': _UNIVERSAL,
  'det_half_width': ('det_sam',),
}


def refuse_unheeded(given: Iterable[str], chosen: set[str]) -> None:
  """Refuses fields that none of the chosen optimizers heeds.

  Args:
    given: names of the fields that a user set.
    chosen: names of the optimizers.

  Raises:
    UsageError: names the field and whose it is.
  """
  for name in given:
    owners = _OWNERS.get(name)
    if owners and chosen.isdisjoint(owners):
      raise UsageError(
        f'--{name} has no effect with --optimizer={",".join(sorted(chosen))}: it '
        f'belongs to {", ".join(owners)}.'
      )


def validate(config: Config, num_replicas: int = 1) -> None:
  """Checks the optimizer's names and that its options go together.

  Raises:
    UsageError: names the field, its value and what it may be.
  """
  require_choice('optimizer', config.optimizer, (*METHODS, *BASES))
  require_choice('base_optimizer', config.base_optimizer, BASES)
  if config.optimizer in BASES:
    _refuse_without_method(config)
  else:
    _check_method(config)
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
  for name, silent in _OF_METHODS.items():
    if getattr(config, name) != silent:
      raise UsageError(
        f'--{name}={getattr(config, name)} has no effect with '
        f'--optimizer={config.optimizer}: choose a sharpness-aware method '
        f'({", ".join(METHODS)}).'
      )


def _check_method(config: Config) -> None:
  method = METHODS[config.optimizer]
  if config.optimizer == 'msam' and config.base_optimizer == 'sgd':
    raise UsageError(
      '--optimizer=msam follows a momentum buffer, which --base_optimizer=sgd has '
      'not: choose momentum, nesterov, adam or adamw.'
    )
  if config.optimizer == 'frob_sam' and config.num_probes == 1:
    raise UsageError('--num_probes=1: frob_sam takes a variance; give at least 2.')
  own = method.wraps_base or method.one_gradient or method.period
  if _is_periodic(config) and own:
    raise UsageError(
      f'--perturb_every, --perturb_from and --perturb_until do not go with '
      f'--optimizer={config.optimizer}, which has a period of its own or no clean '
      'gradient to fall back on.'
    )
  alone = method.wraps_base or method.one_gradient or method.chooses_examples
  if config.m_sharpness and alone:
    raise UsageError(
      f'--m_sharpness={config.m_sharpness} does not go with '
      f'--optimizer={config.optimizer}: choose a method with an ascent of its own '
      'on each group, such as sam.'
    )


def _is_periodic(config: Config) -> bool:
  return any(
    getattr(config, name) != silent
    for name, silent in _OF_METHODS.items()
    if name.startswith('perturb_')
  )


def num_groups(config: Config, num_replicas: int) -> int:
  """Groups of m-sharpness on each replica; 0 when it is off."""
  if not config.m_sharpness:
    return 0
  return config.batch_size // (num_replicas * config.m_sharpness)


def phase(config: Config, steps_per_epoch: int, step: int) -> bool | None:
  """Whether the method ascends in a step; None where it does in every one.

  The loop compiles one step a phase: a static branch costs nothing.
  """
  method = METHODS.get(config.optimizer)
  if method is None:
    return None
  if _is_periodic(config):
    start, stop = _active(config, steps_per_epoch)
    since = step - start
    return since >= 0 and since % config.perturb_every == 0 and step < stop
  if method.period:
    return step % method.period(config, steps_per_epoch) == 0
  return None


def _active(config: Config, steps_per_epoch: int) -> tuple[int, int]:
  """The first step that may run the method, and the first that may not any more."""
  until = config.perturb_until or config.epochs
  return round(config.perturb_from * steps_per_epoch), round(until * steps_per_epoch)


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

  [mean over replicas] -> method -> mean over replicas -> [clip] -> [L2] -> base, with
  a method that wraps its base around all that follows it.

  Args:
    config: a resolved, validated configuration.
    steps_per_epoch: steps in an epoch, which the schedule is counted in.
    num_replicas: replicas over which the batch is dealt out.

  Returns:
    A transformation whose state holds ``gradient_norm``, ``learning_rate`` and, with a
    method, ``rho`` and ``perturbed_loss``.
  """
  rate = learning_rate(config, steps_per_epoch)
  base = _base(config, rate)
  if config.optimizer not in METHODS:
    return optax.chain(sam_jax.cross_replica_mean(AXIS), record_gradient_norm(), *base)
  before = [sam_jax.cross_replica_mean(AXIS)] if config.sync_perturbation else []
  after = [sam_jax.cross_replica_mean(AXIS), *base]
  method = METHODS[config.optimizer]
  total = config.epochs * steps_per_epoch
  around = Surroundings(optax.chain(*after), rate, steps_per_epoch, total)
  built = method.build(config, around)
  if _is_periodic(config):
    start, stop = _active(config, steps_per_epoch)
    built = sam_jax.periodic(
      built, every=config.perturb_every, start=start, stop=stop, axis_name=AXIS
    )
  groups = num_groups(config, num_replicas)
  if groups:
    built = sam_jax.m_sharpness(built, groups)
  return optax.chain(*before, built, *([] if method.wraps_base else after))


def _base(config: Config, rate: optax.Schedule) -> list[Any]:
  """[clip] -> [L2] -> base optimizer."""
  chain = []
  if config.clip_norm:
    chain.append(optax.clip_by_global_norm(config.clip_norm))
  if config.weight_decay and config.base_optimizer not in _DECOUPLED:
    chain.append(optax.add_decayed_weights(config.weight_decay))
  # Injected, so that the state tells the rate of the step just taken.
  base = optax.inject_hyperparams(
    lambda learning_rate: BASES[config.base_optimizer](config, learning_rate)
  )
  return [*chain, base(learning_rate=rate)]


class GradientNormState(NamedTuple):
  """State of `record_gradient_norm`."""

  gradient_norm: jax.Array


def record_gradient_norm() -> optax.GradientTransformation:
  """Passes updates on unchanged and keeps their global norm in the state."""

  def update_fn(updates, state, params=None):
    del params, state
    return updates, GradientNormState(optax.tree.norm(updates))

  def init_fn(params):
    return GradientNormState(jnp.zeros([], jnp.result_type(*jax.tree.leaves(params))))

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
