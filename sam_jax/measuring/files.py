"""The files that a measurement leaves in its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from sam_jax import curvature

SUMMARY, REPORT = 'summary.json', 'report.html'
SPECTRUM, DENSITY_FIGURE = 'spectrum.npz', 'spectral_density.png'
LANDSCAPE, LANDSCAPE_FIGURE = 'landscape.npz', 'landscape.png'
RESULTS = (
  SUMMARY,
  REPORT,
  SPECTRUM,
  DENSITY_FIGURE,
  LANDSCAPE,
  LANDSCAPE_FIGURE,
)
_DENSITY = [field.name for field in dataclasses.fields(curvature.SpectralDensity)]


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a reader finds the old file or the new one, never half."""
  temporary = path.with_name(f'{path.name}.tmp')
  with open(temporary, 'w') as file:
    file.write(json.dumps(value, indent=2) + '\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def fingerprint(arrays: Any, *facts: Any) -> str:
  """Changes with each bit of the leaves of a pytree, and with facts that JSON holds."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  for fact in facts:
    digest.update(json.dumps(fact, sort_keys=True).encode())
  return digest.hexdigest()


def save_spectrum(
  path: pathlib.Path,
  pairs: curvature.Eigenpairs,
  density: curvature.SpectralDensity,
) -> None:
  """Writes the eigenvalues at both ends and the spectral density as npz."""
  np.savez(
    path,
    eigenvalues=pairs.eigenvalues,
    residuals=pairs.residuals,
    converged=pairs.converged,
    **dataclasses.asdict(density),
  )


def read_density(path: pathlib.Path) -> curvature.SpectralDensity:
  """The spectral density in a file `spectrum.npz`."""
  with np.load(path) as arrays:
    values = {name: arrays[name] for name in _DENSITY}
  return curvature.SpectralDensity(
    **{name: value if value.ndim else value.item() for name, value in values.items()}
  )
