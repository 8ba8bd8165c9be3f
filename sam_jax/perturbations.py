r"""Ascent steps: optax transformations from a gradient to a perturbation.

A perturbation maps the gradient :math:`g` at :math:`w` to :math:`\hat\epsilon` at unit
radius. The method that uses it (`sam_jax.sam`, ...) multiplies the result by its
``rho``, so that schedules, injection and sweeps of rho live in one place.

Each one is an ordinary `optax.GradientTransformationExtraArgs` and composes as such:

* ``optax.chain(global_norm(), optax.scale(2.0))`` doubles the radius;
* ``optax.selective_transform(global_norm(), freeze_mask=...)`` perturbs some leaves
  only, and takes the norm over those (never `optax.masked`: it lets the raw gradient
  of the other leaves through as their perturbation);
* ``optax.multi_transform({'a': global_norm(), 'b': adaptive()}, labels)`` gives each
  group its own rule and its own norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_jax import layouts

WeightsMask = bool | layouts.Layout | Any | Callable[[optax.Params], Any] | None


def global_norm() -> optax.GradientTransformationExtraArgs:
  r"""Scales the gradient to unit norm over the whole tree, as SAM does.

  .. math:: \hat\epsilon = g / \|g\|_2

  A zero gradient gives a zero perturbation.

  Returns:
    A stateless transformation; norms are taken in at least float32.

  >>> import jax.numpy as jnp, sam_jax
  >>> p = sam_jax.perturbations.global_norm()
  >>> eps, _ = p.update({'w': jnp.array([3.0, 4.0])}, p.init(None))
  >>> [round(float(x), 6) for x in eps['w']]
  [0.6, 0.8]

  References:
    Foret et al., Sharpness-Aware Minimization for Efficiently Improving
    Generalization, 2021, eq. 2 (arXiv:2010.01412).
  """

  def update_fn(updates, params=None, **extra_args):
    del params, extra_args
    return on_sphere(updates)

  return _stateless(update_fn)


def adaptive(
  eta: float = 0.01, *, weights: WeightsMask = None
) -> optax.GradientTransformationExtraArgs:
  r"""Scales the gradient by the size of each weight, as ASAM does.

  .. math:: \hat\epsilon = T^2 g / \|T g\|_2, \qquad
            T = |w| + \eta \text{ on weights}, \; 1 \text{ elsewhere}

  so that :math:`\|T^{-1} \hat\epsilon\| = 1`. ``adaptive()`` is the rule of the ASAM
  paper. ``adaptive(eta=0.0, weights=True)`` is the every-parameter rule
  :math:`w^2 g / \| |w| g \|`, the one that is invariant to rescaling of layers.

  Args:
    eta: added to :math:`|w|`, in the units of the parameters; at least 0.
    weights: which leaves are weights: None for those that `layouts.automatic` takes
      for weights, a `layouts.Layout` for those of another layout, True for all, a tree
      of bools like the parameters, or a function from the parameters to such a tree.
      The paper sets weights apart from biases. The authors' code goes by the name
      ``weight``, so that the scales of normalization layers are weights too, which they
      are not with None; a tree or a function gives that rule.

  Returns:
    A stateless transformation; its ``update`` requires ``params``.

  Raises:
    ValueError: ``eta`` is negative, ``update`` is called without ``params``, or a rule
      of the layout has no answer for a leaf.

  >>> import jax.numpy as jnp, sam_jax
  >>> p = sam_jax.perturbations.adaptive(eta=0.0, weights=True)
  >>> w = {'w': jnp.array([1.0, 2.0])}
  >>> eps, _ = p.update({'w': jnp.array([2.0, 1.0])}, p.init(w), w)
  >>> [round(float(x), 4) for x in eps['w']]
  [0.7071, 1.4142]

  References:
    Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks, 2021, eq. 4 and section 3.1 (arXiv:2102.11600).
  """
  if not isinstance(eta, jax.Array) and not 0 <= eta < math.inf:
    raise ValueError(
      f'eta must be at least 0 and finite, got {eta}: eta is added to |w|.'
    )

  def update_fn(updates, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'adaptive perturbations scale with the parameters: call '
        'update(grads, state, params).'
      )
    is_weight = weights_mask(weights, params)
    operator = jax.tree.map(
      lambda w, yes: jnp.abs(w) + eta if yes else jnp.ones_like(w), params, is_weight
    )
    _, scale = squares(updates)
    product = jax.tree.map(lambda t, g: t * scaled(g, scale), operator, updates)
    total, scale = squares(product)
    factor = safe_reciprocal(jnp.sqrt(total))
    return jax.tree.map(
      lambda t, x: (factor * (t * scaled(x, scale))).astype(x.dtype), operator, product
    )

  return _stateless(update_fn)


def layerwise() -> optax.GradientTransformationExtraArgs:
  r"""Moves every leaf by the same share of its own norm, as Look-LayerSAM does.

  .. math:: \hat\epsilon_l = \frac{\|w_l\|_2}{\|g_l\|_2} \, g_l

  for every leaf l, a weight matrix or a bias, with the trust ratio by which LARS and
  LAMB scale an update. :math:`\|\hat\epsilon_l\| = \|w_l\|`, so that the ``rho`` of
  the method is the length of the step relative to the leaf: 0.01 moves each leaf by one
  hundredth of its norm. ``optax.chain(layerwise(), global_norm())`` has unit norm over
  the whole tree and shares it out in proportion to :math:`\|w_l\|`.

  A leaf whose gradient is zero is not perturbed, nor is a leaf of zeros: its trust
  ratio is 0, where that of LAMB would be 1. Bounds on the ratio, which some codes have,
  are left out.

  Returns:
    A stateless transformation; its ``update`` requires ``params``. Norms are taken in
    at least float32 and neither overflow nor underflow.

  Raises:
    ValueError: ``update`` is called without ``params``.

  >>> import jax.numpy as jnp, sam_jax
  >>> p = sam_jax.perturbations.layerwise()
  >>> w = {'a': jnp.array([0.0, 10.0]), 'b': jnp.array([2.0])}
  >>> g = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([-0.1])}
  >>> eps, _ = p.update(g, p.init(w), w)
  >>> [[round(float(x), 4) for x in eps[name]] for name in 'ab']
  [[6.0, 8.0], [-2.0]]

  References:
    Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, 2022, on
    Look-LayerSAM (arXiv:2203.02714).
  """

  def update_fn(updates, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'layerwise perturbations scale with the parameters: call '
        'update(grads, state, params).'
      )
    # Of unit norm first: |w| times a large entry of g would overflow.
    return jax.tree.map(lambda g, w: scale_tree(on_sphere(g), norm(w)), updates, params)

  return _stateless(update_fn)


def unnormalized() -> optax.GradientTransformationExtraArgs:
  r"""Leaves the gradient as it is, as USAM does: :math:`\hat\epsilon = g`.

  Returns:
    A stateless transformation.

  >>> import jax.numpy as jnp, sam_jax
  >>> p = sam_jax.perturbations.unnormalized()
  >>> eps, _ = p.update({'w': jnp.array([3.0, 4.0])}, p.init(None))
  >>> eps['w'].tolist()
  [3.0, 4.0]

  References:
    Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization,
    2022 (arXiv:2206.06232).
  """

  def update_fn(updates, params=None, **extra_args):
    del params, extra_args
    return updates

  return _stateless(update_fn)


def weights_mask(weights: WeightsMask, params: optax.Params) -> Any:
  """Answers, leaf by leaf, which parameters are weights (see `adaptive`)."""
  if weights is None:
    return layouts.automatic().weights(params)
  if isinstance(weights, bool):
    return jax.tree.map(lambda _: weights, params)
  return weights(params) if callable(weights) else weights


def norm(tree: optax.Updates) -> jax.Array:
  """The l2 norm over a whole tree, summed in at least float32 (bf16 would round).

  Squares neither overflow nor underflow: see `squares`.
  """
  total, scale = squares(tree)
  return jnp.sqrt(total) / scale


def on_sphere(tree: optax.Updates, radius: jax.Array | float = 1.0) -> optax.Updates:
  """``radius * tree / |tree|``, each leaf in its own dtype; zero for a zero tree."""
  total, scale = squares(tree)
  factor = radius * safe_reciprocal(jnp.sqrt(total))
  return jax.tree.map(
    lambda x, like: scaled(factor * x, scale).astype(like.dtype),
    at_least_float32(tree),
    tree,
  )


def squares(tree: optax.Updates) -> tuple[jax.Array, jax.Array]:
  r"""The squared norm of a multiple of a tree that neither overflows nor underflows.

  .. math:: (\|2^k t\|^2, \; 2^k), \qquad k = 0 \text{ for entries of ordinary size}

  In float32 the norm is ordinary between 2^-32 and 2^48. A power of two costs no digit,
  so that results for ordinary entries are those without it, bit for bit.

  Args:
    tree: floating-point leaves; those narrower than float32 are widened to it.

  Returns:
    The squared norm and the scale.
  """
  tree = at_least_float32(tree)
  dtype = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(tree)))
  most = jnp.finfo(dtype).maxexp
  plain = optax.tree.norm(jax.lax.stop_gradient(tree), squared=True)
  # Squares of the scale are finite: of constants, XLA takes them apart.
  scale = jnp.where(plain < 2.0 ** (-most // 2), 2.0 ** (most // 2 - 1), 1.0)
  scale = jnp.where(plain > 2.0 ** (most * 3 // 4), 2.0 ** (-most * 5 // 8), scale)
  scale = scale.astype(dtype)
  total = optax.tree.norm(jax.tree.map(lambda x: scale * x, tree), squared=True)
  return jnp.asarray(total, dtype), scale


def scaled(array: jax.Array, scale: jax.Array) -> jax.Array:
  """``scale * array`` of a scale of `squares`, bit for bit.

  Written as a division, because the compiler would store a product that `squares`
  has summed already, for the second use: a copy of the parameters.
  """
  return array / (1 / scale)


def safe_reciprocal(value: jax.Array) -> jax.Array:
  """``1 / value``, and 0 where the value is 0: no division by zero in either branch."""
  zero = value == 0
  return jnp.where(zero, 0, 1 / jnp.where(zero, 1, value))


def where_finite(tree: optax.Updates, otherwise: optax.Updates) -> optax.Updates:
  """``tree`` if all of it is finite, else all of ``otherwise``, of the same dtypes."""
  finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)
  yes = jax.tree.reduce(jnp.logical_and, finite, True)
  return jax.tree.map(lambda x, y: jnp.where(yes, x, y), tree, otherwise)


def scale_tree(tree: optax.Updates, factor: jax.Array) -> optax.Updates:
  """``factor * tree``, each leaf in its own dtype."""
  return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def at_least_float32(tree: Any) -> Any:
  """Casts half-precision leaves to float32; works on `jax.ShapeDtypeStruct` too.

  Python numbers become arrays.
  """

  def cast(x):
    if not hasattr(x, 'dtype'):
      return jnp.asarray(x, jnp.result_type(x))
    if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits >= 32:
      return x
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return x.astype(jnp.float32)

  return jax.tree.map(cast, tree)


def _stateless(update_fn: Callable) -> optax.GradientTransformationExtraArgs:
  """A transformation without state from ``update(updates, params, **extra_args)``."""

  def update(updates, state, params=None, **extra_args):
    return update_fn(updates, params, **extra_args), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
