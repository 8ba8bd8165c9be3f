"""The parts of a measurement of one's own network, by the library's functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import curvature, landscape, sharpness
from sam_jax.curvature.products import leading_dimension
from sam_jax.measuring import entries, files

# Relative difference of two means of the same losses, taken in other orders.
_SAME = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
  """How a network is measured; see `measure`."""

  k: int
  tol: float
  num_matvecs: int
  num_probes: int
  trace_matvecs: int
  worst_case_rho: float
  average_case_sigma: float
  landscape_points: int
  landscape_extent: float
  max_num_matvecs: int
  max_basis_gib: float
  errors_over: str


class Subject:
  """The network that is measured, and what its parts share."""

  def __init__(self, loss_fn, example_losses_fn, params, batches, weight, options, key):
    self.loss_fn, self.params, self.batches = loss_fn, params, batches
    self.example_losses_fn = example_losses_fn
    self.weight, self.options, self.key = weight or leading_dimension, options, key
    self.operator = curvature.hessian(loss_fn, params, batches, weight=self.weight)
    weights = np.array([float(self.weight(batch)) for batch in batches])
    # Batches without an example take no part.
    self.batches = [batch for batch, w in zip(batches, weights, strict=True) if w]
    self.weights = weights[weights > 0]
    self.folder = self.progress = self._pairs = None
    self.num_matvecs = 0

  def show(self, text: str) -> None:
    if self.progress is not None:
      self.progress(text)

  def key_of(self, number: int) -> jax.Array:
    return jax.random.fold_in(self.key, number)

  def search(self, operator, k, which, title) -> curvature.Eigenpairs:
    def show(at: curvature.Progress) -> None:
      self.show(
        f'{title}: {at.num_matvecs} products, {at.num_converged} of {at.num_wanted} '
        f'converged, residual {at.residual:.1e}'
      )

    options = self.options
    found = curvature.eigenpairs(
      operator,
      k,
      which,
      tol=options.tol,
      key=self.key,
      max_num_matvecs=options.max_num_matvecs,
      max_basis_gib=options.max_basis_gib,
      check_symmetry=False,  # The summary says what did not converge.
      progress=show,
    )
    self.num_matvecs += found.num_matvecs
    return found

  @property
  def pairs(self) -> curvature.Eigenpairs:
    if self._pairs is None:
      self._pairs = self.search(self.operator, self.options.k, 'both', 'eigenpairs')
    return self._pairs


def check_example_losses(subject: Subject) -> None:
  """Checks on one batch that the losses of examples are those that are averaged.

  Raises:
    ValueError: they are no vector, or their mean is not the loss.
  """
  batch = subject.batches[0]
  losses = np.asarray(_loss(subject.example_losses_fn, subject.params, batch), float)
  if losses.ndim != 1:
    raise ValueError(
      f'example_losses_fn gives an array of shape {losses.shape}: give one loss '
      'for each example of the batch, (B,)'
    )
  loss = float(_loss(subject.loss_fn, subject.params, batch))
  if abs(losses.mean() - loss) > _SAME * max(abs(loss), np.abs(losses).mean()):
    raise ValueError(
      f'example_losses_fn has the mean {losses.mean():.6g} over the first batch where '
      f'loss_fn gives {loss:.6g}: give the losses of which loss_fn is the mean'
    )


def _members(
  subject: Subject, values: Sequence[jax.Array]
) -> tuple[np.ndarray, np.ndarray]:
  """Values of the members that standard errors are over, and how much each counts.

  Args:
    subject: what is measured.
    values: of each batch, a scalar or those of its examples, (B,).
  """
  found = [np.ravel(np.asarray(x, np.float64)) for x in values]
  counts = [len(x) for x in found]
  return np.concatenate(found), np.repeat(subject.weights / counts, counts)


def _evaluation(subject: Subject) -> dict[str, Any]:
  losses = subject.example_losses_fn or subject.loss_fn
  values = [_loss(losses, subject.params, batch) for batch in subject.batches]
  return {
    'evaluation': entries.mean_with_error('train_loss', *_members(subject, values))
  }


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn, params, batch):
  with jax.default_matmul_precision('highest'):
    return loss_fn(params, batch)


def _eigenvalues(subject: Subject) -> dict[str, Any]:
  pairs = subject.pairs
  found = entries.extremes(pairs, subject.options.k, subject.operator.size)
  if subject.example_losses_fn:
    along = functools.partial(_along_of_examples, subject.example_losses_fn)
  else:
    along = functools.partial(_along, curvature.hessian_product(subject.loss_fn))
  ends = [
    [along(subject.params, batch, pairs.eigenvectors[i]) for batch in subject.batches]
    for i in (0, -1)
  ]
  (tops, weights), (bottoms, _) = (_members(subject, values) for values in ends)
  if len(weights) > 1:
    seed = np.asarray(jax.random.key_data(subject.key)).ravel()
    errors = entries.extremes_errors(np.stack([tops, bottoms]), weights, seed)
  else:
    names = ('lambda_max', 'lambda_min', 'lambda_max_over_abs_lambda_min')
    errors = {f'{name}_standard_error': None for name in names}
  return {**found, **errors}


@functools.partial(jax.jit, static_argnums=0)
def _along(product, params, batch, vector):
  """``v . H v`` of one batch."""
  with jax.default_matmul_precision('highest'):
    image = product(params, batch, vector)
  pairs = zip(jax.tree.leaves(vector), jax.tree.leaves(image), strict=True)
  return sum(jnp.sum(v * h) for v, h in pairs)


@functools.partial(jax.jit, static_argnums=0)
def _along_of_examples(example_losses_fn, params, batch, vector):
  """What each example of a batch adds to ``v . H v``, (B,)."""

  def slope(params):
    losses = lambda params: example_losses_fn(params, batch)
    return jax.jvp(losses, (params,), (vector,))[1]

  with jax.default_matmul_precision('highest'):
    return jax.jvp(slope, (params,), (vector,))[1]


def _adaptive_sharpness(subject: Subject) -> dict[str, Any]:
  scale = jax.tree.map(jnp.abs, subject.params)
  operator = curvature.preconditioned(subject.operator, scale)
  pairs = subject.search(operator, 1, 'largest', 'adaptive sharpness')
  return {
    'adaptive_sharpness': pairs.eigenvalues[0],
    'adaptive_sharpness_residual': pairs.residuals[0],
    'adaptive_sharpness_converged': pairs.converged[0],
  }


def _spectral_density(subject: Subject) -> dict[str, Any]:
  options = subject.options
  density = curvature.spectral_density(
    subject.operator,
    options.num_matvecs,
    options.num_probes,
    key=subject.key_of(1),
    pairs=subject.pairs,
    max_basis_gib=options.max_basis_gib,
    check_symmetry=False,
  )
  subject.num_matvecs += density.num_matvecs
  files.save_spectrum(subject.folder / files.SPECTRUM, subject.pairs, density)
  return entries.estimate('squared_frobenius_norm', density.moment(2))


def _trace(subject: Subject) -> dict[str, Any]:
  count = subject.options.trace_matvecs
  found = curvature.trace(
    subject.operator, count, key=subject.key_of(2), pairs=subject.pairs
  )
  subject.num_matvecs += found.num_matvecs
  return entries.estimate('trace', found)


def _worst_case(subject: Subject) -> dict[str, Any]:
  size = subject.options.worst_case_rho
  found = _rise(subject, sharpness.worst_case, size, 4)
  return entries.estimate_over_groups('worst_case_sharpness', found)


def _average_case(subject: Subject) -> dict[str, Any]:
  size = subject.options.average_case_sigma
  found = _rise(subject, sharpness.average_case, size, 5)
  return entries.estimate('average_case_sharpness', found)


def _rise(subject: Subject, function: Callable[..., Any], size: float, number: int):
  """The rise of the loss near the parameters, by a function of `sharpness`."""
  return function(
    subject.loss_fn,
    subject.params,
    subject.batches,
    size,
    key=subject.key_of(number),
    weight=subject.weight,
  )


def _landscape(subject: Subject) -> dict[str, Any]:
  options, params = subject.options, subject.params
  leaves = jax.tree.leaves(params)
  weights = sum(np.size(leaf) for leaf in leaves if np.ndim(leaf) >= 2)
  axis = np.linspace(
    -options.landscape_extent, options.landscape_extent, options.landscape_points
  )
  result = landscape.surface(
    subject.loss_fn,
    params,
    landscape.random_directions(subject.key_of(3), params, include_vectors=weights < 2),
    axis,
    axis,
    subject.batches,
    weight=subject.weight,
    progress=lambda done, total: subject.show(f'landscape: point {done}/{total}'),
  )
  result.save(subject.folder / files.LANDSCAPE)
  return {
    'landscape': {
      'directions': 'filter',
      'explained_variance': [],
      'loss_range': [np.nanmin(result.loss), np.nanmax(result.loss)],
    }
  }


MEASURES = {
  'evaluation': _evaluation,
  'eigenvalues': _eigenvalues,
  'adaptive_sharpness': _adaptive_sharpness,
  'spectral_density': _spectral_density,
  'trace': _trace,
  'worst_case': _worst_case,
  'average_case': _average_case,
  'landscape': _landscape,
}
PARTS = tuple(MEASURES)
# Parts that stand on the eigenpairs.
NEED_PAIRS = ('spectral_density', 'trace')
