"""Extreme eigenpairs, each with what is known about its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import lanczos, operators
from sam_jax.curvature.pairs import Eigenpairs

Which = Literal['largest', 'smallest', 'both']
_MISS_PROBABILITY = 1e-3
_SIGNS = {'largest': (1,), 'smallest': (-1,), 'both': (1, -1)}


class Progress(NamedTuple):
  """Where a search for eigenpairs stands.

  Attributes:
    num_matvecs: products taken.
    residual: the largest residual bound of the pairs looked for, relative to the
      largest |theta|; infinite while there are fewer pairs than wanted.
    num_converged: how many of the pairs meet the tolerance.
    num_wanted: how many pairs are looked for.
    eigenvalues: the present values of the pairs looked for, descending.
  """

  num_matvecs: int
  residual: float
  num_converged: int
  num_wanted: int
  eigenvalues: np.ndarray


def eigenpairs(
  operator: operators.Operator,
  k: int = 5,
  which: Which = 'both',
  *,
  tol: float = 1e-4,
  key: jax.Array | None = None,
  start: Any = None,
  max_num_matvecs: int = 1000,
  max_basis_gib: float = 8.0,
  max_basis_size: int = 400,
  verify: bool = True,
  check_symmetry: bool = True,
  progress: Callable[[Progress], None] | None = None,
) -> Eigenpairs:
  r"""Extreme eigenvalues of an operator by thick-restart Lanczos, to a tolerance.

  Iterates until each wanted pair has :math:`|A v - \theta v| \le tol \max|\theta|`.
  Every new vector is orthogonalised twice against all others, so no eigenvalue
  appears twice that the operator has once. One Krylov space holds a repeated
  eigenvalue only once: with ``verify`` further ones are looked for from fresh random
  vectors, orthogonal to what was found, until nothing new appears.

  Args:
    operator: a symmetric operator.
    k: number of pairs at each end.
    which: 'largest' or 'smallest' (algebraically), or 'both' for k of each.
    tol: wanted residual, relative to the largest |theta|.
    key: typed PRNG key of the random start vectors; None is ``jax.random.key(0)``.
    start: warm start: a pytree like a vector, or an `Eigenpairs` of a near operator.
    max_num_matvecs: stop after so many products, with what was reached.
    max_basis_gib: memory for the basis in GiB, on each device where the parameters lie
      on several; a restart keeps it below.
    max_basis_size: number of basis vectors at which to restart in any case.
    verify: look for missed copies of repeated eigenvalues.
    check_symmetry: raise an error if the products are not those of a symmetric
      operator. It takes no further products: those of the search are compared.
    progress: called after every product.

  Returns:
    The pairs: k of them, or for 'both' 2k (all, where the operator has no more).

  Raises:
    ValueError: an argument is out of range, or ``max_basis_gib`` is too little.
    AsymmetryError: the operator is not symmetric; it is a ValueError.
    NonFiniteError: the operator answered NaN or infinity.

  >>> import jax.numpy as jnp
  >>> diagonal = jnp.array([5., 3., 3., 1., 0., -2.])
  >>> result = eigenpairs(operators.operator(lambda v: diagonal * v, diagonal), k=3,
  ...                     which='largest')
  >>> result.eigenvalues.round(4).tolist(), bool(result.converged.all())
  ([5.0, 3.0, 3.0], True)

  References:
    Wu and Simon, Thick-restart Lanczos, SIAM J. Matrix Anal. Appl. 22 (2000).
  """
  if which not in _SIGNS:
    raise ValueError(f'which={which!r}: give one of {sorted(_SIGNS)}')
  if not (isinstance(k, int | np.integer) and 1 <= k <= operator.size):
    raise ValueError(f'k={k}: give a whole number from 1 to the size, {operator.size}')
  if not 0 < tol < 1:
    raise ValueError(f'tol={tol}: give a relative tolerance between 0 and 1')
  search = _Search(operator, k, which, tol, max_num_matvecs, progress, check_symmetry)
  search.limit_basis(max_basis_gib, max_basis_size)
  key = basis_lib.stream(key, basis_lib.EIGENPAIRS_STREAM)
  verified = search.run(_start_vector(search.layout, start, key))
  round_ = 0
  while verify and verified and not search.complete:
    round_ += 1
    fresh = search.layout.normal(jax.random.fold_in(key, round_))
    found = search.num_found
    verified = search.run(fresh)
    if search.num_found == found:
      break
  return search.finish(verified and (verify or search.complete))


class _Search:
  """The pairs found so far, and the rounds of Lanczos that look for more."""

  def __init__(
    self, operator, k, which, tol, max_num_matvecs, progress, check_symmetry
  ):
    self.operator = operator
    self.check_symmetry = check_symmetry
    self.layout = basis_lib.Layout.of(operator.structure)
    self.k = k
    self.signs = _SIGNS[which]
    self.tol = tol
    self.progress = progress
    self.num_wanted = min(k * len(self.signs), operator.size)
    self.scale = 0.0
    self.num_found = 0
    self.locked = basis_lib.Basis(self.layout)
    self.locked_values = np.zeros(0)
    self.locked_bounds = np.zeros(0)
    self.decomposition = None
    self._first_matvec = operator.num_matvecs
    # The last products measure the residuals of the wanted pairs.
    self._last_matvec = operator.num_matvecs + max_num_matvecs - self.num_wanted
    if max_num_matvecs <= self.num_wanted:
      raise ValueError(
        f'max_num_matvecs={max_num_matvecs}: {self.num_wanted} pairs need more than '
        f'{self.num_wanted} products'
      )

  def limit_basis(self, max_gib: float, max_size: int) -> None:
    """Sets the basis size at which to restart, from the memory allowed."""
    # Room for found pairs, a basis, the half of it that a restart keeps, unfinished
    # blocks, and work vectors.
    overhead = 2 * self.num_wanted + 3 * self.layout.block + 6
    smallest = 2 * self.num_wanted + 6
    rows = int(max_gib * 2**30 / self.layout.vector_bytes) - overhead
    if rows * 2 // 3 < smallest:
      need = (smallest * 3 / 2 + 1 + overhead) * self.layout.vector_bytes / 2**30
      raise ValueError(
        f'max_basis_gib={max_gib:g}: {self.num_wanted} eigenpairs of size '
        f'{self.operator.size:,} need at least {need:.2g} GiB; allow that, or ask '
        'for fewer pairs'
      )
    if max_size < smallest:
      raise ValueError(
        f'max_basis_size={max_size}: {self.num_wanted} eigenpairs need at least '
        f'{smallest}'
      )
    self._capacity = min(rows * 2 // 3, max_size)

  @property
  def complete(self) -> bool:
    """Every eigenvalue of the operator was found."""
    return self.locked.size >= self.operator.size

  def run(self, start: jax.Array) -> bool:
    """Searches the complement of the found pairs; False if products ran out."""
    self.decomposition = lanczos.Decomposition(
      self.operator,
      start,
      self.locked,
      self.scale,
      check_symmetry=self.check_symmetry,
    )
    thresholds = [self._threshold(sign) for sign in self.signs]
    while True:
      if self.operator.num_matvecs >= self._last_matvec:
        return False
      if self.decomposition.size >= self._capacity:
        self._restart()
      self.decomposition.step()
      size = self.decomposition.size
      if not self.decomposition.exhausted and size % max(1, size // 30):
        continue
      values, vectors, bounds = self.decomposition.ritz()
      self.scale = max(self.scale, float(np.abs(values).max()))
      self._report(values, bounds)
      ends = [
        self._examine(sign, threshold, values, bounds)
        for sign, threshold in zip(self.signs, thresholds, strict=True)
      ]
      if all(done for done, _ in ends):
        self.decomposition.require_symmetry()
        self.num_found += len(set().union(*(pairs for _, pairs in ends)))
        self._lock(values, vectors, bounds)
        return True

  def finish(self, verified: bool) -> Eigenpairs:
    """The best wanted pairs, their residuals measured."""
    values, bounds = self.locked_values, self.locked_bounds
    vectors = self.locked
    if self.decomposition is not None:
      self.decomposition.require_symmetry()
      ritz_values, coefficients, ritz_bounds = self.decomposition.ritz()
      chosen = self._wanted(np.concatenate([values, ritz_values]))
      old = chosen[chosen < len(values)]
      new = chosen[chosen >= len(values)] - len(values)
      vectors = self.locked.combine(np.eye(len(values))[:, old])
      vectors.extend(self.decomposition.basis.combine(coefficients[:, new]))
      values = np.concatenate([values[old], ritz_values[new]])
      bounds = np.concatenate([bounds[old], ritz_bounds[new]])
    else:
      chosen = self._wanted(values)
      vectors = vectors.combine(np.eye(len(values))[:, chosen])
      values, bounds = values[chosen], bounds[chosen]
    order = np.argsort(-values)
    return self._measure(vectors, order, bounds, verified)

  def _measure(self, vectors, order, bounds, verified):
    """Rayleigh-Ritz on the chosen vectors with true products."""
    images = basis_lib.Basis(self.layout)
    for index in range(vectors.size):
      tree = self.layout.unpack(vectors.vector(index))
      images.append(self.layout.pack(self.operator.matvec(tree)))
    gram = np.stack([vectors.coefficients(vectors.vector(i)) for i in order])[:, order]
    inner = np.stack([vectors.coefficients(images.vector(i)) for i in order])[:, order]
    values, rotation = _generalised_eigh((inner + inner.T) / 2, (gram + gram.T) / 2)
    back = np.zeros_like(rotation)
    back[order] = rotation
    rotated, rotated_images = vectors.combine(back), images.combine(back)
    residuals, trees = [], []
    for index, value in enumerate(values):
      vector = rotated.vector(index)
      rest = basis_lib.add_scaled(rotated_images.vector(index), -value, vector)
      residuals.append(basis_lib.norm(rest))
      trees.append(self.layout.unpack(vector))
    self.scale = max(self.scale, float(np.abs(values).max()))
    residuals = np.array(residuals)
    converged = residuals <= self.tol * self.scale
    return Eigenpairs(
      eigenvalues=values,
      eigenvectors=tuple(trees),
      residuals=residuals,
      bounds=bounds[order],
      converged=converged,
      scale=self.scale,
      tol=self.tol,
      num_matvecs=self.operator.num_matvecs - self._first_matvec,
      verified=bool(verified and converged.all()),
    )

  def _threshold(self, sign: int) -> float:
    """What a further eigenvalue at this end must exceed to be wanted."""
    if len(self.locked_values) < self.num_wanted:
      return -np.inf
    return float(np.sort(sign * self.locked_values)[-self.k])

  def _examine(self, sign, threshold, values, bounds) -> tuple[bool, set[int]]:
    """Whether one end is settled, and the indices of the wanted pairs there."""
    order = np.argsort(-sign * values)
    target = self._target
    wanted = [i for i in order if sign * values[i] > threshold + 2 * target][: self.k]
    done = all(bounds[i] <= target for i in wanted)
    if threshold == -np.inf:
      done = done and (len(wanted) == self.k or self.decomposition.exhausted)
    elif not wanted:
      done = self._rules_out(sign, threshold + 2 * target, bounds[order[0]])
    return done, set(wanted)

  def _rules_out(self, sign: int, edge: float, bound: float) -> bool:
    """Whether the complement has no eigenvalue beyond the edge.

    Either its own extreme pair has converged, or an eigenvector beyond the edge would
    show, unless the random start vector had less of it than in one of 1,000 draws.
    """
    weight = _MISS_PROBABILITY * np.sqrt(np.pi / 2 / self.operator.size)
    growth = self.decomposition.log_amplification(sign * edge)
    return bound <= self._target or growth >= -np.log(weight)

  @property
  def _target(self) -> float:
    # Half, so that the measured residual passes too.
    return 0.5 * self.tol * self.scale

  def _wanted(self, values: np.ndarray) -> np.ndarray:
    """Indices of the wanted among some values, ascending."""
    order = np.argsort(values)
    chosen = {i for sign in self.signs for i in order[::-sign][: self.k].tolist()}
    return np.array(sorted(chosen), int)

  def _lock(self, values, vectors, bounds) -> None:
    """Sets aside every converged pair; later rounds stay orthogonal to them."""
    fixed = np.flatnonzero(bounds <= self._target)
    new = self.decomposition.basis.combine(vectors[:, fixed])
    self.decomposition = None
    self.locked.extend(new)
    self.locked_values = np.concatenate([self.locked_values, values[fixed]])
    self.locked_bounds = np.concatenate([self.locked_bounds, bounds[fixed]])

  def _restart(self) -> None:
    values, vectors, _ = self.decomposition.ritz()
    keep = self._capacity // 2
    if len(self.signs) == 2:
      top = keep // 2
      indices = np.r_[: keep - top, len(values) - top : len(values)]
    else:
      indices = np.argsort(-self.signs[0] * values)[:keep]
    self.decomposition.restart(values[indices], vectors[:, indices])

  def _report(self, values: np.ndarray, bounds: np.ndarray) -> None:
    if self.progress is None:
      return
    values = np.concatenate([self.locked_values, values])
    bounds = np.concatenate([self.locked_bounds, bounds])
    chosen = self._wanted(values)
    enough = len(chosen) >= self.num_wanted
    residual = bounds[chosen].max() / (self.scale or 1.0) if enough else np.inf
    self.progress(
      Progress(
        num_matvecs=self.operator.num_matvecs - self._first_matvec,
        residual=float(residual),
        num_converged=int((bounds[chosen] <= self._target).sum()),
        num_wanted=self.num_wanted,
        eigenvalues=np.sort(values[chosen])[::-1],
      )
    )


def _start_vector(layout: basis_lib.Layout, start: Any, key: jax.Array) -> jax.Array:
  if start is None:
    return layout.normal(key)
  if isinstance(start, Eigenpairs):
    total = layout.pack(start.eigenvectors[0])
    for vector in start.eigenvectors[1:]:
      total = basis_lib.add_scaled(total, 1.0, layout.pack(vector))
    return total
  return layout.pack(start)


def _generalised_eigh(
  matrix: np.ndarray, gram: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Solves M s = theta G s; theta descending, columns with s^T G s = 1."""
  lower = np.linalg.cholesky(gram)
  inverse = np.linalg.inv(lower)
  values, vectors = np.linalg.eigh(inverse @ matrix @ inverse.T)
  return values[::-1], (inverse.T @ vectors)[:, ::-1]
