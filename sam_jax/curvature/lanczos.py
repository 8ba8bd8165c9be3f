"""Lanczos decompositions that can be restarted: A Q = Q T + (next vector) c^T."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.curvature import basis as basis_lib
from sam_jax.curvature import operators

_BREAKDOWN = 20.0  # residuals below this many eps * |A| are rounding
# Asymmetry relative to |A| that is no rounding, in types from float32 on. Products in
# bfloat16 inside a network reach 6e-4, a symmetric matrix plus 1 % of another 3e-3.
_ASYMMETRY = 4e-3
_SETTLED = 8  # steps after which |A| is known well enough to judge


class Decomposition:
  """A Krylov decomposition of an operator, grown one product at a time.

  The basis vectors are orthonormal, and orthogonal to a second basis, `locked`, of
  vectors that the decomposition leaves out. `scale` is a known lower bound of |A|, by
  which a breakdown is told from rounding. The projected matrix is kept in float64 on
  the host. It is tridiagonal until the first restart.

  Every new product is multiplied by all vectors of the basis, and those products are
  known beforehand if the operator is symmetric. So its symmetry is watched at no cost.

  Attributes:
    operator: the operator A.
    basis: Q, the vectors multiplied so far.
    projected: T, float64 (size, size).
    coupling: c, float64 (size,): A Q - Q T is the next vector times c^T.
    exhausted: A maps the span of the basis into itself: every Ritz pair is exact.
    asymmetry: the largest ``|p^T A q - q^T A p|`` of vectors p, q of the basis.
  """

  def __init__(
    self,
    operator: operators.Operator,
    start: jax.Array,
    locked: basis_lib.Basis | None = None,
    scale: float = 0.0,
    *,
    check_symmetry: bool = True,
  ):
    self.operator = operator
    self.layout = basis_lib.Layout.of(operator.structure)
    self.locked = locked or basis_lib.Basis(self.layout)
    self.basis = basis_lib.Basis(self.layout)
    self.projected = np.zeros((0, 0))
    self.coupling = np.zeros(0)
    self.exhausted = False
    self.asymmetry = 0.0
    self._check_symmetry = check_symmetry
    self._norm = scale
    self._restarted = False
    self._previous: jax.Array | None = None
    self._next = basis_lib.orthonormal(start, self.locked, self.basis)

  @property
  def size(self) -> int:
    return self.basis.size

  def step(self) -> None:
    """Takes one product and adds one vector to the basis."""
    size = self.size
    vector = self._next
    self.basis.append(vector)
    image = self.layout.pack(self.operator.matvec(self.layout.unpack(vector)))
    # The recurrence first: what it leaves is almost orthogonal to the basis, and then
    # one pass over all of it is enough.
    alpha = basis_lib.dot(vector, image)
    rest = basis_lib.add_scaled(image, -alpha, vector)
    expected = self.coupling
    if self._previous is not None:
      expected = np.zeros(size)  # Here the coupling is to the previous vector alone.
      rest = basis_lib.add_scaled(rest, -self.coupling[-1], self._previous)
    self._previous = vector
    rest, (_, inside), beta = basis_lib.orthogonalise(rest, self.locked, self.basis)
    inside[size] += alpha
    if not (np.isfinite(beta) and np.isfinite(inside).all()):
      raise basis_lib.NonFiniteError(
        'a product with the operator is not finite: the parameters, the data or the '
        'loss hold NaN or infinity'
      )
    difference = np.abs(inside[:size] - expected).max(initial=0.0)
    self.asymmetry = max(self.asymmetry, float(difference))
    projected = np.zeros((size + 1, size + 1))
    projected[:size, :size] = self.projected
    projected[:size, size] = projected[size, :size] = self.coupling
    projected[size, size] = inside[size]
    self.projected = projected
    self.coupling = np.zeros(size + 1)
    self._norm = max(self._norm, beta, float(np.abs(inside).max()))
    rounding = _BREAKDOWN * np.finfo(self.layout.dtype).eps * self._norm
    if beta <= rounding or self._full:
      self.exhausted = True
    else:
      self.coupling[size] = beta
      # The passes leave errors of eps * |rest|, unless all but rounding was taken out.
      small = beta <= np.sqrt(np.finfo(self.layout.dtype).eps) * self._norm
      self._next = basis_lib.rescale(rest, 1 / beta)
      if small:
        self._next = basis_lib.orthonormal(self._next, self.locked, self.basis)
    if self.size >= _SETTLED:
      self.require_symmetry()

  def require_symmetry(self) -> None:
    """Raises an AsymmetryError if the products so far are not symmetric.

    Called when the decomposition is used, and after some steps by itself.
    """
    eps = max(float(jnp.finfo(dtype).eps) for dtype in self.layout.dtypes)
    allowed = max(_ASYMMETRY, 10 * math.sqrt(eps)) * self._norm
    if self._check_symmetry and self.asymmetry > allowed:
      raise basis_lib.AsymmetryError(
        'the operator is not symmetric: <u, A v> and <A u, v> differ by '
        f'{self.asymmetry / self._norm:.1g} times its norm; give one that is symmetric '
        '(for a matrix A, 0.5 * (A v + A^T v)) and sees the same data at each product, '
        'compute in float64 where it is lost in rounding, or pass '
        'check_symmetry=False to go on all the same'
      )

  def grow(self, num_matvecs: int) -> None:
    """Takes steps up to a number of basis vectors, fewer if exhausted before."""
    while self.size < num_matvecs and not self.exhausted:
      self.step()

  def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues of T ascending, its eigenvectors, and the residual bounds.

    The residual of the pair (theta, Q s) is ``|c . s|``, and some eigenvalue of A lies
    within it of theta.
    """
    values, vectors = np.linalg.eigh(self.projected)
    return values, vectors, np.abs(self.coupling @ vectors)

  def log_amplification(self, x: float) -> float:
    r"""By how much an eigenvector at x would have grown since the start vector.

    An eigenvector u of A at x has the weight :math:`\pi(x)\, u^T q_0` in the next
    vector, where :math:`\pi(x) = \prod_i (x - \theta_i) / \prod_i \beta_i`. No weight
    exceeds 1, so a large value says that there is no such eigenvector, or that the
    random start vector had hardly any part of it.

    Returns:
      The logarithm of the factor; minus infinity after a restart.
    """
    if self._restarted:
      return -np.inf
    if self.exhausted:
      return np.inf
    betas = np.append(np.diag(self.projected, 1), self.coupling[-1])
    distances = np.abs(x - np.linalg.eigvalsh(self.projected))
    with np.errstate(divide='ignore'):
      return float(np.log(distances).sum() - np.log(betas).sum())

  def restart(self, values: np.ndarray, vectors: np.ndarray) -> None:
    """Keeps the span of some Ritz vectors and the next vector (a thick restart)."""
    self.basis = self.basis.combine(vectors)
    self.projected = np.diag(values)
    self.coupling = self.coupling @ vectors
    self._restarted = True
    self._previous = None

  @property
  def _full(self) -> bool:
    return self.size + self.locked.size >= self.operator.size
