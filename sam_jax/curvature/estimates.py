"""Stochastic estimates of traces, each with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import eigen, lanczos, operators


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
  pairs: eigen.Eigenpairs | None = None,
) -> Estimate:
  r"""Trace of an operator: a subspace exactly, the rest by random probes.

  .. math:: \mathrm{tr} A = \mathrm{tr}\, Q^T A Q
            + (n - r)\, \mathbb{E}\; z^T A z, \quad z \perp Q,\ |z| = 1

  The subspace takes the large eigenvalues out of the variance. It is that of known
  eigenvectors or, without ``pairs``, a Lanczos basis that half of the products grow.

  Args:
    operator: a symmetric operator of size n.
    num_matvecs: number of products, at least 4; with pairs at least 2.
    key: typed PRNG key; None is ``jax.random.key(0)``.
    pairs: eigenpairs that are known already; the converged ones are used.

  Returns:
    The estimate with its standard error.

  Raises:
    ValueError: there are too few products.
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
  least = 4 if pairs is None else 2
  if num_matvecs < least:
    raise ValueError(f'num_matvecs={num_matvecs}: give at least {least} products')
  key = basis_lib.stream(key, basis_lib.TRACE_STREAM)
  first = operator.num_matvecs
  layout = basis_lib.Layout.of(operator.structure)
  if pairs is None:
    decomposition = lanczos.Decomposition(
      operator, layout.normal(jax.random.fold_in(key, 0))
    )
    decomposition.grow(num_matvecs // 2)
    inside, known = float(np.trace(decomposition.projected)), decomposition.basis
  else:
    values, known = pairs.known(layout)
    inside = float(values.sum())
  rest = operator.size - known.size
  if not rest:
    return Estimate(inside, 0.0, operator.num_matvecs - first)
  samples = []
  for index in range(1, num_matvecs - (operator.num_matvecs - first) + 1):
    probe = layout.normal(jax.random.fold_in(key, index))
    probe = basis_lib.orthonormal(probe, known)
    image = layout.pack(operator.matvec(layout.unpack(probe)))
    samples.append(rest * basis_lib.dot(probe, image))
  return Estimate(
    value=inside + float(np.mean(samples)),
    standard_error=float(np.std(samples, ddof=1) / np.sqrt(len(samples))),
    num_matvecs=operator.num_matvecs - first,
  )
