"""Measures how sharp a trained network is, and writes the files of `hessian/`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import curvature, landscape, plotting
from training import checkpoints, losses
from training import config as config_lib
from training.config import Config
from training.errors import UsageError
from training.ticker import Ticker
from training.workload import Batch, Split, Workload

FOLDER = 'hessian'
SUMMARY, SPECTRUM, LANDSCAPE = 'summary.json', 'spectrum.npz', 'landscape.npz'
DENSITY_FIGURE, LANDSCAPE_FIGURE = 'spectral_density.png', 'landscape.png'
SPLITS, BATCH_NORMS, DTYPES = (
  ('train', 'test'),
  ('eval', 'train'),
  ('float32', 'float64'),
)
_RESAMPLES = 200


def _option(default: Any, help_text: str) -> Any:
  return dataclasses.field(default=default, metadata={'help': help_text})


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured; each field is a flag of `eval_hessian.py`."""

  split: str = _option('train', 'the examples of the loss: train or test')
  num_examples: int = _option(
    0, 'average over so many examples, drawn by --seed; 0: the whole split'
  )
  batch_norm: str = _option(
    'eval', "eval: the running statistics are constants; train: the batch's own"
  )
  dtype: str = _option('float32', 'of parameters and products, float32 or float64')
  top_k: int = _option(5, 'eigenvalues at each end')
  tol: float = _option(
    1e-4, 'residual of each eigenpair, relative to the largest |eigenvalue|'
  )
  max_num_matvecs: int = _option(2000, 'most products for one set of eigenpairs')
  max_basis_gib: float = _option(8.0, 'memory for Lanczos vectors; restarts stay below')
  num_matvecs: int = _option(60, 'Lanczos steps of each probe of the spectral density')
  num_probes: int = _option(4, 'random probes of the spectral density')
  trace_matvecs: int = _option(30, 'products for the trace')
  landscape_points: int = _option(21, 'points a side of the loss surface; 0: none')
  landscape_extent: float = _option(
    1.0, 'the surface reaches so far each way, in filter-normalised directions'
  )
  one_batch_repeats: int = _option(
    5, 'also measure single batches of the training size, so many; 0: none'
  )
  batch_size: int = _option(
    128, 'examples a product takes at a time; alters the result in train mode only'
  )
  seed: int = _option(0, 'of start vectors, probes, directions and drawn examples')

  def validate(self) -> None:
    """Checks the values.

    Raises:
      UsageError: names the flag, its value and what it may be.
    """
    for name, choices in (
      ('split', SPLITS),
      ('batch_norm', BATCH_NORMS),
      ('dtype', DTYPES),
    ):
      config_lib.require_choice(name, getattr(self, name), choices)
    least = {
      'num_examples': 0,
      'top_k': 1,
      'max_num_matvecs': 1,
      'num_matvecs': 1,
      'num_probes': 1,
      'trace_matvecs': 2,
      'landscape_points': 0,
      'one_batch_repeats': 0,
      'batch_size': 1,
      'seed': 0,
    }
    for name, smallest in least.items():
      if getattr(self, name) < smallest:
        raise UsageError(
          f'--{name}={getattr(self, name)}: must be at least {smallest}.'
        )
    for name in ('max_basis_gib', 'landscape_extent'):
      if not 0 < getattr(self, name) < math.inf:
        raise UsageError(f'--{name}={getattr(self, name)}: must be above 0.')
    if not 0 < self.tol < 1:
      raise UsageError(f'--tol={self.tol}: must be above 0 and below 1.')


class Network(NamedTuple):
  """A trained network with its data."""

  config: Config
  workload: Workload
  params: Any
  batch_stats: Any
  step: int


def restore(
  workdir: pathlib.Path, config: Config, build: Callable[[Config], Workload]
) -> Network:
  """Rebuilds the network of a workdir from its newest checkpoint.

  Args:
    workdir: the run's folder.
    config: its configuration; where its data lies may differ.
    build: makes the workload of a configuration.

  Raises:
    UsageError: there is no checkpoint, or it is of another model.
  """
  checkpoint = checkpoints.load(workdir)
  workload = build(config)
  variables = jax.eval_shape(
    workload.model.init, jax.random.key(0), workload.example_inputs
  )
  params, batch_stats = (
    checkpoints.from_arrays(
      checkpoints.select(checkpoint.arrays, name),
      variables.get(name, {}),
      f'the checkpoint in {workdir}',
    )
    for name in ('params', 'batch_stats')
  )
  return Network(config, workload, params, batch_stats, int(checkpoint.arrays['step']))


def measure(
  network: Network, workdir: pathlib.Path, options: Options
) -> dict[str, Any]:
  """Measures a network and writes the files of its folder `hessian/`.

  What is there already for the same parameters and options is read, not measured again.

  Args:
    network: from `restore`.
    workdir: the run's folder.
    options: what to measure.

  Returns:
    What `summary.json` says.

  Raises:
    UsageError: an option does not fit the network.
  """
  folder = workdir / FOLDER
  fingerprint = _fingerprint(network, options)
  found = read(workdir)
  if found and found['fingerprint'] == fingerprint:
    return found
  folder.mkdir(exist_ok=True)
  ticker = Ticker()
  try:
    with jax.enable_x64(options.dtype == 'float64'):
      summary = _Measurement(network, options, folder, ticker).run()
  except curvature.NonFiniteError as error:
    raise UsageError(
      f'the Hessian of {workdir} is not finite: its parameters or its data hold NaN '
      'or infinity; train again with a lower --learning_rate.'
    ) from error
  except ValueError as error:
    raise UsageError(f'{workdir} cannot be measured: {error}.') from error
  finally:
    ticker.clear()
  summary['fingerprint'] = fingerprint
  config_lib.write_json(folder / SUMMARY, summary)
  return summary


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished measurement, or None."""
  path = workdir / FOLDER / SUMMARY
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def read_density(workdir: pathlib.Path) -> curvature.SpectralDensity:
  """The spectral density of a finished measurement."""
  names = [field.name for field in dataclasses.fields(curvature.SpectralDensity)]
  with np.load(workdir / FOLDER / SPECTRUM) as arrays:
    values = {name: arrays[name] for name in names}
  return curvature.SpectralDensity(
    **{name: value if value.ndim else value.item() for name, value in values.items()}
  )


class _Measurement:
  """The parts of one measurement, which share the operator and the examples."""

  def __init__(
    self, network: Network, options: Options, folder: pathlib.Path, ticker: Ticker
  ):
    self._network = network
    self._options = options
    self._folder = folder
    self._ticker = ticker
    self._key = jax.random.key(options.seed)
    # Sharpness is that of the loss in full precision, whatever training computed in.
    self._config = dataclasses.replace(network.config, dtype='float32')
    self._params = _cast(network.params, options.dtype)
    self._batch_stats = _cast(network.batch_stats, options.dtype)
    self._train_mode = options.batch_norm == 'train' and bool(network.batch_stats)
    self._model = network.workload.model
    if self._train_mode and hasattr(self._model, 'dropout_rate'):
      self._model = self._model.clone(dropout_rate=0.0)
    split = getattr(network.workload, options.split)
    self._batches = list(self._draw(split, options.batch_size, options.num_examples))
    self._operator = self._hessian(self._batches)
    self._seconds: dict[str, float] = {}
    self._products: dict[str, int] = {}

  def run(self) -> dict[str, Any]:
    """Measures everything; the summary."""
    pairs = self._timed('eigenpairs', self._eigenpairs, self._operator)
    adaptive = self._timed('adaptive_sharpness', self._adaptive)
    density = self._timed('spectral_density', self._density, pairs)
    trace = self._timed('trace', self._trace, pairs)
    examples = self._timed('examples', self._over_examples, pairs)
    one_batch = self._timed('one_batch', self._one_batch)
    evaluation = self._timed('evaluation', self._evaluate)
    if self._options.landscape_points:
      self._timed('landscape', self._landscape)
    self._save_spectrum(pairs, density)
    frobenius = density.moment(2)
    return _plain(
      {
        **self._facts(),
        **_extremes(pairs, self._options.top_k),
        'lambda_max_standard_error': examples['lambda_max'],
        'lambda_min_standard_error': examples['lambda_min'],
        'lambda_max_over_abs_lambda_min_standard_error': examples['ratio'],
        'adaptive_sharpness': adaptive.eigenvalues[0],
        'adaptive_sharpness_residual': adaptive.residuals[0],
        'adaptive_sharpness_converged': adaptive.converged[0],
        'trace': trace.value,
        'trace_standard_error': trace.standard_error,
        'squared_frobenius_norm': frobenius.value,
        'squared_frobenius_norm_standard_error': frobenius.standard_error,
        'one_batch': one_batch,
        'evaluation': evaluation,
        'num_matvecs': sum(self._products.values()),
        'num_matvecs_by_part': self._products,
        'seconds': sum(self._seconds.values()),
        'seconds_by_part': self._seconds,
        'options': dataclasses.asdict(self._options),
        'versions': config_lib.versions(),
      }
    )

  def _facts(self) -> dict[str, Any]:
    config, options = self._network.config, self._options
    mode = options.batch_norm if self._network.batch_stats else 'none in this model'
    return {
      'task': config.task,
      'optimizer': config.optimizer,
      'base_optimizer': config.base_optimizer,
      'rho': config.rho,
      'seed': config.seed,
      'step': self._network.step,
      'num_parameters': self._operator.size,
      'split': options.split,
      'num_examples': round(self._operator.num_examples),
      'batch_norm': mode,
      'dtype': options.dtype,
      'matmul_precision': 'highest',
      'device': jax.devices()[0].device_kind,
      'notes': _NOTES,
    }

  def _eigenpairs(self, operator: curvature.Operator) -> curvature.Eigenpairs:
    return curvature.eigenpairs(
      operator,
      self._options.top_k,
      'both',
      tol=self._options.tol,
      key=self._key,
      max_num_matvecs=self._options.max_num_matvecs,
      max_basis_gib=self._options.max_basis_gib,
      progress=self._report('eigenpairs'),
    )

  def _adaptive(self) -> curvature.Eigenpairs:
    # Every parameter is scaled, biases too: only then is the result invariant.
    scaled = curvature.preconditioned(
      self._operator, jax.tree.map(jnp.abs, self._params)
    )
    return curvature.eigenpairs(
      scaled,
      1,
      'largest',
      tol=self._options.tol,
      key=self._key,
      max_num_matvecs=self._options.max_num_matvecs,
      max_basis_gib=self._options.max_basis_gib,
      progress=self._report('adaptive sharpness'),
    )

  def _density(self, pairs: curvature.Eigenpairs) -> curvature.SpectralDensity:
    self._ticker.show('spectral density')
    return curvature.spectral_density(
      self._operator,
      self._options.num_matvecs,
      self._options.num_probes,
      key=jax.random.fold_in(self._key, 1),
      pairs=pairs,
      max_basis_gib=self._options.max_basis_gib,
    )

  def _trace(self, pairs: curvature.Eigenpairs) -> curvature.Estimate:
    self._ticker.show('trace')
    return curvature.trace(
      self._operator,
      self._options.trace_matvecs,
      key=jax.random.fold_in(self._key, 2),
      pairs=pairs,
    )

  def _over_examples(self, pairs: curvature.Eigenpairs) -> dict[str, float]:
    """Bootstrap standard errors over examples, the eigenvectors held fixed.

    To first order the eigenvalue of a resample is the mean of ``v . H_i v`` over it.
    """
    curvatures = []
    for index in (0, -1):
      vector = pairs.eigenvectors[index]
      parts = [
        _example_curvatures(self._logits, self._smoothing, self._params, vector, batch)
        for batch in self._batches
      ]
      curvatures.append(_real(parts, self._batches))
    top, bottom = _resampled_means(np.stack(curvatures), self._options.seed)
    with np.errstate(divide='ignore', invalid='ignore'):
      ratio = top / np.abs(bottom)
    return {
      'lambda_max': top.std(ddof=1),
      'lambda_min': bottom.std(ddof=1),
      # Half the middle 68 %: a lambda_min that may be 0 leaves no standard deviation.
      'ratio': np.subtract(*np.quantile(ratio, (0.84, 0.16))) / 2,
    }

  def _one_batch(self) -> dict[str, Any] | None:
    """Extremes of the Hessian of single batches of the training size."""
    repeats, size = self._options.one_batch_repeats, self._config.batch_size
    if not repeats:
      return None
    split = getattr(self._network.workload, self._options.split)
    drawn = self._draw(split, size, min(repeats * size, split.num_examples))
    extremes = []
    for number, batch in enumerate(drawn, 1):
      if losses.num_examples(batch) < size:
        continue
      self._ticker.show(f'single batch {number}/{repeats}')
      pairs = curvature.eigenpairs(
        self._hessian([batch]),
        1,
        'both',
        tol=self._options.tol,
        key=self._key,
        verify=False,
        max_basis_gib=self._options.max_basis_gib,
      )
      self._count('one_batch', pairs.num_matvecs)
      extremes.append((pairs.eigenvalues[0], pairs.eigenvalues[-1]))
    if not extremes:
      return None
    top, bottom = np.array(extremes).T
    # A batch whose lambda_min is next to 0 has any ratio: so its median and range.
    ratios = top / np.abs(bottom)
    several = len(extremes) > 1
    return {
      'batch_size': size,
      'num_batches': len(extremes),
      'lambda_max': top.mean(),
      'lambda_max_standard_deviation': top.std(ddof=1) if several else None,
      'lambda_min': bottom.mean(),
      'lambda_min_standard_deviation': bottom.std(ddof=1) if several else None,
      'ratio_median': np.median(ratios),
      'ratio_range': [ratios.min(), ratios.max()],
    }

  def _evaluate(self) -> dict[str, float]:
    """Loss and accuracy of both splits in evaluation mode, with standard errors."""
    result, squares = {}, 0.0
    for name in SPLITS:
      split = getattr(self._network.workload, name)
      batches = list(self._draw(split, self._options.batch_size, 0))
      parts = [
        _example_scores(self._eval_logits, self._smoothing, self._params, batch)
        for batch in batches
      ]
      for quantity, values in zip(
        ('loss', 'accuracy'), zip(*parts, strict=True), strict=True
      ):
        values = _real(values, batches)
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        result[f'{name}_{quantity}'] = values.mean()
        result[f'{name}_{quantity}_standard_error'] = error
      squares += result[f'{name}_loss_standard_error'] ** 2
    result['generalization_gap'] = result['test_loss'] - result['train_loss']
    result['generalization_gap_standard_error'] = math.sqrt(squares)
    return result

  def _landscape(self) -> landscape.Landscape:
    """The loss surface along two filter-normalised random directions."""
    extent = self._options.landscape_extent
    axis = np.linspace(-extent, extent, self._options.landscape_points)
    directions = landscape.random_directions(
      jax.random.fold_in(self._key, 3), self._params
    )
    result = landscape.surface(
      self._loss,
      self._params,
      directions,
      axis,
      axis,
      self._batches,
      weight=losses.num_examples,
      progress=lambda n, total: self._ticker.show(f'landscape: point {n}/{total}'),
    )
    result.save(self._folder / LANDSCAPE)
    plotting.landscape(result).savefig(self._folder / LANDSCAPE_FIGURE)
    return result

  def _save_spectrum(
    self, pairs: curvature.Eigenpairs, density: curvature.SpectralDensity
  ) -> None:
    np.savez(
      self._folder / SPECTRUM,
      eigenvalues=pairs.eigenvalues,
      residuals=pairs.residuals,
      converged=pairs.converged,
      **dataclasses.asdict(density),
    )
    plotting.spectral_density(density).savefig(self._folder / DENSITY_FIGURE)

  def _hessian(self, batches: list[Batch]) -> curvature.HessianOperator:
    return curvature.hessian(
      self._loss, self._params, batches, weight=losses.num_examples
    )

  def _loss(self, params: Any, batch: Batch) -> jax.Array:
    loss = losses.loss_fn(self._model, self._config)
    return loss(
      params, self._batch_stats, batch, train=self._train_mode, key=self._key
    )[0]

  def _logits(self, params: Any, batch: Batch) -> jax.Array:
    return losses.apply(
      self._model,
      params,
      self._batch_stats,
      batch['inputs'],
      train=self._train_mode,
      key=self._key,
    )[0]

  def _eval_logits(self, params: Any, batch: Batch) -> jax.Array:
    return losses.apply(self._model, params, self._batch_stats, batch['inputs'])[0]

  @property
  def _smoothing(self) -> float:
    return self._config.label_smoothing

  def _draw(self, split: Split, batch_size: int, count: int) -> Iterator[Batch]:
    """Batches of a split in its order, or of some of its examples at random."""
    if count > split.num_examples:
      raise UsageError(
        f'--num_examples={count}: the {self._options.split} split has '
        f'{split.num_examples}; give at most that, or 0 for all.'
      )
    seed = self._options.seed if count else None
    left = count or split.num_examples
    for batch in split.batches(batch_size, seed=seed).epoch(0):
      weights = np.array(batch['weights'])
      # The examples too many in the last batch keep their place, without weight.
      weights[np.cumsum(weights) > left] = 0
      left -= weights.sum()
      yield _cast({**batch, 'weights': weights}, self._options.dtype)
      if left <= 0:
        return

  def _report(self, name: str) -> Callable[[curvature.Progress], None]:
    def show(progress: curvature.Progress) -> None:
      self._ticker.show(
        f'{name}: {progress.num_matvecs} products, {progress.num_converged} of '
        f'{progress.num_wanted} converged, residual {progress.residual:.1e}'
      )

    return show

  def _timed(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
    started, products = time.perf_counter(), self._operator.num_matvecs
    result = part(*arguments)
    self._seconds[name] = time.perf_counter() - started
    self._count(name, self._operator.num_matvecs - products)
    return result

  def _count(self, name: str, products: int) -> None:
    if products:
      self._products[name] = self._products.get(name, 0) + products


_NOTES = {
  'residual': '|H v - lambda v|, measured: an eigenvalue lies within it of lambda',
  'lambda_min': 'the algebraically smallest eigenvalue',
  'lambda_max_standard_error': (
    'bootstrap over examples with the eigenvector held fixed'
  ),
  'adaptive_sharpness': (
    'largest eigenvalue of T H T with T = |w| of every parameter: does not change '
    'when layers are rescaled without changing the function'
  ),
  'one_batch': (
    'extremes of the Hessian of single batches of the training size: mean and '
    'standard deviation over batches; of the ratio the median and the range'
  ),
}


def _example_losses(logits_fn, smoothing, params, batch):
  return losses.smoothed_kl(logits_fn(params, batch), batch['labels'], smoothing)


@jax.jit(static_argnums=(0, 1))
def _example_scores(logits_fn, smoothing, params, batch):
  """Loss of each example, and whether it is classified right."""
  logits = logits_fn(params, batch)
  correct = jnp.argmax(logits, axis=-1) == batch['labels']
  return losses.smoothed_kl(logits, batch['labels'], smoothing), correct


@jax.jit(static_argnums=(0, 1))
def _example_curvatures(logits_fn, smoothing, params, vector, batch):
  """Second derivative of each example's loss along a direction."""

  def along(t):
    moved = jax.tree.map(lambda p, v: p + t * v, params, vector)
    return _example_losses(logits_fn, smoothing, moved, batch)

  def slope(t):
    return jax.jvp(along, (t,), (jnp.ones_like(t),))[1]

  zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
  return jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]


def _real(parts, batches) -> np.ndarray:
  """The values of real examples, float64 (num_examples,)."""
  return np.concatenate(
    [
      np.asarray(part, np.float64)[np.asarray(batch['weights']) > 0]
      for part, batch in zip(parts, batches, strict=True)
    ]
  )


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
  """Means of (r, n) values over bootstrap resamples of the n, (r, resamples)."""
  rng = np.random.default_rng(seed)
  count = values.shape[1]
  return np.stack(
    [values[:, rng.integers(count, size=count)].mean(1) for _ in range(_RESAMPLES)],
    axis=1,
  )


def _extremes(pairs: curvature.Eigenpairs, k: int) -> dict[str, Any]:
  entries = [
    {'eigenvalue': value, 'residual': residual, 'converged': converged}
    for value, residual, converged in zip(
      pairs.eigenvalues, pairs.residuals, pairs.converged, strict=True
    )
  ]
  values = pairs.eigenvalues
  return {
    'lambda_max': values[0],
    'lambda_max_residual': pairs.residuals[0],
    'lambda_min': values[-1],
    'lambda_min_residual': pairs.residuals[-1],
    'top': entries[:k],
    'bottom': entries[-k:],
    'all_converged': pairs.converged.all(),
    'no_copies_missed': pairs.verified,
    'lambda_max_over_abs_lambda_min': _divide(values[0], abs(values[-1])),
    'lambda_1_over_lambda_5': _divide(values[0], values[4]) if k >= 5 else None,
  }


def _divide(numerator: float, denominator: float) -> float | None:
  return float(numerator / denominator) if denominator else None


def _cast(tree: Any, dtype: str) -> Any:
  """Floating-point leaves in a type."""
  return jax.tree.map(
    lambda leaf: (
      np.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )


def _fingerprint(network: Network, options: Options) -> str:
  """Changes with the parameters, the configuration or the options."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves((network.params, network.batch_stats)):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  for part in (network.config, options):
    digest.update(json.dumps(dataclasses.asdict(part), sort_keys=True).encode())
  return digest.hexdigest()


def _plain(value: Any) -> Any:
  """NumPy numbers as Python's, and what is not finite as null, for JSON."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def describe(summary: dict[str, Any]) -> str:
  """A summary in a few lines of text."""
  s = summary
  ratio = s['lambda_max_over_abs_lambda_min']
  shown = '-' if ratio is None else f'{ratio:.1f}'
  converged = 'all converged' if s['all_converged'] else 'NOT all converged'
  return (
    f'  lambda_max {s["lambda_max"]:.5g} (residual {s["lambda_max_residual"]:.1e})  '
    f'lambda_min {s["lambda_min"]:.5g} (residual {s["lambda_min_residual"]:.1e})  '
    f'ratio {shown}, {converged}\n'
    f'  trace {s["trace"]:.5g} ± {s["trace_standard_error"]:.2g}  '
    f'adaptive sharpness {s["adaptive_sharpness"]:.5g}\n'
    f'  {s["num_parameters"]:,} parameters, {s["num_examples"]} {s["split"]} '
    f'examples, {s["num_matvecs"]} products, {s["seconds"]:.1f} s'
  )
