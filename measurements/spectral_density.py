"""The density of all eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
from typing import Any

from measurements import eigenvalues
from measurements.context import Context
from measurements.measurement import (
  Figure,
  Measurement,
  at_least,
  at_most,
  estimate,
  option,
)
from sam_jax import curvature, plotting
from sam_jax.measuring import files


@dataclasses.dataclass(frozen=True)
class Options:
  """How finely."""

  num_matvecs: int = option(
    60,
    'Lanczos steps of each probe of the spectral density',
    at_least(1),
    at_most(5000),
  )
  num_probes: int = option(
    4, 'random probes of the spectral density', at_least(1), at_most(5000)
  )


def _run(context: Context) -> dict[str, Any]:
  pairs = eigenvalues.pairs_of(context)
  total = context.options.num_matvecs * context.options.num_probes
  with context.counted('spectral_density', context.operator, total) as products:
    density = curvature.spectral_density(
      products,
      context.options.num_matvecs,
      context.options.num_probes,
      key=context.key(1),
      pairs=pairs,
      max_basis_gib=context.options.max_basis_gib,
      check_symmetry=False,
    )
  files.save_spectrum(context.folder / files.SPECTRUM, pairs, density)
  return estimate('squared_frobenius_norm', density.moment(2))


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  needs=('eigenvalues',),
  order=40,
  figures=(
    Figure(
      files.DENSITY_FIGURE,
      files.SPECTRUM,
      files.read_density,
      plotting.spectral_density,
    ),
  ),
)
