"""Stochastic estimates of traces, each with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import lanczos, operators


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
) -> Estimate:
  r"""Trace of an operator: a Krylov basis exactly, the rest by random probes.

  .. math:: \mathrm{tr} A = \mathrm{tr}\, Q^T A Q
            + (n - r)\, \mathbb{E}\; z^T A z, \quad z \perp Q,\ |z| = 1

  Half of the products grow a Lanczos basis Q of r vectors, which takes the large
  eigenvalues out of the variance; the others are for the probes z.

  Args:
    operator: a symmetric operator of size n.
    num_matvecs: number of products, at least 4.
    key: typed PRNG key; None is ``jax.random.key(0)``.

  Returns:
    The estimate with its standard error.

  Raises:
    ValueError: fewer than 4 products.
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
  if num_matvecs < 4:
    raise ValueError(f'num_matvecs={num_matvecs}: the trace needs at least 4 products')
  key = jax.random.key(0) if key is None else key
  first = operator.num_matvecs
  layout = basis_lib.Layout.of(operator.structure)
  decomposition = lanczos.Decomposition(
      operator, layout.normal(jax.random.fold_in(key, 0))
  )
  decomposition.grow(num_matvecs // 2)
  inside = float(np.trace(decomposition.projected))
  rest = operator.size - decomposition.size
  if not rest:
    return Estimate(inside, 0.0, operator.num_matvecs - first)
  samples = []
  for index in range(1, num_matvecs - decomposition.size + 1):
    probe = layout.normal(jax.random.fold_in(key, index))
    probe = basis_lib.orthonormal(probe, decomposition.basis)
    image = layout.pack(operator.matvec(layout.unpack(probe)))
    samples.append(rest * basis_lib.dot(probe, image))
  return Estimate(
      value=inside + float(np.mean(samples)),
      standard_error=float(np.std(samples, ddof=1) / np.sqrt(len(samples))),
      num_matvecs=operator.num_matvecs - first,
  )
