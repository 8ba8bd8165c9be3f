"""Operators made of another: preconditioned, or restricted to some parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_jax.curvature import stacks
from sam_jax.curvature.operators import Operator, Params

_NUM_NAMED = 6  # so many paths an error names


def preconditioned(inner: Operator, scale: Params) -> Operator:
  r"""The operator between two copies of a diagonal matrix, :math:`D A D`.

  With :math:`D = |w|` and the Hessian this is the curvature that ASAM measures: it
  does not change when a ReLU network's layers are rescaled without changing its
  function. With :math:`D = P^{-1/2}` it is the curvature an adaptive optimizer with
  preconditioner :math:`P` sees; `adam_preconditioner` gives Adam's.

  Args:
    inner: the operator :math:`A`.
    scale: the diagonal of :math:`D`, a pytree like a vector of ``inner``.

  Returns:
    The operator; a product with it is one product with ``inner``.

  >>> import jax.numpy as jnp
  >>> from sam_jax import curvature
  >>> op = curvature.operator(lambda v: 2 * v, jnp.zeros(2))
  >>> preconditioned(op, jnp.array([1., 3.])).matvec(jnp.ones(2)).tolist()
  [2.0, 18.0]

  References:
    Kwon et al., ASAM, arXiv 2102.11600.
  """
  scale = jax.tree.map(
    lambda s, like: jnp.asarray(s, like.dtype), scale, inner.structure
  )
  return Operator(
    lambda vector: _multiply(scale, inner.matvec(_multiply(scale, vector))),
    inner.structure,
  )


def adam_preconditioner(
  opt_state: Any, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Params:
  r"""The scale :math:`D = P^{-1/2}` under which `preconditioned` is what Adam sees.

  .. math:: P = (1 - \beta_1^t)\, \mathrm{diag}(\sqrt{\hat v} + \epsilon), \qquad
            \hat v = v / (1 - \beta_2^t)

  The largest eigenvalue of :math:`P^{-1/2} H P^{-1/2}` is that of :math:`P^{-1} H`,
  which full-batch Adam holds at 38 over the learning rate with the default betas.

  Args:
    opt_state: the state of a chain that holds one `optax.ScaleByAdamState`: that of
      adam, adamw, nadam, lamb and the like.
    b1: Adam's decay rate of the first moments.
    b2: Adam's decay rate of the second moments.
    eps: Adam's ``eps``.

  Returns:
    A pytree like the parameters, of at least float32.

  Raises:
    ValueError: the state holds none or several such states, or has seen no update.

  >>> import jax.numpy as jnp, optax
  >>> tx = optax.adam(0.1)
  >>> _, state = tx.update(jnp.array([4., 1.]), tx.init(jnp.zeros(2)))
  >>> [round(x, 3) for x in adam_preconditioner(state).tolist()]  # P = 0.1 |g|
  [1.581, 3.162]

  References:
    Cohen et al., Adaptive gradient methods at the edge of stability, arXiv 2207.14484.
  """
  is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
  found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
  if len(found) != 1:
    raise ValueError(
      f'opt_state holds {len(found)} states of optax.scale_by_adam: give that of a '
      'chain with exactly one, such as optax.adam'
    )
  count = int(found[0].count)
  if count < 1:
    raise ValueError('opt_state has seen no update: its second moments are still 0')

  def inverse_root(nu):
    nu = jnp.asarray(nu, jnp.promote_types(jnp.result_type(nu), jnp.float32))
    return ((1 - b1**count) * (jnp.sqrt(nu / (1 - b2**count)) + eps)) ** -0.5

  return jax.tree.map(inverse_root, found[0].nu)


def restricted(inner: Operator, keep: str | Callable[[str], bool]) -> Operator:
  r"""The principal submatrix of an operator on some of its parameters.

  .. math:: S^T A S, \qquad S^T S = I

  where :math:`S` fills the parameters left out with 0. A vector is a pytree like one of
  ``inner`` with None where a leaf is left out, which JAX takes for no leaf.

  Args:
    inner: the operator :math:`A`.
    keep: which leaves stay: a regular expression that is searched for in the path of
      each, or a function of the path. A path is 'Dense_0/kernel', see `paths`.

  Returns:
    The operator; a product with it is one product with ``inner``.

  Raises:
    ValueError: no leaf stays, or the regular expression is none.

  >>> import jax.numpy as jnp
  >>> from sam_jax import curvature
  >>> op = curvature.operator(lambda v: {'a': v['a'] + v['b'], 'b': v['a'] - v['b']},
  ...                         {'a': jnp.zeros(2), 'b': jnp.zeros(2)})
  >>> block = restricted(op, '^a$')
  >>> block.size, block.matvec({'a': jnp.ones(2), 'b': None})['a'].tolist()
  (2, [1.0, 1.0])
  """
  names = paths(inner.structure)
  stays = _predicate(keep)
  kept = [bool(stays(name)) for name in names]
  if not any(kept):
    some = ', '.join(repr(name) for name in names[:_NUM_NAMED])
    more = f' and {len(names) - _NUM_NAMED} more' if len(names) > _NUM_NAMED else ''
    raise ValueError(f'keep={keep!r} matches no parameters: there are {some}{more}')
  leaves, treedef = jax.tree.flatten(inner.structure)
  # A leaf left out is None where it is kept, and the zeros that stand for it else.
  zeros = [
    None if stay else stacks.zero(leaf) for stay, leaf in zip(kept, leaves, strict=True)
  ]

  def select(tree):
    pairs = zip(kept, jax.tree.leaves(tree), strict=True)
    return treedef.unflatten([leaf if stay else None for stay, leaf in pairs])

  def product(vector):
    given = iter(jax.tree.leaves(vector))
    filled = [next(given) if zero is None else zero for zero in zeros]
    return select(inner.matvec(treedef.unflatten(filled)))

  return Operator(product, select(inner.structure))


def paths(tree: Any) -> list[str]:
  """The paths of the leaves of a pytree, in the order of the leaves.

  >>> paths({'Dense_0': {'kernel': 1., 'bias': 2.}, 'scales': [3.]})
  ['Dense_0/bias', 'Dense_0/kernel', 'scales/0']
  """
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree.leaves_with_path(tree)
  ]


def _predicate(keep: str | Callable[[str], bool]) -> Callable[[str], Any]:
  if callable(keep):
    return keep
  try:
    return re.compile(keep).search
  except re.error as error:
    raise ValueError(f'keep={keep!r} is no regular expression: {error}') from error


@jax.jit
def _multiply(scale, vector):
  return jax.tree.map(jnp.multiply, scale, vector)
