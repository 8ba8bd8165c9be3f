"""What is measured of a network."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from training.config import require_choice
from training.errors import UsageError

SPLITS = ('train', 'test')
_CHOICES = {
  'split': SPLITS,
  'operator': ('hessian', 'gauss_newton', 'fisher'),
  'preconditioner': ('none', 'adaptive', 'adam'),
  'batch_norm': ('eval', 'train'),
  'dtype': ('float32', 'float64'),
  'landscape_directions': (
    'filter',
    'layer',
    'gaussian',
    'eigenvectors',
    'trajectory',
  ),
  'worst_case_norm': ('l2', 'linf'),
}
_LEAST = {
  'num_examples': 0,
  'top_k': 1,
  'max_num_matvecs': 1,
  'num_matvecs': 1,
  'num_probes': 1,
  'trace_matvecs': 2,
  'landscape_points': 0,
  'eigen_ratio_points': 0,
  'one_batch_repeats': 0,
  'worst_case_group': 1,
  'worst_case_steps': 1,
  'average_case_samples': 2,
  'batch_size': 1,
  'seed': 0,
}


def _option(default: Any, help_text: str) -> Any:
  return dataclasses.field(default=default, metadata={'help': help_text})


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured; each field is a flag of `eval_hessian.py`."""

  split: str = _option('train', 'the examples of the loss: train or test')
  num_examples: int = _option(
    0, 'average over so many examples, drawn by --seed; 0: the whole split'
  )
  operator: str = _option(
    'hessian',
    'hessian, gauss_newton (its positive semidefinite part) or fisher (of the '
    "examples' gradients)",
  )
  params_regex: str = _option(
    '', 'only the parameters whose path (Dense_0/kernel) has a match'
  )
  preconditioner: str = _option(
    'none',
    'none; adaptive: T H T with T = |w|; adam: P^-1/2 H P^-1/2 with the second moments '
    "of the run's optimizer",
  )
  per_layer: bool = _option(
    False, 'also the trace and the largest eigenvalue of the block of each layer'
  )
  batch_norm: str = _option(
    'eval', "eval: the running statistics are constants; train: the batch's own"
  )
  dtype: str = _option('float32', 'of parameters and products, float32 or float64')
  top_k: int = _option(5, 'eigenvalues at each end')
  tol: float = _option(
    1e-4, 'residual of each eigenpair, relative to the largest |eigenvalue|'
  )
  max_num_matvecs: int = _option(2000, 'most products for one set of eigenpairs')
  max_basis_gib: float = _option(8.0, 'memory for Lanczos vectors; restarts stay below')
  max_journal_gib: float = _option(
    8.0, 'disk for products that a killed measurement need not repeat; 0: none'
  )
  num_matvecs: int = _option(60, 'Lanczos steps of each probe of the spectral density')
  num_probes: int = _option(4, 'random probes of the spectral density')
  trace_matvecs: int = _option(30, 'products for the trace')
  landscape_points: int = _option(21, 'points a side of the loss surface; 0: none')
  landscape_extent: float = _option(
    1.0, 'the surface reaches so far each way, in units of its directions'
  )
  landscape_directions: str = _option(
    'filter',
    'filter, layer or gaussian: random, normalised so; eigenvectors: of lambda_max '
    'and lambda_2; trajectory: principal components of the checkpoints kept',
  )
  landscape_biases: bool = _option(
    False, 'random directions also move biases and normalization parameters'
  )
  landscape_towards: str = _option(
    '', 'also the loss on the line to the network of this other workdir'
  )
  eigen_ratio_points: int = _option(
    0, 'points a side of a map of |lambda_min / lambda_max| on the surface; 0: none'
  )
  vtk: bool = _option(False, 'also write the surface as landscape.vtk, for ParaView')
  worst_case_rho: float = _option(
    0.05, 'radius of the ball in which the loss is maximised; 0: not measured'
  )
  worst_case_norm: str = _option('l2', 'norm of that ball, l2 or linf')
  worst_case_group: int = _option(
    128, 'examples that share one worst perturbation: the m of m-sharpness'
  )
  worst_case_steps: int = _option(20, 'steps of gradient ascent to it')
  average_case_sigma: float = _option(
    0.01, 'standard deviation of the noise under which the loss is averaged; 0: none'
  )
  average_case_samples: int = _option(20, 'draws of that noise')
  adaptive_ball: bool = _option(
    False, 'the ball and the noise are in units of |w|, parameter by parameter'
  )
  one_batch_repeats: int = _option(
    5, 'also measure single batches of the training size, so many; 0: none'
  )
  batch_size: int = _option(
    128, 'examples a product takes at a time; alters the result in train mode only'
  )
  seed: int = _option(0, 'of start vectors, probes, directions and drawn examples')

  def validate(self) -> None:
    """Checks the values.

    Raises:
      UsageError: names the flag, its value and what it may be.
    """
    for name, choices in _CHOICES.items():
      require_choice(name, getattr(self, name), choices)
    for name, least in _LEAST.items():
      self._require(name, getattr(self, name) >= least, f'must be at least {least}')
    for name in ('max_basis_gib', 'landscape_extent'):
      self._require(name, 0 < getattr(self, name) < math.inf, 'must be above 0')
    for name in ('max_journal_gib', 'worst_case_rho', 'average_case_sigma'):
      self._require(name, 0 <= getattr(self, name) < math.inf, 'must not be negative')
    self._require('tol', 0 < self.tol < 1, 'must be above 0 and below 1')
    try:
      re.compile(self.params_regex)
    except re.error as error:
      reason = f'is not a regular expression ({error})'
      raise UsageError(f'--params_regex={self.params_regex} {reason}.') from error

  def _require(self, name: str, condition: bool, reason: str) -> None:
    if not condition:
      raise UsageError(f'--{name}={getattr(self, name)}: {reason}.')
