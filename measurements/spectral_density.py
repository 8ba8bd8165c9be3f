"""The density of all eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

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

SPECTRUM = 'spectrum.npz'
_DENSITY = [field.name for field in dataclasses.fields(curvature.SpectralDensity)]


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


def read_density(path: pathlib.Path) -> curvature.SpectralDensity:
  """The spectral density in a file `spectrum.npz`."""
  with np.load(path) as arrays:
    values = {name: arrays[name] for name in _DENSITY}
  return curvature.SpectralDensity(
    **{name: value if value.ndim else value.item() for name, value in values.items()}
  )


def _run(context: Context) -> dict[str, Any]:
  context.show('spectral density')
  pairs = eigenvalues.pairs_of(context)
  with context.counted('spectral_density', context.operator) as products:
    density = curvature.spectral_density(
      products,
      context.options.num_matvecs,
      context.options.num_probes,
      key=context.key(1),
      pairs=pairs,
      max_basis_gib=context.options.max_basis_gib,
      check_symmetry=False,
    )
  np.savez(
    context.folder / SPECTRUM,
    eigenvalues=pairs.eigenvalues,
    residuals=pairs.residuals,
    converged=pairs.converged,
    **dataclasses.asdict(density),
  )
  return estimate('squared_frobenius_norm', density.moment(2))


MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  needs=('eigenvalues',),
  order=40,
  figures=(
    Figure('spectral_density.png', SPECTRUM, read_density, plotting.spectral_density),
  ),
)
