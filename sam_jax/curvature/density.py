"""Spectral density: outliers exactly, the bulk by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import estimates, lanczos, operators
from sam_jax.curvature import pairs as pairs_lib

# In the band also stands so much of the height of one eigenvalue: Ritz values are not
# more exact than that.
_FLOOR = 1e-3
_TAIL = 0.025  # probability on each side of the band
_QUANTILE = 1.959964  # of the normal distribution, at 1 - _TAIL
_MOST_FREEDOM = 1e12  # more degrees of freedom make no visible difference
# Log-probabilities: below the first a Ritz value is certainly a repeated eigenvalue,
# below the second those placed once are not believed to be single.
_REPEATED, _DOUBTFUL = math.log(1e-6), math.log(0.05)
_COPY = 1e-3  # weight of a copy, times the size, from which it is seen
_MOST_POINTS = 10_000_000  # of the grid
_ROUNDING = 100.0  # Ritz values closer than so many eps * |A| are one


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
  """Density of the eigenvalues of an operator; weights add up to 1.

  Attributes:
    outliers: float64 (c,), converged eigenvalues, each of weight 1 / size.
    nodes: float64 (num_probes, num_matvecs), Ritz values of each probe on the rest.
    weights: float64 (num_probes, num_matvecs), their weights; a probe's add up to
      1 - c / size.
    grid: float64 (g,), eigenvalues at which the density is given.
    density: float64 (g,), smoothed by a normal kernel; the mean over probes.
    lower: float64 (g,), pointwise 95 % band of the density, from the distribution of
      random probes: it holds for one probe too.
    upper: float64 (g,), the band's upper side.
    sigma: standard deviation of the kernel.
    size: number of eigenvalues.
    num_matvecs: products taken.
  """

  outliers: np.ndarray
  nodes: np.ndarray
  weights: np.ndarray
  grid: np.ndarray
  density: np.ndarray
  lower: np.ndarray
  upper: np.ndarray
  sigma: float
  size: int
  num_matvecs: int

  def moment(self, power: int) -> estimates.Estimate:
    r"""Estimate of :math:`\mathrm{tr} A^p`; p = 2 is the squared Frobenius norm."""
    exact = float((self.outliers**power).sum())
    if not self.weights.any():  # The outliers are all eigenvalues.
      return estimates.Estimate(exact, 0.0, self.num_matvecs)
    samples = self.size * (self.weights * self.nodes**power).sum(1)
    mean, error = _mean_and_error(samples)
    return estimates.Estimate(exact + float(mean), float(error), self.num_matvecs)


def spectral_density(
  operator: operators.Operator,
  num_matvecs: int = 80,
  num_probes: int = 6,
  *,
  key: jax.Array | None = None,
  pairs: pairs_lib.Eigenpairs | None = None,
  sigma: float | None = None,
  tol: float = 1e-4,
  max_basis_gib: float = 8.0,
  check_symmetry: bool = True,
) -> SpectralDensity:
  r"""Density of the eigenvalues, with a band of its error.

  .. math:: \phi(x) = \frac1n \sum_{i=1}^n N(x; \lambda_i, \sigma^2)

  One eigenvalue far from the others gets a wildly varying weight from a random probe.
  So converged pairs are placed exactly with weight 1/n, and the probes are kept
  orthogonal to them. Without ``pairs`` those that the first probe's Lanczos run finds
  are taken. Of a repeated eigenvalue one copy is placed at most, and the probes weigh
  the others; the first probe knows nothing of those others, so where its weights or a
  later probe show that there are any, another run takes its place.

  The band needs no spread over probes. A probe's density at x is
  :math:`z^T K z` with z uniform on the unit sphere and :math:`K = N(x; A, \sigma^2)`;
  its mean and its variance,

  .. math:: \mathrm{Var}\, z^T K z = \frac{2}{n + 2}
            \Big(\frac{\mathrm{tr} K^2}{n} - \Big(\frac{\mathrm{tr} K}{n}\Big)^2\Big),

  both follow from the quadrature, and its distribution is near the gamma distribution
  with these two.

  Args:
    operator: a symmetric operator of size n.
    num_matvecs: Lanczos steps of each run. There is one run a probe, and one more
      where the first probe has to be replaced.
    num_probes: number of random probes; the band narrows with its square root.
    key: typed PRNG key; None is ``jax.random.key(0)``.
    pairs: eigenpairs that are known already; the converged ones are used.
    sigma: standard deviation of the smoothing kernel; None is the range of the
      eigenvalues that are not outliers over num_matvecs, what so many steps resolve.
    tol: the residual, relative to the largest |theta|, at which a pair counts as
      converged.
    max_basis_gib: memory in GiB, on each device, for num_matvecs Lanczos vectors, the
      eigenvectors of the outliers and the work vectors. Without ``pairs`` only so many
      outliers are placed exactly as it leaves room for.
    check_symmetry: raise an error if the products are not those of a symmetric
      operator. It takes no further products: those of each run are compared.

  Returns:
    The density.

  Raises:
    ValueError: an argument is out of range, or ``max_basis_gib`` is too little.
    AsymmetryError: the operator is not symmetric; it is a ValueError.
    NonFiniteError: the operator answered NaN or infinity.

  >>> import jax.numpy as jnp
  >>> diagonal = jnp.append(jnp.linspace(0., 1., 499), 20.)
  >>> op = operators.operator(lambda v: diagonal * v, diagonal)
  >>> result = spectral_density(op, num_matvecs=20, num_probes=3)
  >>> result.outliers.round(3).tolist()
  [20.0]

  References:
    Ghorbani et al., An investigation into neural net optimization via Hessian
    eigenvalue density, arXiv 1901.10159.
  """
  if num_matvecs < 1 or num_probes < 1:
    raise ValueError(
      f'num_matvecs={num_matvecs}, num_probes={num_probes}: give at least 1 of each'
    )
  key = basis_lib.stream(key, basis_lib.DENSITY_STREAM)
  first = operator.num_matvecs
  layout = basis_lib.Layout.of(operator.structure)
  least = layout.rounded(num_matvecs)
  grown = functools.partial(_grown, operator, num_matvecs, check_symmetry)
  reused = None
  if pairs is None:
    # What is left holds the outliers; those for which there is no room are not placed.
    left = layout.room(max_basis_gib, least) - least
    first_run = grown(layout.normal(jax.random.fold_in(key, 0)))
    outliers, locked, reused = _first_probe(first_run, tol, left)
    scale = float(np.abs(first_run.ritz()[0]).max())
  else:
    layout.room(max_basis_gib, least + layout.rounded(int(pairs.converged.sum())))
    outliers, _, locked = pairs.known(layout)
    scale = pairs.scale

  def probe(index):
    start = layout.normal(jax.random.fold_in(key, index))
    values, vectors, bounds = grown(start, locked, scale).ritz()
    return _Quadrature(values, vectors[0] ** 2, bounds)

  quadratures = []
  if len(outliers) < operator.size:
    quadratures = [probe(index) for index in range(pairs is None, num_probes)]
    if reused and not _any_copies(outliers, quadratures, tol, operator.size):
      quadratures.insert(0, reused)
    elif pairs is None:
      quadratures.insert(0, probe(num_probes))
  nodes, weights = _stack(quadratures, 1 - len(outliers) / operator.size)
  return _smooth(outliers, nodes, weights, sigma, num_matvecs, operator, first)


class _Quadrature(NamedTuple):
  """A probe's nodes, their weights, which add up to 1, and their residual bounds."""

  values: np.ndarray
  weights: np.ndarray
  bounds: np.ndarray


def _grown(operator, num_matvecs, check_symmetry, start, locked=None, scale=0.0):
  """A Lanczos decomposition from a start vector, orthogonal to a basis."""
  decomposition = lanczos.Decomposition(
    operator, start, locked, scale, check_symmetry=check_symmetry
  )
  decomposition.grow(num_matvecs)
  decomposition.require_symmetry()
  return decomposition


def _first_probe(decomposition, tol, most):
  """Outliers, their basis, and the probe's quadrature of the rest or None.

  The quadrature is None if eigenvalues are repeated, as the Krylov space ended early or
  the outliers hold more of the probe than single eigenvectors would: the weight of all
  copies in this probe went to the outliers.
  """
  values, vectors, bounds = decomposition.ritz()
  weights, size = vectors[0] ** 2, decomposition.operator.size
  complete = len(values) == size  # Then no eigenvalue is repeated.
  converged = bounds <= tol * np.abs(values).max()
  chances = _log_chance(weights, 1, size)
  candidates = np.flatnonzero(converged & (complete | (chances > _REPEATED)))
  chosen = np.zeros(len(values), bool)
  chosen[candidates[np.argsort(-np.abs(values[candidates]))[:most]]] = True
  locked = decomposition.basis.combine(vectors[:, chosen])
  rest, count = weights[~chosen], int(chosen.sum())
  chance = _log_chance(weights[chosen].sum(), count, size)
  least = chances[chosen].min(initial=0) + math.log(max(count, 1))
  doubtful = decomposition.exhausted or min(chance, least) < _DOUBTFUL
  if count and doubtful and not complete:
    return values[chosen], locked, None
  reused = _Quadrature(values[~chosen], rest / (rest.sum() or 1), bounds[~chosen])
  return values[chosen], locked, reused


def _log_chance(mass, count, size):
  """Log of a bound on the probability that eigenvectors hold so much of a random one.

  The squared length of a random unit vector's projection onto ``count`` of ``size``
  dimensions has a beta distribution; this is the Chernoff bound of its upper tail.
  """
  mean = count / size
  with np.errstate(divide='ignore', invalid='ignore'):
    inside = count * np.log(mass / mean)
    outside = (size - count) * np.log(np.clip(1 - mass, 0, 1) / (1 - mean))
  return np.where(mass > mean, (inside + outside) / 2, 0.0)


def _any_copies(outliers, quadratures, tol, size):
  """Whether probes orthogonal to the outliers meet one of their eigenvalues again."""
  if not len(outliers):
    return False
  for values, weights, bounds in quadratures:
    target = tol * max(np.abs(outliers).max(), np.abs(values).max())
    near = np.abs(values[:, None] - outliers).min(1) <= 2 * target
    if (near & (bounds <= target) & (weights * size > _COPY)).any():
      return True
  return False


def _stack(quadratures, share):
  """Nodes and weights (num_probes, longest), filled up with nodes of weight 0."""
  longest = max((len(each.values) for each in quadratures), default=0)
  nodes = np.zeros((len(quadratures), longest))
  weights = np.zeros((len(quadratures), longest))
  for row, (values, parts, _) in enumerate(quadratures):
    nodes[row, : len(values)] = values
    nodes[row, len(values) :] = values[-1]
    weights[row, : len(values)] = share * parts
  return nodes, weights


def _smooth(outliers, nodes, weights, sigma, num_matvecs, operator, first):
  every = np.concatenate([outliers, nodes[weights > 0]])
  low, high = every.min(), every.max()
  largest = float(np.abs(every).max())
  extent = float(high - low)
  eps = np.finfo(basis_lib.Layout.of(operator.structure).dtype).eps
  if extent <= _ROUNDING * eps * largest:
    extent = largest or 1.0  # All eigenvalues are one.
  if sigma is None:
    # The outliers are exact, so the steps resolve the range of the others; but no finer
    # than what a grid over everything can show.
    rest = np.ptp(nodes[weights > 0]) if weights.any() else extent
    sigma = max(rest / num_matvecs, extent / 2000)
  sigma = float(sigma)
  if not 0 < sigma < np.inf:
    raise ValueError(f'sigma={sigma}: give a finite standard deviation above 0')
  finest = max(4 * (high - low) / _MOST_POINTS, 1e-12 * largest)
  if sigma < finest:
    raise ValueError(
      f'sigma={sigma}: no grid from {low:.3g} to {high:.3g} shows so narrow a kernel; '
      f'give at least {finest:.1g}'
    )
  count = int(np.ceil((high - low + 8 * sigma) / (sigma / 4))) + 1
  grid = np.linspace(low - 4 * sigma, high + 4 * sigma, count)
  placed = np.full(len(outliers), 1 / operator.size)
  exact = _kernels(grid, outliers, placed, sigma)
  mean, lower, upper = _band(grid, nodes, weights, sigma, operator.size - len(outliers))
  floor = _FLOOR / (operator.size * sigma * np.sqrt(2 * np.pi))
  return SpectralDensity(
    outliers=outliers,
    nodes=nodes,
    weights=weights,
    grid=grid,
    density=exact + mean,
    lower=np.maximum(exact + lower - floor, 0),
    upper=exact + upper + floor,
    sigma=sigma,
    size=operator.size,
    num_matvecs=operator.num_matvecs - first,
  )


def _band(grid, nodes, weights, sigma, dimension):
  """Mean over probes of the smoothed quadratures, and its 95 % band."""
  count = max(len(nodes), 1)
  mean = _kernels(grid, nodes, weights / count, sigma)
  square = _kernels(grid, nodes, weights / count, sigma, power=2)
  share = weights.sum() / count
  # Degrees of freedom of the gamma distribution with this mean and variance: probes
  # times eigenvalues that have a part in the density, so at least one a probe.
  variance = np.maximum(share * square - mean**2, np.finfo(float).tiny)
  with np.errstate(over='ignore'):
    freedom = count * (dimension + 2) * mean**2 / variance
  freedom = np.clip(freedom, count, _MOST_FREEDOM)
  low, high = _chi_square_quantiles(freedom)
  return mean, mean * freedom / high, mean * freedom / low


def _kernels(grid, centers, weights, sigma, power=1):
  """A sum of normal densities, each to a power."""
  total = np.zeros(len(grid))
  for center, weight in zip(centers.ravel(), weights.ravel(), strict=True):
    kernel = np.exp(-0.5 * ((grid - center) / sigma) ** 2) / (
      sigma * np.sqrt(2 * np.pi)
    )
    total += weight * kernel**power
  return total


def _chi_square_quantiles(freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The quantiles that leave 2.5 % on either side, within 8 % from 1 degree on."""
  # Wilson and Hilferty's approximation; below, also the leading term of the
  # distribution function, which is a lower bound too and better for few degrees.
  spread = _QUANTILE * np.sqrt(2 / (9 * freedom))
  center = 1 - 2 / (9 * freedom)
  leading = 2 / freedom * (math.log(_TAIL) + np.vectorize(math.lgamma)(freedom / 2 + 1))
  low = np.maximum(freedom * np.maximum(center - spread, 0) ** 3, 2 * np.exp(leading))
  return low, freedom * (center + spread) ** 3


def _mean_and_error(samples):
  """Mean over the leading axis and its standard error; NaN for one sample."""
  count = len(samples)
  spread = samples.std(0, ddof=1) if count > 1 else np.full(samples.shape[1:], np.nan)
  return samples.mean(0), spread / np.sqrt(count)
