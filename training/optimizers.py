"""Optimizer chains: a sharpness-aware method over a base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sam_jax
from training import methods
from training.config import Config, require_choice
from training.errors import UsageError
from training.sharing import Sharing

_STEP_TENTHS = (3, 6, 8)  # of the epochs
_STEP_FACTOR = 0.2
_LINEAR_END = 0.01

# Builders from the learning-rate schedule. Weight decay stands before them, as L2.
BASES: dict[str, Callable[..., optax.GradientTransformation]] = {
  'sgd': lambda config, rate, decay: optax.sgd(rate),
  'momentum': lambda config, rate, decay: optax.sgd(rate, config.momentum),
  'nesterov': lambda config, rate, decay: optax.sgd(
    rate, config.momentum, nesterov=True
  ),
  'adam': lambda config, rate, decay: optax.adam(rate),
  'adamw': lambda config, rate, decay: optax.adamw(rate, weight_decay=decay),
}
_DECOUPLED = ('adamw',)
WITH_MOMENTUM = ('momentum', 'nesterov')
# What may differ between the members of a population: fields of Config, and a factor
# on the learning rate. Where they are leaves of the state they take the fields' place.
VARIABLE = ('rho', 'learning_rate_scale', 'weight_decay')
# What only a method heeds, with the value at which it says nothing.
OF_METHODS = {
  'rho': None,
  'm_sharpness': None,
  'perturb_every': 1,
  'perturb_from': 0.0,
  'perturb_until': 0.0,
}


def refuse_unheeded(given: Iterable[str], configs: Iterable[Config]) -> None:
  """Refuses arguments that none of some configurations heeds.

  Args:
    given: names of the flags that a user set.
    configs: what the runs are.

  Raises:
    UsageError: names the flag and whose it is.
  """
  configs = list(configs)
  chosen = ','.join(sorted({config.optimizer for config in configs}))
  for flag in given:
    owners = methods.owners(flag, methods.found())
    if owners and all(value(config, flag) is None for config in configs):
      raise UsageError(
        f'--{flag} has no effect with --optimizer={chosen}: it belongs to '
        f'{", ".join(owners)}.'
      )
    if flag == 'momentum' and all(value(config, flag) is None for config in configs):
      bases = ','.join(sorted({config.base_optimizer for config in configs}))
      raise UsageError(
        f'--momentum has no effect with --base_optimizer={bases}: it belongs to '
        f'{", ".join(WITH_MOMENTUM)}.'
      )


def value(config: Config, flag: str) -> Any:
  """The value of a field, or of a flag of a method; None where it means nothing.

  Args:
    config: a resolved configuration.
    flag: name of a field of `Config`, or of the flag of a method's argument.
  """
  if not hasattr(config, flag):
    specs = methods.hyperparameters(config.optimizer).values()
    own = [spec.name for spec in specs if spec.flag == flag and spec.name != 'rho']
    return config.hyperparameters.get(own[0]) if own else None
  if flag in OF_METHODS and not methods.is_method(config.optimizer):
    return None
  if flag == 'momentum' and config.base_optimizer not in WITH_MOMENTUM:
    return None
  return getattr(config, flag)


def validate(config: Config) -> None:
  """Checks the optimizer's names and that its options go together.

  Raises:
    UsageError: names the field, its value and what it may be.
  """
  if not methods.is_method(config.optimizer):
    require_choice('optimizer', config.optimizer, (*methods.found(), *BASES))
  require_choice('base_optimizer', config.base_optimizer, BASES)
  if config.optimizer in BASES:
    _refuse_without_method(config)
  else:
    _check_method(config)


def _refuse_without_method(config: Config) -> None:
  if config.base_optimizer != config.optimizer:
    raise UsageError(
      f'--optimizer={config.optimizer} is a base optimizer, so '
      f'--base_optimizer={config.base_optimizer} contradicts it: drop one of them.'
    )
  for name, silent in OF_METHODS.items():
    if getattr(config, name) != silent:
      raise UsageError(
        f'--{name}={getattr(config, name)} has no effect with '
        f'--optimizer={config.optimizer}: choose a sharpness-aware method '
        f'({", ".join(methods.found())}).'
      )


def _check_method(config: Config) -> None:
  function = methods.get(config.optimizer)
  traits = function.traits
  if traits.needs_momentum and config.base_optimizer == 'sgd':
    raise UsageError(
      f'--optimizer={config.optimizer} follows a momentum buffer, which '
      '--base_optimizer=sgd has not: choose momentum, nesterov, adam or adamw.'
    )
  if _is_periodic(config) and (
    traits.wraps_base or traits.one_gradient or traits.period
  ):
    raise UsageError(
      f'--perturb_every, --perturb_from and --perturb_until do not go with '
      f'--optimizer={config.optimizer}, which has a period of its own or no clean '
      'gradient to fall back on.'
    )
  alone = traits.wraps_base or traits.one_gradient or traits.chooses_examples
  if alone and (config.m_sharpness or config.batch_size) != config.batch_size:
    raise UsageError(
      f'--m_sharpness={config.m_sharpness} does not go with '
      f'--optimizer={config.optimizer}: choose a method with an ascent of its own '
      'on each group, such as sam.'
    )
  build(config, 1)  # which refuses arguments that do not go together


def _is_periodic(config: Config) -> bool:
  return any(
    getattr(config, name) != silent
    for name, silent in OF_METHODS.items()
    if name.startswith('perturb_')
  )


def phase(config: Config, steps_per_epoch: int, step: int) -> bool | None:
  """Whether the method ascends in a step; None where it does in every one.

  The loop compiles one step a phase: a static branch costs nothing.
  """
  function = methods.get(config.optimizer)
  if function is None:
    return None
  if _is_periodic(config):
    start, stop = _active(config, steps_per_epoch)
    since = step - start
    return since >= 0 and since % config.perturb_every == 0 and step < stop
  if function.traits.period:
    known = {**config.hyperparameters, 'steps_per_epoch': steps_per_epoch}
    return step % known[function.traits.period] == 0
  return None


def _active(config: Config, steps_per_epoch: int) -> tuple[int, int]:
  """The first step that may run the method, and the first that may not any more."""
  until = config.perturb_until or config.epochs
  return round(config.perturb_from * steps_per_epoch), round(until * steps_per_epoch)


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
  """The learning rate as a function of the update count.

  'step' multiplies by 0.2 at 30, 60 and 80 % of the epochs (the paper's), 'cosine'
  falls to zero at the last step, 'linear' from the end of the warm-up to a hundredth.
  Warm-up rises linearly and shifts nothing else: after it the schedule continues where
  it would have been.
  """
  total = config.epochs * steps_per_epoch
  warmup = round(config.warmup_epochs * steps_per_epoch)
  if config.schedule == 'step':
    main = _steps(config, steps_per_epoch)
  elif config.schedule == 'cosine':
    main = optax.cosine_decay_schedule(config.learning_rate, total)
  elif config.schedule == 'linear':
    end = _LINEAR_END * config.learning_rate
    main = optax.linear_schedule(config.learning_rate, end, total - warmup, warmup)
  else:
    main = optax.constant_schedule(config.learning_rate)
  if not warmup:
    return main
  return lambda count: main(count) * jnp.minimum((count + 1) / warmup, 1.0)


def build(
  config: Config,
  steps_per_epoch: int,
  sharing: Sharing | None = None,
  axis_name: str | None = None,
  hyperparams: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """The whole chain.

  method -> [mean over replicas] -> [clip] -> [L2] -> base, with a method that wraps its
  base around all that follows it. Where the whole batch shares its perturbation the
  gradients that the chain is given are means over the replicas already, and nothing in
  it communicates.

  Args:
    config: a resolved, validated configuration.
    steps_per_epoch: steps in an epoch, which the schedule is counted in.
    sharing: who perturbs with whom; by default the whole batch.
    axis_name: the mapped axis of the replicas, where there is one.
    hyperparams: scalars, possibly traced, that take the place of the configuration's:
      'rho', 'weight_decay', 'learning_rate_scale' (a factor) and 'seed'.

  Returns:
    A transformation whose state holds ``gradient_norm``, ``learning_rate`` and, with a
    method, ``rho`` and ``perturbed_loss``.
  """
  sharing, given = sharing or Sharing(), hyperparams or {}
  axis_name = None if sharing.whole else axis_name
  mean = optax.identity()
  if axis_name is not None:
    mean = sam_jax.cross_replica_mean(axis_name)
  rate = _scaled_rate(config, steps_per_epoch, given)
  after = [mean, *_base(config, rate, given)]
  if not methods.is_method(config.optimizer):
    return optax.chain(mean, record_gradient_norm(), *after[1:])
  inner = optax.chain(*after)
  built = _method(config, steps_per_epoch, inner, rate, axis_name, given)
  if sharing.groups:
    built = sam_jax.m_sharpness(built, sharing.groups)
  wraps_base = methods.get(config.optimizer).traits.wraps_base
  return optax.chain(built, *([] if wraps_base else after))


def descent(
  config: Config, steps_per_epoch: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[Any], Any]]:
  """What a method hands to its base optimizer, over whole batches.

  That is its gradient, at w + eps-hat for SAM; of a method that wraps its base the
  update; with a base optimizer alone the clean gradient.

  Args:
    config: a resolved, validated configuration.
    steps_per_epoch: steps in an epoch.

  Returns:
    The transformation, and what finds its state in that of `build`.
  """
  if not methods.is_method(config.optimizer):
    return optax.with_extra_args_support(optax.identity()), lambda _: optax.EmptyState()
  rate = learning_rate(config, steps_per_epoch)
  after = optax.chain(optax.identity(), *_base(config, rate, {}))
  built = _method(config, steps_per_epoch, after, rate, None, {})
  return built, lambda opt_state: opt_state[0]


def _scaled_rate(
  config: Config, steps_per_epoch: int, given: Mapping[str, Any]
) -> optax.Schedule:
  """The learning rate, times a factor where one is given."""
  rate = learning_rate(config, steps_per_epoch)
  if 'learning_rate_scale' not in given:
    return rate
  return lambda count: given['learning_rate_scale'] * rate(count)


def _method(
  config: Config,
  steps_per_epoch: int,
  inner: optax.GradientTransformation,
  rate: optax.Schedule,
  axis_name: str | None,
  given: Mapping[str, Any],
) -> optax.GradientTransformationExtraArgs:
  """The configuration's method, run in the steps it is to run in."""
  provided = {
    'inner': inner,
    'learning_rate': rate,
    'steps_per_epoch': steps_per_epoch,
    'total_steps': config.epochs * steps_per_epoch,
    'axis_name': axis_name,
    'key': given.get('seed', config.seed),
  }
  rho = given.get('rho', config.rho)
  built = methods.build(config.optimizer, rho, config.hyperparameters, provided)
  if _is_periodic(config):
    start, stop = _active(config, steps_per_epoch)
    built = sam_jax.periodic(
      built, every=config.perturb_every, start=start, stop=stop, axis_name=axis_name
    )
  return built


def _base(
  config: Config, rate: optax.Schedule, given: Mapping[str, Any]
) -> list[optax.GradientTransformation]:
  """[clip] -> [L2] -> base optimizer."""
  chain = []
  decay = given.get('weight_decay', config.weight_decay)
  if config.clip_norm:
    chain.append(optax.clip_by_global_norm(config.clip_norm))
  has_decay = 'weight_decay' in given or config.weight_decay
  if has_decay and config.base_optimizer not in _DECOUPLED:
    chain.append(optax.add_decayed_weights(decay))
  # Injected, so that the state tells the rate of the step just taken.
  base = optax.inject_hyperparams(
    lambda learning_rate: BASES[config.base_optimizer](config, learning_rate, decay)
  )
  return [*chain, base(learning_rate=rate)]


def recorded(opt_state: Any) -> dict[str, Any]:
  """Scalars in an optimizer's state that tell of its last step, those it has."""
  is_array = lambda _, leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
  found = {
    name: optax.tree.get(opt_state, name, None, filtering=is_array)
    for name in ('perturbed_loss', 'gradient_norm', 'rho', 'learning_rate')
  }
  return {name: value for name, value in found.items() if value is not None}


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
