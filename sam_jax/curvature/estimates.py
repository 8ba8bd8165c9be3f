"""Stochastic estimates of traces, norms and diagonals, with their standard errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import placing
from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import lanczos, operators, stacks, transforms
from sam_jax.curvature import pairs as pairs_lib


class Estimate(NamedTuple):
  """An estimate.

  Attributes:
    value: the estimate, unbiased.
    standard_error: its standard error; 0 where the value is exact.
    num_matvecs: products taken.
  """

  value: float
  standard_error: float
  num_matvecs: int


def trace(
  operator: operators.Operator,
  num_matvecs: int = 60,
  *,
  key: jax.Array | None = None,
  pairs: pairs_lib.Eigenpairs | None = None,
  max_basis_gib: float = 8.0,
) -> Estimate:
  r"""Trace of an operator: a subspace exactly, the rest by random probes.

  .. math:: \mathrm{tr} A = \mathrm{tr}\, Q^T A Q
            + (n - r)\, \mathbb{E}\; z^T A z, \quad z \perp Q,\ |z| = 1

  The subspace takes the large eigenvalues out of the variance. It is that of known
  eigenvectors or, without ``pairs``, a Lanczos basis that half of the products grow.
  The estimate is unbiased for operators that are not symmetric too.

  Args:
    operator: an operator of size n.
    num_matvecs: number of products, at least 4; with pairs at least 2.
    key: typed PRNG key; None is ``jax.random.key(0)``.
    pairs: eigenpairs that are known already; the converged ones are used.
    max_basis_gib: memory in GiB, on each device, for the subspace and the work vectors.
      The subspace is made as small as it must be, and probes take its place; the
      estimate stays unbiased.

  Returns:
    The estimate with its standard error.

  Raises:
    ValueError: there are too few products, or there is no memory for one probe.
    NonFiniteError: the operator answered NaN or infinity.

  >>> import jax.numpy as jnp
  >>> diagonal = jnp.arange(100.)
  >>> op = operators.operator(lambda v: diagonal * v, diagonal)
  >>> estimate = trace(op, 60)
  >>> abs(estimate.value - 4950) < 4 * estimate.standard_error
  True

  References:
    Meyer et al., Hutch++, arXiv 2010.09649.
  """
  _require_products(num_matvecs, 4 if pairs is None else 2)
  key = basis_lib.stream(key, basis_lib.TRACE_STREAM)
  first = operator.num_matvecs
  layout = basis_lib.Layout.of(operator.structure)
  room = layout.room(max_basis_gib)
  if pairs is None:
    decomposition = lanczos.Decomposition(
      operator,
      layout.normal(jax.random.fold_in(key, 0)),
      check_symmetry=False,  # Any orthonormal basis serves.
    )
    decomposition.grow(min(num_matvecs // 2, room))
    inside, known = float(np.trace(decomposition.projected)), decomposition.basis
  else:
    values, _, known = pairs.known(layout, room)
    inside = float(values.sum())
  samples = [
    basis_lib.dot(probe, image)
    for probe, image in _probes(
      operator, known, num_matvecs - (operator.num_matvecs - first), key
    )
  ]
  return _of_samples(inside, operator, known, samples, first)


def squared_frobenius_norm(
  operator: operators.Operator,
  num_matvecs: int = 30,
  *,
  key: jax.Array | None = None,
  pairs: pairs_lib.Eigenpairs | None = None,
  max_basis_gib: float = 8.0,
) -> Estimate:
  r"""Sum of the squared eigenvalues: known pairs exactly, the rest by random probes.

  .. math:: \|A\|_F^2 = \sum_i (\theta_i^2 + |r_i|^2)
            + (n - r)\, \mathbb{E}\; |A z|^2, \quad z \perp Q,\ |z| = 1

  where :math:`r_i` is the residual of the pair :math:`\theta_i, q_i`. The largest
  eigenvalues are nearly all of the variance: give pairs where they are known. Of an
  operator that is not symmetric it is the sum of the squared singular values.

  Args:
    operator: an operator of size n.
    num_matvecs: number of products, at least 2.
    key: typed PRNG key; None is ``jax.random.key(0)``.
    pairs: eigenpairs that are known already; the converged ones are used.
    max_basis_gib: memory in GiB, on each device, for their eigenvectors and the work
      vectors; the smallest of them are left out where it is too little.

  Returns:
    The estimate with its standard error.

  Raises:
    ValueError: there are too few products, or there is no memory for one probe.
    NonFiniteError: the operator answered NaN or infinity.

  >>> import jax.numpy as jnp
  >>> diagonal = jnp.arange(10.)
  >>> op = operators.operator(lambda v: diagonal * v, diagonal)
  >>> estimate = squared_frobenius_norm(op, 40)
  >>> abs(estimate.value - 285) < 4 * estimate.standard_error
  True
  """
  _require_products(num_matvecs, 2)
  key = basis_lib.stream(key, basis_lib.FROBENIUS_STREAM)
  first = operator.num_matvecs
  layout = basis_lib.Layout.of(operator.structure)
  room = layout.room(max_basis_gib)
  inside, known = 0.0, basis_lib.Basis(layout)
  if pairs is not None:
    values, residuals, known = pairs.known(layout, room)
    inside = float((values**2 + residuals**2).sum())
  samples = [
    basis_lib.norm(image) ** 2
    for _, image in _probes(operator, known, num_matvecs, key)
  ]
  return _of_samples(inside, operator, known, samples, first)


@dataclasses.dataclass(frozen=True)
class DiagonalEstimate:
  """The diagonal of an operator, and its sums over each leaf.

  Attributes:
    value: pytree like a vector, the estimate of each entry, unbiased.
    standard_error: pytree like a vector, the standard error of each entry.
    leaf_traces: the trace of each leaf's diagonal block, by the path of the leaf as in
      `paths`; their standard errors are those of the sums, not of independent entries.
    num_matvecs: products taken.
  """

  value: Any
  standard_error: Any
  leaf_traces: dict[str, Estimate]
  num_matvecs: int


def diagonal(
  operator: operators.Operator,
  num_matvecs: int = 30,
  *,
  key: jax.Array | None = None,
) -> DiagonalEstimate:
  r"""Diagonal of an operator, and from the same products the trace of each leaf.

  .. math:: a_{jj} = \mathbb{E}\, z_j (A z)_j, \qquad
            \mathrm{tr} A_{LL} = \mathbb{E} \sum_{j \in L} z_j (A z)_j, \quad
            z_j = \pm 1

  The variance of an entry is :math:`\sum_{k \ne j} a_{jk}^2`: a diagonal operator's is
  exact. Its relative error is large in general, that of a leaf's trace is not. Both are
  unbiased for operators that are not symmetric too.

  Args:
    operator: an operator.
    num_matvecs: number of products, at least 2.
    key: typed PRNG key; None is ``jax.random.key(0)``.

  Returns:
    The estimates with their standard errors.

  Raises:
    ValueError: there are too few products.
    NonFiniteError: the operator answered NaN or infinity.

  >>> import jax.numpy as jnp
  >>> d = {'kernel': jnp.arange(4.), 'bias': jnp.ones(2)}
  >>> op = operators.operator(lambda v: jax.tree.map(jnp.multiply, d, v), d)
  >>> estimate = diagonal(op, 2)
  >>> estimate.value['kernel'].tolist(), estimate.leaf_traces['bias'].value
  ([0.0, 1.0, 2.0, 3.0], 2.0)

  References:
    Bekas et al., An estimator for the diagonal of a matrix, Applied Numerical
    Mathematics 57 (2007).
  """
  _require_products(num_matvecs, 2)
  key = basis_lib.stream(key, basis_lib.DIAGONAL_STREAM)
  first = operator.num_matvecs
  mean = squares = stacks.zero(stacks.structure(operator.structure))
  sums = []
  for index in range(num_matvecs):
    probe = _signs(jax.random.fold_in(key, index), operator)
    image = operator.matvec(probe)
    mean, squares, parts = _accumulate(mean, squares, index + 1, probe, image)
    sums.append([float(part) for part in parts])
    if not np.isfinite(sums[-1]).all():
      raise basis_lib.NonFiniteError('a product with the operator is not finite')
  used = operator.num_matvecs - first
  factor = 1 / (num_matvecs * (num_matvecs - 1))
  traces = [Estimate(*_mean_and_error(column), used) for column in np.transpose(sums)]
  return DiagonalEstimate(
    value=mean,
    standard_error=jax.tree.map(lambda s: jnp.sqrt(s * factor), squares),
    leaf_traces=dict(zip(transforms.paths(operator.structure), traces, strict=True)),
    num_matvecs=used,
  )


def _require_products(num_matvecs: int, least: int) -> None:
  if num_matvecs < least:
    raise ValueError(f'num_matvecs={num_matvecs}: give at least {least} products')


def _probes(operator, known, count, key):
  """Random unit vectors orthogonal to a basis, each with its product."""
  layout = known.layout
  for index in range(1, count + 1) if known.size < operator.size else ():
    probe = layout.normal(jax.random.fold_in(key, index))
    probe = basis_lib.orthonormal(probe, known)
    yield probe, layout.pack(operator.matvec(layout.unpack(probe)))


def _of_samples(inside, operator, known, samples, first) -> Estimate:
  """What the known part holds, and the mean of samples of the other dimensions."""
  value, error = _mean_and_error(samples) if samples else (0.0, 0.0)
  rest = operator.size - known.size
  if not math.isfinite(value):
    raise basis_lib.NonFiniteError('a product with the operator is not finite')
  return Estimate(inside + rest * value, rest * error, operator.num_matvecs - first)


def _mean_and_error(samples) -> tuple[float, float]:
  error = np.std(samples, ddof=1) / math.sqrt(len(samples))
  return float(np.mean(samples)), float(error)


@jax.jit
def _accumulate(mean, squares, count, probe, image):
  """Welford's update of means and summed squares, and the sum over each leaf."""
  product = jax.tree.map(jnp.multiply, probe, image)
  change = jax.tree.map(jnp.subtract, product, mean)
  mean = jax.tree.map(lambda m, c: m + c / count, mean, change)
  squares = jax.tree.map(
    lambda s, c, p, m: s + c * (p - m), squares, change, product, mean
  )
  return mean, squares, [jnp.sum(leaf) for leaf in jax.tree.leaves(product)]


def _signs(key: jax.Array, operator: operators.Operator) -> Any:
  """A random vector of -1 and 1."""
  leaves, treedef = jax.tree.flatten(operator.structure)
  return treedef.unflatten(placing.made(_signs_like, key, tuple(leaves)))


def _signs_like(key, leaves):
  keys = jax.random.split(key, len(leaves))
  return [
    jax.random.rademacher(each, leaf.shape, leaf.dtype)
    for each, leaf in zip(keys, leaves, strict=True)
  ]
