"""Measures how sharp a trained network is, and writes the files of `hessian/`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import sam_jax
from sam_jax import curvature, plotting
from training import config as config_lib
from training import losses
from training.errors import UsageError
from training.sharpness import bootstrap, files, landscapes
from training.sharpness.files import Part, Parts
from training.sharpness.network import Network
from training.sharpness.objective import (
  Objective,
  example_curvatures,
  example_scores,
  of_examples,
)
from training.sharpness.options import SPLITS, Options
from training.ticker import Ticker


def measure(network: Network, folder: pathlib.Path, options: Options) -> dict[str, Any]:
  """Measures a network and writes the files of a folder.

  What is there already for the same parameters and options is read, not measured again;
  a measurement that was killed goes on where it stood.

  Args:
    network: from `restore`.
    folder: where the files go, made where it is missing.
    options: what to measure.

  Returns:
    What `summary.json` says.

  Raises:
    UsageError: an option does not fit the network.
  """
  fingerprint = _fingerprint(network, options)
  found = files.read(folder)
  if found and found['fingerprint'] == fingerprint:
    return found
  with files.claim(folder):
    summary = _measured(network, folder, options, fingerprint)
  return summary


def _measured(network, folder, options, fingerprint) -> dict[str, Any]:
  """Measures anew, or the rest of what was killed."""
  ticker = Ticker()
  try:
    with jax.enable_x64(options.dtype == 'float64'):
      measurement = _Measurement(network, options, folder, ticker, fingerprint)
      summary = measurement.run()
  except curvature.NonFiniteError as error:
    raise UsageError(
      f'the Hessian of {network.workdir} is not finite: its parameters or its data '
      'hold NaN or infinity; train again with a lower --learning_rate.'
    ) from error
  except ValueError as error:
    if isinstance(error, UsageError):
      raise
    reason = str(error).rstrip('.')
    raise UsageError(f'{network.workdir} cannot be measured: {reason}.') from error
  finally:
    ticker.clear()
  summary['fingerprint'] = fingerprint
  config_lib.write_json(folder / files.SUMMARY, summary)
  measurement.parts.remove()
  return summary


class _Measurement:
  """The parts of one measurement, which share the operator and the examples."""

  def __init__(
    self,
    network: Network,
    options: Options,
    folder: pathlib.Path,
    ticker: Ticker,
    fingerprint: str,
  ):
    self._network = network
    self._options = options
    self._folder = folder
    self._ticker = ticker
    self._fingerprint = fingerprint
    self._key = jax.random.key(options.seed)
    self._objective = Objective(network, options)
    self._operator = self._objective.operator(self._objective.batches)
    if options.top_k > self._operator.size:
      raise UsageError(
        f'--top_k={options.top_k}: only {self._operator.size} parameters are measured.'
      )
    landscapes.check(network, options)
    self.parts = Parts(folder, fingerprint, self._operator.structure)
    self._journals: list[curvature.Operator] = []
    self._done: dict[str, Part] = {}

  def run(self) -> dict[str, Any]:
    """Measures everything; the summary."""
    pairs = self._part('eigenpairs', self._eigenpairs)
    adaptive = self._part('adaptive_sharpness', self._adaptive)
    density = self._part('spectral_density', lambda name: self._density(name, pairs))
    result = {
      **self._facts(),
      **_extremes(pairs, self._options.top_k, self._operator.size),
      **self._part('examples', lambda _: self._over_examples(pairs)),
      'adaptive_sharpness': adaptive.eigenvalues[0],
      'adaptive_sharpness_residual': adaptive.residuals[0],
      'adaptive_sharpness_converged': adaptive.converged[0],
      **self._part('trace', lambda name: self._trace(name, pairs)),
      **_estimate('squared_frobenius_norm', density.moment(2)),
      **self._part('worst_case', self._worst_case),
      **self._part('average_case', self._average_case),
      'layers': self._part('layers', self._layers),
      'one_batch': self._part('one_batch', self._one_batch),
      'evaluation': self._part('evaluation', self._evaluate),
    }
    result |= self._part('landscape', lambda _: self._landscapes(pairs))
    self._save_spectrum(pairs, density)
    products = {name: p.num_matvecs for name, p in self._done.items() if p.num_matvecs}
    seconds = {name: part.seconds for name, part in self._done.items()}
    return _plain(
      {
        **result,
        'num_matvecs': sum(products.values()),
        'num_matvecs_by_part': products,
        'seconds': sum(seconds.values()),
        'seconds_by_part': seconds,
        'options': dataclasses.asdict(self._options),
        'versions': config_lib.versions(),
      }
    )

  def _part(self, name: str, compute: Callable[[str], Any]) -> Any:
    """The value of a part: as it was kept, or computed and kept."""
    part = self.parts.load(name)
    if part is None:
      started = time.perf_counter()
      value = compute(name)
      if not isinstance(value, curvature.Eigenpairs | curvature.SpectralDensity):
        value = _plain(value)
      products = sum(operator.num_matvecs for operator in self._journals)
      self._journals.clear()
      part = Part(value, time.perf_counter() - started, products)
      self.parts.save(name, part)
    self._done[name] = part
    return part.value

  def _journaled(self, name: str, operator: curvature.Operator) -> curvature.Operator:
    """An operator whose products a restart need not repeat; they are counted."""
    made = curvature.journaled(
      operator,
      self.parts.journal(name),
      identity=self._fingerprint,
      max_gib=self._options.max_journal_gib,
    )
    self._journals.append(made)
    return made

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
      'operator': options.operator,
      'preconditioner': options.preconditioner,
      'params_regex': options.params_regex,
      'num_parameters': self._operator.size,
      'split': options.split,
      'num_examples': round(
        float(sum(losses.num_examples(batch) for batch in self._objective.batches))
      ),
      'batch_norm': mode,
      'dtype': options.dtype,
      'matmul_precision': 'highest',
      'device': jax.devices()[0].device_kind,
      'notes': _NOTES,
    }

  def _eigenpairs(self, name: str) -> curvature.Eigenpairs:
    return self._search(name, self._operator, self._options.top_k, 'both', 'eigenpairs')

  def _adaptive(self, name: str) -> curvature.Eigenpairs:
    # Every parameter is scaled, biases too: only then is the result invariant.
    options = dataclasses.replace(self._options, preconditioner='adaptive')
    scaled = Objective(self._network, options)
    operator = scaled.operator(self._objective.batches)
    return self._search(name, operator, 1, 'largest', 'adaptive sharpness')

  def _search(self, name, operator, k, which, title, verify=True):
    """Eigenpairs under the options, with progress."""

    def show(progress: curvature.Progress) -> None:
      self._ticker.show(
        f'{title}: {progress.num_matvecs} products, {progress.num_converged} of '
        f'{progress.num_wanted} converged, residual {progress.residual:.1e}'
      )

    return curvature.eigenpairs(
      self._journaled(name, operator),
      k,
      which,
      tol=self._options.tol,
      key=self._key,
      max_num_matvecs=self._options.max_num_matvecs,
      max_basis_gib=self._options.max_basis_gib,
      verify=verify,
      progress=show,
    )

  def _density(self, name: str, pairs) -> curvature.SpectralDensity:
    self._ticker.show('spectral density')
    return curvature.spectral_density(
      self._journaled(name, self._operator),
      self._options.num_matvecs,
      self._options.num_probes,
      key=jax.random.fold_in(self._key, 1),
      pairs=pairs,
      max_basis_gib=self._options.max_basis_gib,
    )

  def _trace(self, name: str, pairs: curvature.Eigenpairs) -> dict[str, float]:
    self._ticker.show('trace')
    estimate = curvature.trace(
      self._journaled(name, self._operator),
      self._options.trace_matvecs,
      key=jax.random.fold_in(self._key, 2),
      pairs=pairs,
    )
    return _estimate('trace', estimate)

  def _over_examples(self, pairs: curvature.Eigenpairs) -> dict[str, float]:
    """Bootstrap standard errors over examples, the eigenvectors held fixed."""
    objective = self._objective
    values = []
    for index in (0, -1):
      direction = objective.direction(pairs.eigenvectors[index])
      parts = [
        example_curvatures(
          objective, self._options.operator, objective.params, direction, batch
        )
        for batch in objective.batches
      ]
      values.append(of_examples(parts, objective.batches))
    errors = bootstrap.extremes(*values, self._options.seed)
    return {
      'lambda_max_standard_error': errors['lambda_max'],
      'lambda_min_standard_error': errors['lambda_min'],
      'lambda_max_over_abs_lambda_min_standard_error': errors['ratio'],
    }

  def _worst_case(self, _: str) -> dict[str, float | None]:
    """The largest rise of the loss within a ball, group by group."""
    options = self._options
    if not options.worst_case_rho:
      return _estimate('worst_case_sharpness', None)
    self._ticker.show('worst-case sharpness')
    groups = self._objective.draw(
      options.split, options.worst_case_group, options.num_examples
    )
    estimate = sam_jax.sharpness.worst_case(
      self._objective.loss,
      self._objective.params,
      list(groups),
      options.worst_case_rho,
      norm=options.worst_case_norm,
      adaptive=options.adaptive_ball,
      num_steps=options.worst_case_steps,
      key=jax.random.fold_in(self._key, 4),
      weight=losses.num_examples,
    )
    # A single group says nothing of how the groups spread.
    error = estimate.standard_error or None
    return _estimate('worst_case_sharpness', estimate._replace(standard_error=error))

  def _average_case(self, _: str) -> dict[str, float | None]:
    """The mean rise of the loss under Gaussian noise in the parameters."""
    options = self._options
    if not options.average_case_sigma:
      return _estimate('average_case_sharpness', None)
    self._ticker.show('average-case sharpness')
    estimate = sam_jax.sharpness.average_case(
      self._objective.loss,
      self._objective.params,
      self._objective.batches,
      options.average_case_sigma,
      adaptive=options.adaptive_ball,
      num_samples=options.average_case_samples,
      key=jax.random.fold_in(self._key, 5),
      weight=losses.num_examples,
    )
    return _estimate('average_case_sharpness', estimate)

  def _layers(self, name: str) -> list[dict[str, Any]] | None:
    """Trace and largest eigenvalue of the block of each layer."""
    if not self._options.per_layer:
      return None
    self._ticker.show('traces of the layers')
    estimate = curvature.diagonal(
      self._journaled(name, self._operator),
      self._options.trace_matvecs,
      key=jax.random.fold_in(self._key, 6),
    )
    layers: dict[str, list[str]] = {}
    for path in estimate.leaf_traces:
      layers.setdefault(path.rpartition('/')[0] or path, []).append(path)
    return [
      self._layer(f'{name}_{number}', layer, paths, estimate)
      for number, (layer, paths) in enumerate(layers.items())
    ]

  def _layer(self, name, layer, paths, estimate) -> dict[str, Any]:
    regex = '^(' + '|'.join(re.escape(path) for path in paths) + ')$'
    block = self._objective.restrict(self._operator, regex)
    pairs = self._search(name, block, 1, 'largest', layer, verify=False)
    traces = [estimate.leaf_traces[path] for path in paths]
    return {
      'layer': layer,
      'num_parameters': block.size,
      'trace': sum(t.value for t in traces),
      # The leaves share their probes: at most the sum, reached if all go together.
      'trace_standard_error': sum(t.standard_error for t in traces),
      'lambda_max': pairs.eigenvalues[0],
      'lambda_max_residual': pairs.residuals[0],
      'converged': pairs.converged[0],
    }

  def _one_batch(self, name: str) -> dict[str, Any] | None:
    """Extremes of the operator of single batches of the training size."""
    options, size = self._options, self._network.config.batch_size
    if not options.one_batch_repeats:
      return None
    available = getattr(self._network.workload, options.split).num_examples
    count = min(options.one_batch_repeats * size, available)
    found = []
    for number, batch in enumerate(self._objective.draw(options.split, size, count)):
      if losses.num_examples(batch) < size:
        continue
      title = f'single batch {number + 1}/{options.one_batch_repeats}'
      operator = self._objective.operator([batch])
      pairs = self._search(f'{name}_{number}', operator, 1, 'both', title, verify=False)
      found.append(_extremes(pairs, 1, operator.size))
    return _over_batches(found, size) if found else None

  def _evaluate(self, _: str) -> dict[str, float]:
    """Loss and accuracy of both splits in evaluation mode, with standard errors."""
    result, squares = {}, 0.0
    for name in SPLITS:
      batches = list(self._objective.draw(name, self._options.batch_size, 0))
      parts = [
        example_scores(self._objective, self._objective.params, batch)
        for batch in batches
      ]
      for quantity, values in zip(
        ('loss', 'accuracy'), zip(*parts, strict=True), strict=True
      ):
        values = of_examples(values, batches)
        error = bootstrap.standard_error(values)
        result[f'{name}_{quantity}'] = values.mean()
        result[f'{name}_{quantity}_standard_error'] = error
      squares += result[f'{name}_loss_standard_error'] ** 2
    result['generalization_gap'] = result['test_loss'] - result['train_loss']
    result['generalization_gap_standard_error'] = math.sqrt(squares)
    return result

  def _landscapes(self, pairs: curvature.Eigenpairs) -> dict[str, Any]:
    drawer = landscapes.Drawer(
      self._network,
      self._objective,
      self._options,
      self._folder,
      self.parts,
      self._ticker,
      jax.random.fold_in(self._key, 3),
    )
    return drawer.run(pairs)

  def _save_spectrum(
    self, pairs: curvature.Eigenpairs, density: curvature.SpectralDensity
  ) -> None:
    files.save_spectrum(
      self._folder / files.SPECTRUM,
      density,
      eigenvalues=pairs.eigenvalues,
      residuals=pairs.residuals,
      converged=pairs.converged,
    )
    title = landscapes.title(self._network)
    figure = plotting.spectral_density(density, title=title)
    figure.savefig(self._folder / files.DENSITY_FIGURE)


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
  'worst_case_sharpness': (
    'largest rise of the loss within the ball, found by gradient ascent for each group '
    'of examples: mean and standard error over groups'
  ),
  'average_case_sharpness': (
    'mean rise of the loss under Gaussian noise in the parameters, standard error over '
    'draws'
  ),
  'one_batch': (
    'extremes of the Hessian of single batches of the training size: mean and '
    'standard deviation over batches; of the ratio the median and the range'
  ),
}


def _estimate(name: str, estimate: curvature.Estimate | None) -> dict[str, Any]:
  """An estimate as entries of the summary; None is one that was not asked for."""
  return {
    name: estimate and estimate.value,
    f'{name}_standard_error': estimate and estimate.standard_error,
  }


def _over_batches(found: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
  """Extremes of single batches, in numbers."""
  top, bottom, residuals, ratios = (
    np.array([extremes[name] for extremes in found], np.float64)
    for name in (
      'lambda_max',
      'lambda_min',
      'lambda_min_residual',
      'lambda_max_over_abs_lambda_min',
    )
  )
  # A batch whose lambda_min is next to 0 has any ratio: so its median and range. Where
  # it is 0 within its residual the ratio is larger than can be told.
  ratios = np.where(np.isnan(ratios), np.inf, ratios)
  several = len(found) > 1
  return {
    'batch_size': batch_size,
    'num_batches': len(found),
    'lambda_max': top.mean(),
    'lambda_max_standard_deviation': top.std(ddof=1) if several else None,
    'lambda_min': bottom.mean(),
    'lambda_min_standard_deviation': bottom.std(ddof=1) if several else None,
    'lambda_min_residual': residuals.max(),
    'all_converged': all(extremes['all_converged'] for extremes in found),
    'ratio_median': np.median(ratios),
    'ratio_range': [ratios.min(), ratios.max()],
  }


def _extremes(pairs: curvature.Eigenpairs, k: int, size: int) -> dict[str, Any]:
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
    # Fewer pairs than asked for are there if the products ran out before.
    'all_converged': pairs.converged.all() and len(values) >= min(2 * k, size),
    'no_copies_missed': pairs.verified,
    'lambda_max_over_abs_lambda_min': _over(values[0], values[-1], pairs.residuals[-1]),
    'lambda_1_over_lambda_5': (
      _over(values[0], values[4], pairs.residuals[4])
      if min(k, len(values)) >= 5
      else None
    ),
  }


def _over(numerator: float, denominator: float, residual: float) -> float | None:
  """A ratio to an eigenvalue's size; None where that is 0 within its residual."""
  size = abs(denominator)
  return float(numerator / size) if size > residual else None


def _fingerprint(network: Network, options: Options) -> str:
  """Changes with the parameters, the configuration, the options or the packages."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves((network.params, network.batch_stats)):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  config, options = dataclasses.asdict(network.config), dataclasses.asdict(options)
  for part in (config, options, config_lib.versions()):
    digest.update(json.dumps(part, sort_keys=True).encode())
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
