"""The stochastic noise kernel norm: how near SGD on squared errors is to divergence."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
  momentum: float = 0.0,
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

  With momentum :math:`\beta` (heavy ball, ``v = beta v + g``) the summand is that of
  `noise_kernel_norm_of_spectrum`. K is infinite where full-batch descent diverges, from
  a largest eigenvalue of 2 (1 + beta) / eta on. A network of few parameters has its
  matrix diagonalised. In a larger one the top eigenvalues are taken out exactly, and
  stochastic Lanczos quadrature estimates the rest. Only products of the Jacobian with
  vectors are taken.

  Args:
    outputs_fn: ``outputs_fn(params, batch)``, the network's outputs, one array. Give
      the same function objects to several calls and they are compiled once.
    loss_fn: ``loss_fn(outputs, batch) -> scalar``, a squared error averaged over the
      examples of the batch, exactly as it is trained. Errors of padding may be
      multiplied by 0.
    params: where the norm is taken; a pytree of floating-point arrays.
    batches: the whole data set in batches of any size, which do not change the result.
    learning_rate: eta, of SGD.
    batch_size: B, the number of examples that SGD takes a step.
    momentum: beta, the decay rate of the velocity of ``optax.sgd``, in [0, 1).
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
    NonFiniteError: of `sam_jax.curvature`; the Gauss-Newton matrix is not finite.
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
  _check(learning_rate, batch_size, momentum, weighted.total)
  if num_probes < 2:
    raise ValueError(f'num_probes={num_probes}: a standard error needs at least 2')
  num_outputs = _squared_error(outputs_fn, loss_fn, params, weighted).num_outputs
  summand = functools.partial(_summand, learning_rate, momentum)
  operator = curvature.gauss_newton(
    outputs_fn, loss_fn, params, batches, weight=weight, max_cache_gib=max_cache_gib
  )
  if operator.size <= exact_up_to:
    sums = [summand(np.linalg.eigvalsh(_dense(operator))).sum()]
  else:
    sums = _estimates(operator, summand, num_pairs, num_probes, num_matvecs, key)
  factor = (1 / batch_size - 1 / weighted.total) / num_outputs
  value, error = float(np.mean(sums)), 0.0
  if len(sums) > 1 and math.isfinite(value):
    error = float(np.std(sums, ddof=1) / math.sqrt(len(sums)))
  if math.isinf(value):
    return curvature.Estimate(math.inf, 0.0, operator.num_matvecs)
  return curvature.Estimate(
    float(factor * value), float(factor * error), operator.num_matvecs
  )


def noise_kernel_norm_of_spectrum(
  eigenvalues: np.ndarray,
  *,
  learning_rate: float,
  batch_size: int,
  num_examples: int,
  num_outputs: float = 1,
  momentum: float = 0.0,
) -> float:
  r"""The noise kernel norm where all eigenvalues of the Gauss-Newton matrix are known.

  .. math:: K = \frac{1}{C} \Big(\frac1B - \frac1D\Big) \sum_a
            \frac{1 + \beta}{1 - \beta}
            \frac{\eta l_a}{2 (1 + \beta) - \eta l_a}

  Without momentum :math:`\beta` this is the norm of Agarwala and Pennington. With it,
  the factor of each eigenvalue is the variance of the second-order autoregression
  :math:`x_{t+1} = (1 + \beta - \eta l) x_t - \beta x_{t-1} + \xi_t` that heavy ball
  makes of the noise, in place of that of the first-order one that SGD makes. The noise
  of a step depends on the errors at that step alone, so that K = 1 again parts decay
  from growth.

  Args:
    eigenvalues: all that are not zero, with their multiplicity; those of
      ``J J^T / D`` for one output and half the squared error.
    learning_rate: eta.
    batch_size: B, the number of examples a step.
    num_examples: D, the number of examples that there are.
    num_outputs: C, the number of outputs an example.
    momentum: beta, the decay rate of the velocity ``v = beta v + g``, in [0, 1).

  Returns:
    K; infinite from a largest eigenvalue of ``2 (1 + beta) / eta`` on.

  Raises:
    ValueError: an argument is out of range, or an eigenvalue is NaN.

  >>> round(noise_kernel_norm_of_spectrum(
  ...     [0.5, 2.], learning_rate=0.5, batch_size=1, num_examples=4), 4)
  0.8571

  References:
    Agarwala and Pennington, High dimensional analysis reveals conservative sharpening
    and a stochastic edge of stability, arXiv 2404.19261.
  """
  _check(learning_rate, batch_size, momentum, num_examples)
  eigenvalues = np.asarray(eigenvalues, np.float64)
  if np.isnan(eigenvalues).any():
    raise ValueError('eigenvalues: NaN is among them; give numbers')
  total = _summand(learning_rate, momentum, eigenvalues).sum()
  if math.isinf(total):  # Of a whole batch too, whose factor is 0.
    return math.inf
  return float((1 / batch_size - 1 / num_examples) * total / num_outputs)


def _check(learning_rate, batch_size, momentum, num_examples):
  if not 0 <= learning_rate < math.inf:
    raise ValueError(f'learning_rate={learning_rate}: give a finite number from 0 on')
  if not 1 <= batch_size <= num_examples:
    raise ValueError(
      f'batch_size={batch_size}: give a number from 1 to that of the examples, '
      f'{num_examples:g}'
    )
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum={momentum}: give a number from 0 on and below 1')


def _summand(
  learning_rate: float, momentum: float, eigenvalues: np.ndarray
) -> np.ndarray:
  """An eigenvalue's share of C K / (1/B - 1/D), infinite from the edge on.

  Rounding makes no eigenvalue negative.
  """
  product, edge = learning_rate * np.maximum(eigenvalues, 0), 2 * (1 + momentum)
  below = product < edge
  found = np.where(below, product / np.where(below, edge - product, 1), np.inf)
  return (1 + momentum) / (1 - momentum) * found


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
  if not np.isfinite(matrix).all():
    raise curvature.NonFiniteError('the Gauss-Newton matrix is not finite')
  return (matrix + matrix.T) / 2


def _estimates(operator, summand, num_pairs, num_probes, num_matvecs, key):
  """The sum over all eigenvalues: top ones exactly, the rest once by each probe."""
  pairs = curvature.eigenpairs(
    operator, min(num_pairs, operator.size), 'largest', key=key, verify=False
  )
  density = curvature.spectral_density(
    operator, num_matvecs, num_probes, key=key, pairs=pairs
  )
  top = summand(density.outliers).sum()
  if not np.isfinite(summand(pairs.eigenvalues)).all():
    return [math.inf]
  # A node without weight is only a filler, and inf * 0 would be NaN.
  values = np.where(density.weights > 0, summand(density.nodes), 0)
  return top + operator.size * (density.weights * values).sum(1)


class SquaredError(NamedTuple):
  """What a loss that is a squared error is made of.

  Attributes:
    num_outputs: number of outputs an example whose errors count.
    second_derivative: of an example's loss by each of its outputs; 1 for half the
      squared error of one output.
  """

  num_outputs: float
  second_derivative: float


def squared_error(
  outputs_fn: Callable[[Any, Any], jax.Array],
  loss_fn: Callable[[jax.Array, Any], jax.Array],
  params: Any,
  batches: Iterable[Any],
  *,
  weight: Callable[[Any], float] | None = None,
) -> SquaredError:
  """What a squared error is made of, and whether a loss is one.

  The second derivatives of the loss by the outputs have to be one number, at the
  outputs of the network and at two random points near them.

  Args:
    outputs_fn: ``outputs_fn(params, batch)``, the network's outputs, one array.
    loss_fn: ``loss_fn(outputs, batch) -> scalar``, the mean loss over the batch. Errors
      of padding may be multiplied by 0.
    params: where the outputs are taken; a pytree of floating-point arrays.
    batches: data in batches of any size.
    weight: number of examples of a batch; None is its leading dimension.

  Returns:
    Number of outputs and second derivative.

  Raises:
    ValueError: the loss is not a squared error averaged over the examples of a batch.

  >>> import jax.numpy as jnp
  >>> outputs = lambda w, x: x @ w
  >>> squared_error(outputs, lambda f, x: jnp.mean((f - 1) ** 2), jnp.ones((2, 4)),
  ...               [jnp.ones((8, 2))])
  SquaredError(num_outputs=4.0, second_derivative=0.5)
  """
  weighted = operators.WeightedBatches(batches, weight)
  return _squared_error(outputs_fn, loss_fn, params, weighted)


def _squared_error(outputs_fn, loss_fn, params, batches) -> SquaredError:
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
  return SquaredError(float(total / batches.total), float(largest))


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
