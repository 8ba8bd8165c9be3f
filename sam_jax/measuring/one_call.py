"""A network of one's own, measured in one call into a folder of results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import landscape, plotting, probes
from sam_jax.curvature.operators import Batch, LossFn, Params
from sam_jax.curvature.products import at_least_float32, require_several
from sam_jax.measuring import entries, files, pages
from sam_jax.measuring.parts import (
  MEASURES,
  NEED_PAIRS,
  PARTS,
  Options,
  Subject,
  check_example_losses,
)

_PACKAGES = ('jax', 'jaxlib', 'optax', 'numpy')


def measure(
  loss_fn: LossFn,
  params: Params,
  batches: Iterable[Batch],
  folder: str | os.PathLike[str],
  *,
  parts: Sequence[str] | None = None,
  weight: Callable[[Batch], float] | None = None,
  example_losses_fn: Callable[[Params, Batch], jax.Array] | None = None,
  name: str = 'network',
  k: int = 5,
  tol: float = 1e-4,
  num_matvecs: int = 60,
  num_probes: int = 4,
  trace_matvecs: int = 30,
  worst_case_rho: float = 0.05,
  average_case_sigma: float = 0.01,
  landscape_points: int = 21,
  landscape_extent: float = 1.0,
  key: jax.Array | int = 0,
  max_num_matvecs: int = 2000,
  max_basis_gib: float = 8.0,
  figures: bool = True,
  overwrite: bool = True,
  progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
  """Measures how sharp a network is, and writes all of it into a folder.

  The folder gets `summary.json`, `spectrum.npz`, `landscape.npz`, and with ``figures``
  `spectral_density.png`, `landscape.png` and `report.html`, one page with all of it.
  The summary has the keys of the one that `eval_hessian.py` writes; what only a run of
  `train.py` has, such as its optimizer, is null. It is written anew after each part, so
  that what was done before a kill can still be read. The next call does not go on from
  there: it removes the earlier results and measures all of its parts.

  Standard errors of the loss and of the extreme eigenvalues tell how much these would
  differ on other data of the same kind; those of eigenvalues are from a bootstrap with
  the eigenvectors held fixed. With ``example_losses_fn`` they are over examples, as in
  `eval_hessian.py`. Without it only means of batches are known, and they are over
  batches. This is right if examples were assigned to batches at random, and imprecise
  if batches are few: with n of them the relative error of a standard error is about
  1 / sqrt(2 (n - 1)), and with one it is null. The error of the search is not in them,
  which the residual tells, nor is that of training with another seed. The groups of the
  worst case are the batches, and its error is over these. Errors of the trace, of the
  Frobenius norm and of the average case are over random probes and draws alone.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, the mean loss over the batch.
    params: where it is measured, any pytree; leaves narrower than float32 are widened.
    batches: pytrees of arrays, of any shapes: the data over which the loss is averaged.
    folder: where the files go, made where it is missing.
    parts: some of 'evaluation', 'eigenvalues', 'adaptive_sharpness',
      'spectral_density', 'trace', 'worst_case', 'average_case' and 'landscape'; None
      is all. The eigenvalues come with those that stand on them.
    weight: number of examples of a batch, ``weight(batch) -> number``. None: the
      leading dimension of the batch's first leaf.
    example_losses_fn: ``example_losses_fn(params, batch) -> (B,)``, the losses of which
      loss_fn is the mean, for standard errors over examples; differentiated in forward
      mode only. None: they are over batches.
    name: what figures and report are headed with, and `task` in the summary.
    k: eigenvalues at each end; no more than there are parameters.
    tol: residual of each eigenpair, relative to the largest absolute eigenvalue.
    num_matvecs: Lanczos steps of each probe of the spectral density.
    num_probes: random probes of the spectral density.
    trace_matvecs: products for the trace, at least 2.
    worst_case_rho: radius of the ball in which the loss is maximised.
    average_case_sigma: standard deviation of the noise under which it is averaged.
    landscape_points: points a side of the loss surface, at least 2.
    landscape_extent: how far it reaches each way, in units of filter-normalised
      directions. Where the matrices have fewer than two entries, all parameters move.
    key: typed PRNG key, or a seed, of all that is random.
    max_num_matvecs: most products for one set of eigenpairs.
    max_basis_gib: memory in GiB for Lanczos vectors.
    figures: whether to draw figures and write the report, which needs matplotlib.
    overwrite: whether the results of an earlier call may be replaced.
    progress: called with a line of text, now and then.

  Returns:
    What `summary.json` says.

  Raises:
    ValueError: an argument is out of range, the loss is no scalar or a sum over the
      batch, example_losses_fn does not give the losses of which loss_fn is the mean, or
      the folder holds files of something else or, without ``overwrite``, of an earlier
      call.
    TypeError: ``batches`` is a single batch, or a parameter is no real floating-point
      number.
    ImportError: ``figures`` without matplotlib.
    NonFiniteError: the parameters or the data hold NaN or infinity.

  >>> import jax.numpy as jnp, tempfile
  >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
  >>> data = [jnp.array([[1., 0.], [0., 2.]]), jnp.array([[3., 0.], [0., 0.]])]
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   found = measure(loss, jnp.zeros(2), data, folder, parts=['eigenvalues'], k=1,
  ...                   figures=False)
  >>> round(found['lambda_max'], 3), round(found['lambda_min'], 3)
  (5.0, 2.0)
  >>> found['all_converged'], found['lambda_max_residual'] < 1e-3
  (True, True)
  """
  options = Options(
    k=k,
    tol=tol,
    num_matvecs=num_matvecs,
    num_probes=num_probes,
    trace_matvecs=trace_matvecs,
    worst_case_rho=worst_case_rho,
    average_case_sigma=average_case_sigma,
    landscape_points=landscape_points,
    landscape_extent=landscape_extent,
    max_num_matvecs=max_num_matvecs,
    max_basis_gib=max_basis_gib,
    errors_over='examples' if example_losses_fn else 'batches',
  )
  chosen = _chosen(parts)
  params = at_least_float32(params)
  require_several(batches)
  batches = [jax.device_put(batch) for batch in batches]
  key = probes.typed_key(key)
  subject = Subject(loss_fn, example_losses_fn, params, batches, weight, options, key)
  _check(options, chosen, subject.operator.size)
  _check_loss(loss_fn, params, batches)
  if example_losses_fn:
    check_example_losses(subject)
  if figures and importlib.util.find_spec('matplotlib') is None:
    raise ImportError(
      'figures=True needs matplotlib: install it, or give figures=False'
    )
  folder = pathlib.Path(folder)
  _claim(folder, overwrite)
  subject.folder, subject.progress = folder, progress
  summary = _measured(subject, chosen, name)
  if figures:
    _draw(folder, name)
    pages.write(folder, summary, name)
  return summary


def _chosen(parts: Sequence[str] | None) -> list[str]:
  """The parts in their order, with what they stand on."""
  if isinstance(parts, str):
    parts = [parts]
  wanted = set(PARTS if parts is None else parts)
  if unknown := sorted(wanted - set(PARTS)):
    raise ValueError(f'parts names {unknown[0]!r}: choose of {", ".join(PARTS)}')
  if not wanted:
    raise ValueError('parts is empty: name a part, or give None for all')
  if wanted & set(NEED_PAIRS):
    wanted.add('eigenvalues')
  return [part for part in PARTS if part in wanted]


def _check(options: Options, chosen: list[str], size: int) -> None:
  """Refuses what would fail only after much was measured."""
  if 'landscape' in chosen and size < 2:
    raise ValueError(
      "parts: 'landscape' is a surface over two directions, and the network has one "
      'parameter: name the parts without it'
    )
  if not 1 <= options.k <= size:
    raise ValueError(f'k={options.k}: give at least 1 and at most the size, {size}')
  if not 0 < options.tol < 1:
    raise ValueError(f'tol={options.tol}: give a number above 0 and below 1')
  for field, least in (
    ('num_matvecs', 1),
    ('num_probes', 1),
    ('trace_matvecs', 2),
    ('landscape_points', 2),
    ('max_num_matvecs', 1),
  ):
    if getattr(options, field) < least:
      raise ValueError(f'{field}={getattr(options, field)}: give at least {least}')
  for field in (
    'worst_case_rho',
    'average_case_sigma',
    'landscape_extent',
    'max_basis_gib',
  ):
    if not 0 < getattr(options, field) < np.inf:
      raise ValueError(f'{field}={getattr(options, field)}: give a number above 0')


def _check_loss(loss_fn: LossFn, params: Params, batches: list[Batch]) -> None:
  """Refuses a loss that is no mean over the batch."""
  found = jax.eval_shape(loss_fn, params, batches[0])
  if not hasattr(found, 'shape'):
    raise ValueError(
      f'loss_fn returns a {type(found).__name__}: give one that returns the loss alone'
    )
  if found.shape:
    raise ValueError(
      f'loss_fn returns an array of shape {found.shape}: give one that returns a '
      'scalar, the mean over the batch'
    )
  if _is_sum(loss_fn, params, batches[0]):
    raise ValueError(
      'loss_fn is a sum over the batch: its value is twice as large over a batch that '
      'holds every example twice; give one that returns the mean'
    )


def _is_sum(loss_fn: LossFn, params: Params, batch: Batch) -> bool:
  """Whether the loss doubles with the examples, where those can be repeated."""
  leaves = jax.tree.leaves(batch)
  if len({np.shape(leaf)[:1] for leaf in leaves} | {()}) != 2:
    return False  # No common leading axis, which would be that of the examples.
  twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)
  try:
    once, doubled = (float(jax.jit(loss_fn)(params, x)) for x in (batch, twice))
  except (TypeError, ValueError):
    return False  # The loss is written for one size of batch.
  return once != 0 and abs(doubled - 2 * once) <= 1e-3 * abs(once)


def _claim(folder: pathlib.Path, overwrite: bool) -> None:
  """Makes a folder, or empties it of the results of an earlier call.

  Raises:
    ValueError: it cannot be written, or holds files that must stay.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
  except OSError as error:
    raise ValueError(f'{folder} cannot be written ({error.strerror})') from error
  # A call that was killed at its start leaves only the second.
  own = (files.SUMMARY, f'{files.SUMMARY}.tmp')
  strangers = [n for n in names if n not in own and not n.startswith('.')]
  if files.SUMMARY not in names and not strangers:
    return
  if not _is_measured(folder / files.SUMMARY):
    stranger = (strangers or [files.SUMMARY])[0]
    raise ValueError(
      f'{folder} holds files that are not those of sam_jax.measure (as {stranger}): '
      'choose a new or empty folder'
    )
  if not overwrite:
    raise ValueError(
      f'{folder} holds the results of an earlier call: choose another folder, or give '
      'overwrite=True'
    )
  for result in files.RESULTS:
    (folder / result).unlink(missing_ok=True)


def _is_measured(path: pathlib.Path) -> bool:
  """Whether a file is the summary of an earlier call; a training run names its own."""
  try:
    summary = json.loads(path.read_text())
    return bool(summary['fingerprint']) and summary['optimizer'] is None
  except (OSError, ValueError, KeyError, TypeError):
    return False


def _measured(subject: Subject, chosen: list[str], name: str) -> dict[str, Any]:
  """Measures part by part; the summary is written after each."""
  facts = _facts(subject, name)
  results: dict[str, Any] = {}
  seconds: dict[str, float] = {}
  products: dict[str, int] = {}
  path = subject.folder / files.SUMMARY
  files.write_json(path, summary := _summary(subject, facts, [], results, {}, {}))
  for number, part in enumerate(chosen, 1):
    subject.show(f'{part}, part {number} of {len(chosen)}')
    started, before = time.perf_counter(), subject.num_matvecs
    results |= entries.plain(MEASURES[part](subject))
    seconds[part] = time.perf_counter() - started
    if subject.num_matvecs > before:
      products[part] = subject.num_matvecs - before
    done = chosen[:number]
    summary = _summary(subject, facts, done, results, products, seconds)
    files.write_json(path, summary)
  return summary


def _summary(subject, facts, done, results, products, seconds) -> dict[str, Any]:
  options = dataclasses.asdict(subject.options)
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  versions = {'python': platform.python_version(), **found}
  return {
    **facts,
    'measurements': list(done),
    'notes': {
      name: text.format_map(options)
      for name, text in pages.NOTES.items()
      if name in results
    },
    **results,
    'num_matvecs': sum(products.values()),
    'num_matvecs_by_part': dict(products),
    'seconds': sum(seconds.values()),
    'seconds_by_part': dict(seconds),
    'options': options,
    'versions': versions,
    'fingerprint': files.fingerprint(subject.params, options, versions),
  }


def _facts(subject: Subject, name: str) -> dict[str, Any]:
  return {
    'task': name,
    'optimizer': None,
    'base_optimizer': None,
    'rho': None,
    'seed': None,
    'step': None,
    'operator': 'hessian',
    'preconditioner': 'none',
    'params_regex': '',
    'num_parameters': subject.operator.size,
    'split': None,
    'num_examples': round(float(subject.weights.sum())),
    'batch_norm': 'as loss_fn has it',
    'dtype': str(subject.operator.dtype),
    'matmul_precision': 'highest',
    'device': jax.devices()[0].device_kind,
  }


def _draw(folder: pathlib.Path, title: str) -> None:
  """Draws the results that were written."""
  for source, load, plot, name in (
    (
      files.SPECTRUM,
      files.read_density,
      plotting.spectral_density,
      files.DENSITY_FIGURE,
    ),
    (files.LANDSCAPE, landscape.load, plotting.landscape, files.LANDSCAPE_FIGURE),
  ):
    if (folder / source).exists():
      plot(load(folder / source), title=title).savefig(folder / name)
