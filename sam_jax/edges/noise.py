"""The stochastic noise kernel norm: how near SGD on squared errors is to divergence."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import curvature
from sam_jax.curvature import operators, products, stacks

_STEP = 1.0  # size of the changes of outputs over which the curvature must be one
_SAME = 1e-3  # relative difference of second derivatives that float32 may show


def noise_kernel_norm(
  outputs_fn: Callable[[Any, Any], jax.Array],
  loss_fn: Callable[[jax.Array, Any], jax.Array],
  params: Any,
  batches: Iterable[Any],
  *,
  learning_rate: float,
  batch_size: int,
  weight: Callable[[Any], float] | None = None,
  num_pairs: int = 10,
  num_probes: int = 6,
  num_matvecs: int = 30,
  exact_up_to: int = 500,
  key: jax.Array | None = None,
  max_cache_gib: float = 2.0,
) -> curvature.Estimate:
  r"""The stochastic noise kernel norm K of SGD: its noise grows where K is above 1.

  .. math:: K = \frac{1}{C} \Big(\frac1B - \frac1D\Big)
            \sum_a \frac{\eta l_a}{2 - \eta l_a}

  with batches of B of the D examples, C outputs an example, and the eigenvalues
  :math:`l_a` of the Gauss-Newton matrix of the loss. For one output and
  :math:`L = \frac{1}{2D} \sum z^2` they are those of :math:`\Theta = J J^T / D`, and
  this is the norm of Agarwala and Pennington. The scale of the loss stands in its
  matrix: means over the outputs, and losses without the factor 1/2, need no other
  formula. C divides because the noise of one output acts, on average, through its own
  share of the spectrum only; for a kernel that is the same for each output, and 0
  between them, that is exact.

  K is infinite where full-batch gradient descent diverges, from a largest eigenvalue of
  2 / eta on. A network of few parameters has its matrix diagonalised. In a larger one
  the top eigenvalues are taken out exactly, and stochastic Lanczos quadrature
  estimates the rest. Only products of the Jacobian with vectors are taken.

  Args:
    outputs_fn: ``outputs_fn(params, batch)``, the network's outputs, one array. Give
      the same function objects to several calls and they are compiled once.
    loss_fn: ``loss_fn(outputs, batch) -> scalar``, a squared error averaged over the
      examples of the batch, exactly as it is trained. Errors of padding may be
      multiplied by 0.
    params: where the norm is taken; a pytree of floating-point arrays.
    batches: the whole data set in batches of any size, which do not change the result.
    learning_rate: eta, of SGD without momentum.
    batch_size: B, the number of examples that SGD takes a step.
    weight: number of examples of a batch; None is its leading dimension. Their sum is
      D.
    num_pairs: number of top eigenpairs that are taken out.
    num_probes: number of random probes for the rest; the standard error falls with its
      square root. At least 2.
    num_matvecs: Lanczos steps of each probe.
    exact_up_to: number of parameters up to which the matrix is diagonalised.
    key: typed PRNG key; None is ``jax.random.key(0)``.
    max_cache_gib: memory in GiB for what all products share.

  Returns:
    K with its standard error over the probes, which is 0 where K is exact or infinite,
    and the number of products taken.

  Raises:
    ValueError: the loss is not a squared error, or an argument is out of range.
    TypeError: a leaf of ``params`` is not floating point.

  >>> import jax.numpy as jnp
  >>> x = jnp.array([[1., 0.], [0., 2.], [1., 0.], [0., 2.]])
  >>> outputs = lambda w, x: x @ w
  >>> loss = lambda f, x: 0.5 * jnp.mean((f - 1) ** 2)
  >>> norm = noise_kernel_norm(
  ...     outputs, loss, jnp.zeros(2), [x], learning_rate=0.5, batch_size=1)
  >>> round(norm.value, 4)  # (1 - 1/4) * (0.25 / 1.75 + 1 / 1)
  0.8571

  References:
    Agarwala and Pennington, High dimensional analysis reveals conservative sharpening
    and a stochastic edge of stability, arXiv 2404.19261.
  """
  batches = [jax.device_put(batch) for batch in batches]
  weighted = operators.WeightedBatches(batches, weight)
  _check(learning_rate, batch_size, weighted.total, num_probes)
  num_outputs = _num_outputs(outputs_fn, loss_fn, params, weighted)
  operator = curvature.gauss_newton(
    outputs_fn, loss_fn, params, batches, weight=weight, max_cache_gib=max_cache_gib
  )
  if operator.size <= exact_up_to:
    sums = [_summand(learning_rate, np.linalg.eigvalsh(_dense(operator))).sum()]
  else:
    sums = _estimates(operator, learning_rate, num_pairs, num_probes, num_matvecs, key)
  factor = (1 / batch_size - 1 / weighted.total) / num_outputs
  value, error = float(np.mean(sums)), 0.0
  if len(sums) > 1 and math.isfinite(value):
    error = float(np.std(sums, ddof=1) / math.sqrt(len(sums)))
  if math.isinf(value):
    return curvature.Estimate(math.inf, 0.0, operator.num_matvecs)
  return curvature.Estimate(
    float(factor * value), float(factor * error), operator.num_matvecs
  )


def _check(learning_rate, batch_size, num_examples, num_probes):
  if not 0 <= learning_rate < math.inf:
    raise ValueError(f'learning_rate={learning_rate}: give a finite number from 0 on')
  if not 1 <= batch_size <= num_examples:
    raise ValueError(
      f'batch_size={batch_size}: give a number from 1 to that of the examples, '
      f'{num_examples:g}'
    )
  if num_probes < 2:
    raise ValueError(f'num_probes={num_probes}: a standard error needs at least 2')


def _summand(learning_rate: float, eigenvalues: np.ndarray) -> np.ndarray:
  """eta l / (2 - eta l), infinite from the edge on; rounding makes no l negative."""
  product = learning_rate * np.maximum(eigenvalues, 0)
  below = product < 2
  return np.where(below, product / np.where(below, 2 - product, 1), np.inf)


def _dense(operator: curvature.Operator) -> np.ndarray:
  """The matrix of an operator, by its products with the unit vectors; float64."""
  leaves, treedef = jax.tree.flatten(operator.structure)
  ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
  rows = []
  for unit in np.eye(operator.size):
    parts = zip(np.split(unit, ends), leaves, strict=True)
    vector = [jnp.asarray(part.reshape(leaf.shape), leaf.dtype) for part, leaf in parts]
    image = jax.tree.leaves(operator.matvec(treedef.unflatten(vector)))
    rows.append(np.concatenate([np.ravel(leaf) for leaf in image]).astype(np.float64))
  matrix = np.stack(rows)
  return (matrix + matrix.T) / 2


def _estimates(operator, learning_rate, num_pairs, num_probes, num_matvecs, key):
  """The sum over all eigenvalues: top ones exactly, the rest once by each probe."""
  pairs = curvature.eigenpairs(
    operator, min(num_pairs, operator.size), 'largest', key=key, verify=False
  )
  density = curvature.spectral_density(
    operator, num_matvecs, num_probes, key=key, pairs=pairs
  )
  top = _summand(learning_rate, density.outliers).sum()
  if not np.isfinite(_summand(learning_rate, pairs.eigenvalues)).all():
    return [math.inf]
  # A node without weight is only a filler, and inf * 0 would be NaN.
  values = np.where(density.weights > 0, _summand(learning_rate, density.nodes), 0)
  return top + operator.size * (density.weights * values).sum(1)


def _num_outputs(outputs_fn, loss_fn, params, batches) -> float:
  """Number of outputs an example whose errors count; refuses other losses."""
  found = []
  total = 0
  for batch, fraction in batches:
    entries = _second_derivatives(outputs_fn, loss_fn, params, batch)
    scales = np.asarray(entries, np.float64) * fraction * batches.total
    total += np.count_nonzero(scales[0])
    found.append(scales)
  largest = max(abs(x).max() for x in found)
  for scales in found:
    # Of padding all second derivatives are 0.
    wanted = largest * np.ones_like(scales[0]) * (scales[0] != 0)
    if not (largest > 0 and np.allclose(scales, wanted, atol=_SAME * largest)):
      raise ValueError(
        'loss_fn is not a squared error averaged over the examples of a batch: the '
        'noise kernel norm is defined for that loss only; measure batch_sharpness, '
        'which is defined for any'
      )
  return total / batches.total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _second_derivatives(outputs_fn, loss_fn, params, batch):
  """u * (H u) for signs u at three points of the outputs, (3, number of outputs).

  Of a squared error each entry is the one second derivative that it has.
  """
  outputs = outputs_fn(products.at_least_float32(params), batch)
  structure = stacks.structure(outputs)
  results = []
  for index, step in enumerate((0.0, _STEP, 2 * _STEP)):
    keys = jax.random.split(jax.random.key(index))
    signs = jax.random.rademacher(keys[0], structure.shape, structure.dtype)
    at = outputs + step * jax.random.normal(keys[1], structure.shape, structure.dtype)
    image = curvature.hvp(lambda f: loss_fn(f, batch), at, signs)
    results.append(jnp.ravel(signs * image))
  return jnp.stack(results)
