"""Spectral density: outliers exactly, the bulk by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import eigen, estimates, lanczos, operators

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
    lower: float64 (g,), pointwise 95 % band of that mean, NaN with a single probe.
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
    samples = self.size * (self.weights * self.nodes**power).sum(1)
    samples = samples + (self.outliers**power).sum()
    mean, error = _mean_and_error(samples)
    return estimates.Estimate(float(mean), float(error), self.num_matvecs)


def spectral_density(
  operator: operators.Operator,
  num_matvecs: int = 80,
  num_probes: int = 6,
  *,
  key: jax.Array | None = None,
  pairs: eigen.Eigenpairs | None = None,
  sigma: float | None = None,
  tol: float = 1e-4,
  max_basis_gib: float = 8.0,
) -> SpectralDensity:
  r"""Density of the eigenvalues, with a band over the probes.

  .. math:: \phi(x) = \frac1n \sum_{i=1}^n N(x; \lambda_i, \sigma^2)

  One eigenvalue far from the others gets a wildly varying weight from a random probe.
  So converged pairs are placed exactly with weight 1/n, and the probes are kept
  orthogonal to them. Without ``pairs`` those that the first probe's Lanczos run finds
  are taken.

  Args:
    operator: a symmetric operator of size n.
    num_matvecs: Lanczos steps a probe.
    num_probes: number of random probes; the band needs at least 2.
    key: typed PRNG key; None is ``jax.random.key(0)``.
    pairs: eigenpairs that are known already; the converged ones are used.
    sigma: standard deviation of the smoothing kernel; None is the range of the
      eigenvalues that are not outliers over num_matvecs, what so many steps resolve.
    tol: the residual, relative to the largest |theta|, at which a pair counts as
      converged.
    max_basis_gib: memory for the basis in GiB.

  Returns:
    The density.

  Raises:
    ValueError: an argument is out of range, or ``max_basis_gib`` is too little.
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
  need = (2 * num_matvecs + 6) * layout.vector_bytes / 2**30
  if need > max_basis_gib:
    raise ValueError(
      f'max_basis_gib={max_basis_gib:g}: {num_matvecs} Lanczos vectors of size '
      f'{operator.size:,} need {need:.2g} GiB; allow that, or take fewer'
    )
  quadratures = []
  if pairs is None:
    outliers, locked, quadrature = _first_probe(operator, layout, num_matvecs, key, tol)
    quadratures.append(quadrature)
  else:
    outliers, locked = pairs.known(layout)
  share = 1 - len(outliers) / operator.size
  for index in range(len(quadratures), num_probes if share > 0 else 0):
    start = layout.normal(jax.random.fold_in(key, index))
    decomposition = lanczos.Decomposition(operator, start, locked)
    decomposition.grow(num_matvecs)
    values, vectors, _ = decomposition.ritz()
    quadratures.append((values, share * vectors[0] ** 2))
  nodes, weights = _stack(quadratures)
  return _smooth(outliers, nodes, weights, sigma, num_matvecs, operator, first)


def _first_probe(operator, layout, num_matvecs, key, tol):
  """Outliers, their basis, and the quadrature of one probe without them."""
  decomposition = lanczos.Decomposition(
    operator, layout.normal(jax.random.fold_in(key, 0))
  )
  decomposition.grow(num_matvecs)
  values, vectors, bounds = decomposition.ritz()
  weights = vectors[0] ** 2
  converged = bounds <= tol * np.abs(values).max()
  # A weight far above 1/n is a repeated eigenvalue, such as 0, and no single outlier.
  single = (weights <= 30 / operator.size) | (len(values) == operator.size)
  chosen = converged & single
  locked = decomposition.basis.combine(vectors[:, chosen])
  share = 1 - chosen.sum() / operator.size
  rest = weights[~chosen]
  rest = share * rest / max(rest.sum(), np.finfo(float).tiny)
  return values[chosen], locked, (values[~chosen], rest)


def _stack(quadratures):
  """Nodes and weights (num_probes, longest), filled up with nodes of weight 0."""
  longest = max((len(values) for values, _ in quadratures), default=0)
  nodes = np.zeros((len(quadratures), longest))
  weights = np.zeros((len(quadratures), longest))
  for row, (values, parts) in enumerate(quadratures):
    nodes[row, : len(values)] = values
    nodes[row, len(values) :] = values[-1] if len(values) else 0.0
    weights[row, : len(values)] = parts
  return nodes, weights


def _smooth(outliers, nodes, weights, sigma, num_matvecs, operator, first):
  every = np.concatenate([outliers, nodes[weights > 0]])
  low, high = every.min(), every.max()
  extent = (high - low) or abs(high) or 1.0
  if sigma is None:
    # The outliers are exact, so the steps resolve the range of the others; but no finer
    # than what a grid over everything can show.
    rest = np.ptp(nodes[weights > 0]) if nodes.size else extent
    sigma = max(rest / num_matvecs, extent / 2000)
  sigma = float(sigma)
  if not sigma > 0:
    raise ValueError(f'sigma={sigma}: give a standard deviation above 0')
  count = int(np.ceil((high - low + 8 * sigma) / (sigma / 4))) + 1
  grid = np.linspace(low - 4 * sigma, high + 4 * sigma, count)
  exact = np.zeros(count)
  for value in outliers:
    exact += _kernel(grid, value, sigma) / operator.size
  curves = (
    np.stack(
      [
        exact
        + sum(
          (w * _kernel(grid, x, sigma) for x, w in zip(*row, strict=True)),
          np.zeros(count),
        )
        for row in zip(nodes, weights, strict=True)
      ]
    )
    if len(nodes)
    else exact[None]
  )
  mean, error = _mean_and_error(curves)
  margin = _student(len(curves) - 1) * error
  return SpectralDensity(
    outliers=outliers,
    nodes=nodes,
    weights=weights,
    grid=grid,
    density=mean,
    lower=np.maximum(mean - margin, 0),
    upper=mean + margin,
    sigma=sigma,
    size=operator.size,
    num_matvecs=operator.num_matvecs - first,
  )


def _kernel(grid, center, sigma):
  return np.exp(-0.5 * ((grid - center) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))


def _mean_and_error(samples):
  """Mean over the leading axis and its standard error; NaN for one sample."""
  count = len(samples)
  spread = samples.std(0, ddof=1) if count > 1 else np.full(samples.shape[1:], np.nan)
  return samples.mean(0), spread / np.sqrt(count)


def _student(freedom: int) -> float:
  if freedom < 1:
    return np.nan
  if freedom <= len(_STUDENT):
    return _STUDENT[freedom - 1]
  z = 1.959964
  return (
    z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
  )
