"""The configuration of a run: every field is a flag of `train.py`."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import IO, Any

from sam_jax import methods as library
from sam_jax.measuring.files import write_json as write_json
from training import migration
from training.errors import UsageError

FILE_NAME = 'config.json'
_LOCK_NAME = '.lock'
# Of the steps of a run too, which are counted in int32.
_MAX_INT = 2**31 - 1
# Raised when a field changes its meaning; older files are brought up to date by `load`.
FORMAT = 2
SCHEDULES = ('step', 'cosine', 'linear', 'constant')
DTYPES = ('float32', 'bfloat16')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def _field(default: Any, help_text: str, *, may_change: bool = False) -> Any:
  """A field and its flag; one that may change does not alter what the run computes."""
  return dataclasses.field(
    default=default, metadata={'help': help_text, 'may_change': may_change}
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that decides what a run computes, with where its data lies.

  Units: learning rates and radii in those of the parameters, durations in epochs or
  steps as named, batch sizes in examples over all devices together.
  """

  task: str = _field(
    'digits_mlp', 'what is trained: a name, a .py file of your own, or package.module'
  )
  dataset: str = _field(
    '', 'data set by name (PROTEINS), or the path of your own where a task takes them'
  )
  scale: str = _field(
    '', 'another size of the task, where it has one: small is for a CPU'
  )
  model: str = _field(
    '', 'changes to the network, as depth=16,width=2,norm=none; tuples in quotes'
  )
  optimizer: str = _field('sgd', 'a sharpness-aware method, or a base optimizer alone')
  base_optimizer: str = _field('', 'the base optimizer that follows the method')
  rho: float | None = _field(None, "the method's perturbation radius")
  epochs: int = _field(50, 'passes over the training split')
  batch_size: int = _field(64, 'examples a step, over all devices together')
  learning_rate: float = _field(0.1, 'peak learning rate')
  schedule: str = _field(
    'step',
    'step (x0.2 at 30, 60, 80 % of the epochs), cosine, linear (to a hundredth) or '
    'constant',
  )
  warmup_epochs: float = _field(0.0, 'epochs of linear warm-up from zero')
  momentum: float = _field(0.9, 'of the base optimizers momentum and nesterov')
  weight_decay: float = _field(
    0.0, 'L2 coefficient, added to the gradient (adamw: decoupled)'
  )
  label_smoothing: float = _field(
    0.1,
    'probability spread over the wrong classes; losses are KL divergences from that',
  )
  hyperparameters: dict[str, Any] = dataclasses.field(
    default_factory=dict,
    hash=False,
    metadata={'help': "the method's other arguments, by name", 'may_change': False},
  )
  m_sharpness: int | None = _field(
    None, 'examples that share a perturbation, a divisor of --batch_size; unset: all'
  )
  grad_accum_steps: int = _field(
    1,
    'microbatches that each device takes its examples in, one after the other: the '
    'same step in less memory; a divisor of --batch_size',
  )
  perturb_every: int = _field(1, 'run the method every so many steps')
  perturb_from: float = _field(0.0, 'epoch from which on the method runs')
  perturb_until: float = _field(0.0, 'epoch until which the method runs; 0: the end')
  clip_norm: float = _field(0.0, "largest global norm of the update's gradient; 0: off")
  dtype: str = _field('float32', 'compute type, float32 or bfloat16')
  seed: int = _field(0, 'of initialisation, order of examples and dropout')
  split_seed: int = _field(0, 'of the random split into training and test examples')
  init_from: str = _field('', "start from the parameters of this other run's workdir")
  manual_dir: str = _field(
    '',
    "folder with the publisher's archive; unset, downloads/manual in --data_dir",
    may_change=True,
  )
  data_dir: str = _field(
    '',
    'folder in which each data set is prepared once and then read; unset, '
    '$TFDS_DATA_DIR or ~/tensorflow_datasets',
    may_change=True,
  )
  device_data_gib: float = _field(
    2.0,
    'data sets of up to so many GiB live on each device, larger ones are streamed',
    may_change=True,
  )
  data_workers: int = _field(
    0,
    'processes that decode streamed images, for each process of the run; 0: threads',
    may_change=True,
  )
  evaluate_every: int = _field(
    1, 'epochs between evaluations of the test split; the last epoch always is one'
  )
  log_every: int = _field(
    0, 'also write a metrics line every so many steps; 0: each epoch only'
  )
  checkpoint_every: int = _field(
    0,
    'steps between checkpoints; 0: each epoch, less often where epochs are short',
    may_change=True,
  )
  keep_checkpoints: int = _field(
    2, 'newest checkpoints that are kept; 0: all', may_change=True
  )


_CHOICES = {'schedule': SCHEDULES, 'dtype': DTYPES}
_AT_LEAST_ONE = (
  'epochs',
  'batch_size',
  'grad_accum_steps',
  'perturb_every',
  'evaluate_every',
)
_NOT_NEGATIVE = (
  'learning_rate',
  'warmup_epochs',
  'weight_decay',
  'clip_norm',
  'device_data_gib',
  'data_workers',
  'seed',
  'split_seed',
  'log_every',
  'checkpoint_every',
  'keep_checkpoints',
  'perturb_from',
  'perturb_until',
)
_BELOW_ONE = ('momentum', 'label_smoothing')
# Numbers of the arithmetic of a step, which is in float32.
_IN_FLOAT32 = ('rho', 'learning_rate', 'weight_decay', 'clip_norm', *_BELOW_ONE)


def validate(config: Config) -> None:
  """Checks the values that need no other module.

  Raises:
    UsageError: names the field, its value and what it may be.
  """
  for field in dataclasses.fields(Config):
    value = getattr(config, field.name)
    if isinstance(value, float) and not math.isfinite(value):
      raise UsageError(f'--{field.name}={value}: must be a finite number.')
    if type(value) is int:
      _require(config, field.name, value <= _MAX_INT, f'must be at most {_MAX_INT}')
  for name in _IN_FLOAT32:
    reason = library.lost_in_float32(getattr(config, name) or 0)
    _require(config, name, not reason, reason)
  for name, choices in _CHOICES.items():
    require_choice(name, getattr(config, name), choices)
  for names, allowed, reason in (
    (_AT_LEAST_ONE, lambda x: x >= 1, 'must be at least 1'),
    (_NOT_NEGATIVE, lambda x: x >= 0, 'must not be negative'),
    (_BELOW_ONE, lambda x: 0 <= x < 1, 'must be at least 0 and below 1'),
  ):
    for name in names:
      _require(config, name, allowed(getattr(config, name)), reason)
  _validate_together(config)


def _validate_together(config: Config) -> None:
  """Checks the radius, and the values that depend on others."""
  if config.rho is not None:
    _require(
      config,
      'rho',
      config.rho >= 0,
      'the radius must not be negative; 0 turns the perturbation off',
    )
  if config.m_sharpness is not None:
    _require(
      config,
      'm_sharpness',
      config.m_sharpness > 0 and config.batch_size % config.m_sharpness == 0,
      f'must divide --batch_size={config.batch_size}',
    )
  _require(
    config,
    'grad_accum_steps',
    config.batch_size % config.grad_accum_steps == 0,
    f'must divide --batch_size={config.batch_size}',
  )
  _require(
    config,
    'perturb_from',
    config.perturb_from < config.epochs,
    f'must be less than --epochs={config.epochs}',
  )
  if config.perturb_until:
    _require(
      config,
      'perturb_until',
      config.perturb_from < config.perturb_until <= config.epochs,
      f'must be above --perturb_from={config.perturb_from} and at most '
      f'--epochs={config.epochs}, or 0',
    )
  _require(
    config,
    'warmup_epochs',
    config.warmup_epochs < config.epochs,
    f'must be less than --epochs={config.epochs}',
  )


def check_size(config: Config, num_examples: int) -> None:
  """Checks a configuration against the size of its training split.

  Raises:
    UsageError: the split has no whole batch, or the steps are too many.
  """
  if config.batch_size > num_examples:
    raise UsageError(
      f'--batch_size={config.batch_size}: the training split has {num_examples} '
      'examples; give at most that.'
    )
  steps = config.epochs * (num_examples // config.batch_size)
  if steps > _MAX_INT:
    raise UsageError(
      f'--epochs={config.epochs}: {steps:,} steps are more than {_MAX_INT:,}: '
      'give fewer.'
    )


def require_choice(name: str, value: str, choices: Any) -> None:
  """Raises UsageError unless value is one of choices."""
  if value not in choices:
    raise UsageError(f'--{name}={value}: choose one of {", ".join(choices)}.')


def _require(config: Config, name: str, condition: bool, reason: str) -> None:
  if not condition:
    raise UsageError(f'--{name}={getattr(config, name)}: {reason}.')


def is_tested(config: Config, epoch: int) -> bool:
  """Whether the test split is evaluated after an epoch, counted from 1."""
  return epoch == config.epochs or epoch % config.evaluate_every == 0


def tested(config: Config, epochs: int) -> list[int]:
  """Those of the first so many epochs after which the test split is evaluated."""
  return [epoch for epoch in range(1, epochs + 1) if is_tested(config, epoch)]


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide the arithmetic."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'python': platform.python_version(), **found}


def save(config: Config, workdir: pathlib.Path) -> None:
  """Writes `config.json`, whole or not at all."""
  write_json(
    workdir / FILE_NAME,
    {
      'format': FORMAT,
      'config': dataclasses.asdict(config),
      'versions': versions(),
    },
  )


def load(workdir: str | os.PathLike[str]) -> Config:
  """Reads the configuration of a run.

  Raises:
    UsageError: there is none, or it cannot be read.
  """
  path = pathlib.Path(workdir) / FILE_NAME
  if not path.is_file():
    raise UsageError(
      f'{workdir} holds no run: {path} does not exist; give the --workdir of a '
      'train.py run.'
    )
  try:
    stored = json.loads(path.read_text())
    fields, number = stored['config'], stored.get('format', 1)
    if not isinstance(number, int) or number > FORMAT:
      raise UsageError(
        f'{path} has the format {number}, this version knows {FORMAT}: use the version '
        'that wrote it.'
      )
    if number == 1:
      fields = migration.from_format_1(fields)
    known = {field.name for field in dataclasses.fields(Config)}
    # Fields of an earlier version that are missing take their defaults.
    unknown = sorted(set(fields) - known)
    if unknown:
      raise UsageError(
        f'{path} has fields unknown to this version ({", ".join(unknown)}): use the '
        'version that wrote it.'
      )
    for name, value in fields.items():
      _require_type(name, value)
    return Config(**fields)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    if isinstance(error, UsageError):
      raise
    raise UsageError(
      f'{path} is damaged ({error}): restore it, or choose another --workdir.'
    ) from error


def _require_type(name: str, value: Any) -> None:
  """Raises TypeError if a stored value cannot be that of a field."""
  (wanted,) = (f.type for f in dataclasses.fields(Config) if f.name == name)
  kind, _, optional = str(wanted).partition(' | ')
  kinds = {'str': (str,), 'int': (int,), 'float': (int, float)}.get(kind, (dict,))
  if optional and value is None:
    return
  if not isinstance(value, kinds) or isinstance(value, bool):
    raise TypeError(f'{name} is {value!r}, and must be of the type {wanted}')


def label(config: Config) -> str:
  """A run's method in a few words: optimizer, base optimizer, radius."""
  radius = '' if config.rho is None else f', rho {config.rho:g}'
  base = config.base_optimizer
  over = f' over {base}' if base and base != config.optimizer else ''
  return f'{short(config.optimizer)}{over}{radius}'


def title(config: Config) -> str:
  """What a figure or a page of one run is headed with: its task, method and seed."""
  return f'{short(config.task)}: {label(config)}, seed {config.seed}'


def short(name: str) -> str:
  """The name of a task or method; of a file the name without its folder."""
  return pathlib.Path(name).stem if name.endswith('.py') else name


def check(config: Config, workdir: pathlib.Path) -> None:
  """Checks that workdir is this run's own, or free; changes nothing.

  Raises:
    UsageError: it belongs to another configuration, or holds other files.
  """
  if workdir.exists() and not workdir.is_dir():
    raise UsageError(f'--workdir={workdir} is not a folder: choose another.')
  if (workdir / FILE_NAME).exists():
    differing = differences(load(workdir), config)
    if differing:
      raise UsageError(
        f'--workdir={workdir} belongs to another configuration '
        f'({"; ".join(differing)}): choose another --workdir, or the same flags.'
      )
    return
  if not workdir.exists():
    return
  # A run killed while it was born leaves only these.
  own = (f'{FILE_NAME}.tmp', _LOCK_NAME)
  strangers = [p.name for p in workdir.iterdir() if p.name not in own]
  if strangers:
    raise UsageError(
      f'--workdir={workdir} is not empty and holds no {FILE_NAME} (but '
      f'{min(strangers)}): choose a new or empty folder.'
    )


def claim(config: Config, workdir: pathlib.Path) -> IO[str]:
  """Makes a checked workdir this run's own, until the file it returns is closed.

  Raises:
    UsageError: the folder cannot be written, or another process trains in it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = (workdir / _LOCK_NAME).open('w')
  except OSError as error:
    raise UsageError(
      f'--workdir={workdir} cannot be written ({error.strerror}): choose another '
      'folder.'
    ) from error
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    lock.close()
    raise UsageError(
      f'another process is training in --workdir={workdir}: wait for its end, or '
      'choose another folder.'
    ) from error
  try:
    if not (workdir / FILE_NAME).exists():
      save(config, workdir)
  except OSError:
    lock.close()
    raise
  return lock


def differences(old: Config, new: Config) -> list[str]:
  """Fields in which two configurations compute different things, as sentences."""
  return [
    f'{field.name} is {getattr(old, field.name)!r} there and '
    f'{getattr(new, field.name)!r} here'
    for field in dataclasses.fields(Config)
    if not field.metadata['may_change']
    and getattr(old, field.name) != getattr(new, field.name)
  ]
