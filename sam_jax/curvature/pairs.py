"""Eigenpairs as a result: with certificates, in memory and in files."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import npz, placing
from sam_jax.curvature import basis as basis_lib

_LEAF = 'eigenvectors_{}'  # name of the leaves of that number in a file


@dataclasses.dataclass(frozen=True)
class Eigenpairs:
  """Eigenpairs with certificates; eigenvalues descend.

  Attributes:
    eigenvalues: float64 (r,), Rayleigh quotients.
    eigenvectors: r pytrees of norm 1, orthogonal to each other.
    residuals: float64 (r,), the true ``|A v - theta v|``, measured by one product each.
      An eigenvalue of the operator lies within it of each theta.
    bounds: float64 (r,), the residuals that the Lanczos recurrence predicted.
    converged: bool (r,), residual <= tol * scale.
    scale: the largest |theta| met in the search.
    tol: the tolerance asked for.
    num_matvecs: products taken, the final ones included.
    verified: all pairs converged, and a search from a fresh random vector, orthogonal
      to them, met no further eigenvalue among the wanted: no copy of a repeated one is
      missing.
  """

  eigenvalues: np.ndarray
  eigenvectors: tuple[Any, ...]
  residuals: np.ndarray
  bounds: np.ndarray
  converged: np.ndarray
  scale: float
  tol: float
  num_matvecs: int
  verified: bool

  def known(
    self, layout: basis_lib.Layout, most: int | None = None
  ) -> tuple[np.ndarray, np.ndarray, basis_lib.Basis]:
    """The converged pairs, for deflation.

    Args:
      layout: that of the operator's vectors.
      most: only so many, those of the largest absolute value; None is all.

    Returns:
      The eigenvalues, the residuals, and a basis of the eigenvectors.
    """
    chosen = np.flatnonzero(self.converged)
    chosen = np.sort(chosen[np.argsort(-np.abs(self.eigenvalues[chosen]))][:most])
    basis = basis_lib.Basis(layout)
    for index in chosen:
      vector = layout.pack(self.eigenvectors[index])
      basis.append(basis_lib.orthonormal(vector, basis))
    return self.eigenvalues[chosen], self.residuals[chosen], basis

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes an npz file that `load_eigenpairs` reads.

    It holds the arrays under their names and, as ``eigenvectors_0``,
    ``eigenvectors_1`` and so on, the leaves of the eigenvectors: (r, *shape), of at
    least float32.

    Raises:
      ValueError: the eigenvectors lie on devices of several processes.
    """
    if not all(x.is_fully_addressable for x in jax.tree.leaves(self.eigenvectors)):
      raise ValueError(
        'the eigenvectors lie on devices of several processes, and no one of these can '
        'write them into an npz file: save .eigenvectors as a checkpoint, with '
        'orbax.checkpoint.StandardCheckpointer'
      )
    arrays = {name: getattr(self, name) for name in _SAVED}
    leaves = zip(*map(jax.tree.leaves, self.eigenvectors), strict=True)
    for index, parts in enumerate(leaves):
      dtype = jnp.promote_types(parts[0].dtype, jnp.float32)
      arrays[_LEAF.format(index)] = np.stack([np.asarray(x, dtype) for x in parts])
    with open(path, 'wb') as file:
      np.savez(file, **arrays)


_SAVED = [f.name for f in dataclasses.fields(Eigenpairs) if f.name != 'eigenvectors']


def load_eigenpairs(path: str | os.PathLike[str], like: Any) -> Eigenpairs:
  """Reads eigenpairs that `Eigenpairs.save` wrote.

  Args:
    path: the file.
    like: a pytree with the structure, shapes and dtypes of an eigenvector: the
      parameters, or the ``structure`` of the operator. The eigenvectors lie on a mesh
      as it does.

  Returns:
    The eigenpairs, bit for bit; to draw along, or a warm start for `eigenpairs`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no such file, or its eigenvectors do not have the shapes of
      ``like``.

  >>> import os, tempfile
  >>> import jax.numpy as jnp
  >>> from sam_jax import curvature
  >>> op = curvature.operator(lambda v: 2 * v, jnp.zeros(3))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = os.path.join(folder, 'pairs.npz')
  ...   curvature.eigenpairs(op, 1).save(file)
  ...   load_eigenpairs(file, op.structure).eigenvalues.round(4).tolist()
  [2.0, 2.0]
  """
  layout = basis_lib.Layout.of(like)
  with npz.read(path, (*_SAVED,), 'Eigenpairs.save') as arrays:
    names = [name for name in arrays.files if name not in _SAVED]
    saved_leaves = [arrays[_LEAF.format(index)] for index in range(len(names))]
    saved = {name: arrays[name] for name in _SAVED}
  shapes = tuple(stack.shape[1:] for stack in saved_leaves)
  if shapes != layout.shapes:
    raise ValueError(
      f'{os.fspath(path)} holds eigenvectors with leaves of shapes {list(shapes)}, but '
      f'like= has {list(layout.shapes)}: give the parameters they were computed for'
    )
  described = zip(saved_leaves, layout.dtypes, jax.tree.leaves(like), strict=True)
  leaves = [
    [placing.on_devices(part, dtype, leaf) for part in stack]
    for stack, dtype, leaf in described
  ]
  return Eigenpairs(
    eigenvectors=tuple(map(layout.treedef.unflatten, zip(*leaves, strict=True))),
    **{name: x if x.ndim else x.item() for name, x in saved.items()},
  )
