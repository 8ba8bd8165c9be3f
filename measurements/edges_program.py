"""Sharpness, gradients and alignments of a network, as one compiled function."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from sam_jax import curvature, edges
from training import optimizers
from training import problem as problem_lib
from training.config import Config
from training.problem import Batch, Problem
from training.step import TrainState

# Eigenpairs that are wanted, and further vectors of the block that a search keeps: near
# the edge of SAM eigenvalues crowd and overtake each other.
_NUM_PAIRS, _NUM_GUARDS = 1, 3
_MAX_NUM_MATVECS = 100
# The algebra of a search costs as much as this is large, and restarts cost products.
_MAX_BASIS_SIZE = 12


ADAMS = ('adam', 'adamw')


class Found(NamedTuple):
  """What one call finds, all scalars.

  Attributes:
    loss: over the examples, in evaluation mode.
    gradient_norm: of the clean gradient.
    rho: the method's radius in the step that comes; NaN without a method.
    learning_rate: in the step that comes.
    eigenvalue: that of the largest absolute value, with its sign.
    residual: its measured ``|H v - lambda v|``.
    converged: whether the residual is within the tolerance.
    edge: of the base optimizer, for Adam that of its preconditioned Hessian.
    sam_edge: of SAM, or unnormalised SAM, over it; NaN with others, over Adam, and
      where not every step perturbs.
    gradient_alignment: |cos| of the clean gradient and the top eigenvector.
    update_alignment: the same of what the method hands to its base optimizer.
    scaled: eigenvalue and residual of Adam's preconditioned Hessian; None with other
      base optimizers.
    num_matvecs: products taken.
  """

  loss: jax.Array
  gradient_norm: jax.Array
  rho: jax.Array
  learning_rate: jax.Array
  eigenvalue: jax.Array
  residual: jax.Array
  converged: jax.Array
  edge: jax.Array
  sam_edge: jax.Array
  gradient_alignment: jax.Array
  update_alignment: jax.Array
  scaled: tuple[jax.Array, jax.Array] | None
  num_matvecs: jax.Array


class Program:
  """The function, compiled once for each shape of its examples.

  Attributes:
    size_of_block: vectors from which a search starts, or as many as parameters.
  """

  size_of_block = _NUM_PAIRS + _NUM_GUARDS

  def __init__(
    self, problem: Problem, config: Config, steps_per_epoch: int, tol: float
  ):
    """Takes the run whose networks are measured, and the residual that is wanted."""
    self._problem, self._config = problem, config
    self._tol, self._seed = tol, config.seed
    self._tx, self._state_of = optimizers.descent(config, steps_per_epoch)
    self._rate = optimizers.learning_rate(config, steps_per_epoch)
    self._product = curvature.hessian_product(self._loss)
    self._call = jax.jit(self._find)

  def cold(self, params: Any) -> jax.Array:
    """The block of a first search: random vectors, the same at every start.

    Args:
      params: arrays, or their shapes.

    Returns:
      (vectors, number of parameters).
    """
    leaves = jax.tree.leaves(params)
    size = sum(leaf.size for leaf in leaves)
    shape = min(self.size_of_block, size), size  # As a search leaves it.
    dtype = _wide(jnp.result_type(*(leaf.dtype for leaf in leaves)))
    return jax.random.normal(jax.random.key(self._seed), shape, dtype)

  def __call__(
    self,
    state: TrainState,
    batches: Batch,
    blocks: tuple[jax.Array, ...],
    scale: Any,
  ) -> tuple[Found, tuple[jax.Array, ...]]:
    """Measures a network.

    Args:
      state: of one replica.
      batches: a batch, or a stack of batches with a further leading axis.
      blocks: what the search before left, or of `cold`; a second one with a scale.
      scale: the diagonal of Adam's preconditioner to the power -1/2; None with other
        base optimizers.

    Returns:
      What was found, and the blocks of the next search.
    """
    return self._call(state, batches, blocks, scale)

  def _loss(self, params: Any, batch: Batch) -> jax.Array:
    rest = dict(batch)
    stats = rest.pop('batch_stats')
    return problem_lib.loss(self._problem, params, stats, rest)[0]

  def _find(self, state, batches, blocks, scale):
    params = curvature_params(state.params)
    stacked = batches['weights'].ndim > 1
    stats = state.batch_stats
    if stacked:  # Statistics are the same for every batch of the stack.
      count = batches['weights'].shape[0]
      stats = jax.tree.map(
        lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), stats
      )
    batches = {**batches, 'batch_stats': stats}
    with jax.default_matmul_precision('highest'):
      value_and_grad = functools.partial(self._value_and_grad, batches, stacked)
      value, gradient = value_and_grad(params)
      descent, rho = self._descent(state, params, value, gradient, value_and_grad)
      if stacked:
        product = curvature.mean_product(self._product, weight=problem_lib.num_examples)
        matvec = lambda v: product(params, batches, v)
      else:
        matvec = self._product.linearize(params, batches)
    # One leaf instead of many: a third of the time to compile, and half of that of the
    # search's own algebra.
    flat, unflatten = ravel_pytree(params)
    flatten = lambda tree: ravel_pytree(tree)[0]
    multiply = lambda v: flatten(matvec(unflatten(v)))
    keys = [jax.random.fold_in(jax.random.key(i), state.step) for i in range(2)]
    pairs = self._search(multiply, flat, blocks[0], keys[0])
    vector = pairs.eigenvectors[0]
    kept, products, scaled = [pairs.block], pairs.num_matvecs, None
    if scale is not None:
      by = flatten(scale)
      seen = lambda v: by * multiply(by * v)
      others = self._search(seen, flat, blocks[1], keys[1])
      kept.append(others.block)
      products += others.num_matvecs
      scaled = others.eigenvalues[0], others.residuals[0]
    norm = optax.tree.norm(gradient)
    rate = jnp.asarray(self._rate(state.step), value.dtype)
    edge, sam_edge = edges_of(self._config, norm, rate, rho)
    found = Found(
      loss=value,
      gradient_norm=norm,
      rho=rho,
      learning_rate=rate,
      eigenvalue=pairs.eigenvalues[0],
      residual=pairs.residuals[0],
      converged=pairs.converged[0],
      edge=edge,
      sam_edge=sam_edge,
      gradient_alignment=edges.alignment(flatten(gradient), vector),
      update_alignment=edges.alignment(flatten(descent), vector),
      scaled=scaled,
      num_matvecs=products,
    )
    return found, tuple(kept)

  def _search(self, matvec, flat, block, key) -> curvature.TopEigenpairs:
    return curvature.top_eigenpairs(
      matvec,
      flat,
      _NUM_PAIRS,
      'magnitude',
      start=block,
      key=key,
      tol=self._tol,
      max_num_matvecs=_MAX_NUM_MATVECS,
      num_guards=_NUM_GUARDS,
      max_basis_size=min(_MAX_BASIS_SIZE, flat.size),
    )

  def _value_and_grad(self, batches, stacked, params) -> tuple[jax.Array, Any]:
    """The mean loss over all examples and its gradient."""
    function = jax.value_and_grad(self._loss)
    if not stacked:
      return function(params, batches)

    def add(total, batch):
      count = problem_lib.num_examples(batch)
      found = function(params, batch)
      total = jax.tree.map(lambda t, x: t + count.astype(t.dtype) * x, total, found)
      return total, count

    like = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], batches))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    total, counts = jax.lax.scan(add, zero, batches)
    return jax.tree.map(lambda t: t / counts.sum().astype(t.dtype), total)

  def _descent(self, state, params, value, gradient, value_and_grad):
    """What the method hands to its base optimizer, and its radius."""
    updates, after = self._tx.update(
      gradient,
      self._state_of(state.opt_state),
      params,
      value=value,
      value_and_grad_fn=value_and_grad,
    )
    rho = optimizers.recorded(after).get('rho', jnp.nan)
    return updates, jnp.asarray(rho, value.dtype)


def curvature_params(params: Any) -> Any:
  """Parameters in the type in which curvature is measured: float32 or wider."""
  return jax.tree.map(lambda x: x.astype(_wide(x.dtype)), params)


def _wide(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)


def num_ascent_steps(config: Config) -> int:
  """Ascent steps of a step of a method, each with a gradient."""
  return config.hyperparameters.get('num_ascent_steps') or 1


def edges_of(
  config: Config, gradient_norm: jax.Array, learning_rate: jax.Array, rho: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The edges of a run in its next step, as `Found` has them.

  Args:
    config: the run's.
    gradient_norm: of the clean gradient.
    learning_rate: of the base optimizer.
    rho: the method's radius.
  """
  base = config.base_optimizer
  none = jnp.full((), jnp.nan, learning_rate.dtype)
  if base in ADAMS:
    return edges.adam_edge(learning_rate), none
  momentum = {
    'momentum': 0.0 if base == 'sgd' else config.momentum,
    'nesterov': base == 'nesterov',
  }
  if base == 'sgd':
    edge = edges.gd_edge(learning_rate)
  else:
    of = edges.nesterov_edge if base == 'nesterov' else edges.heavy_ball_edge
    edge = of(learning_rate, config.momentum)
  if config.perturb_every > 1:
    return edge, none  # Steps of both kinds alternate, and have no known edge together.
  if num_ascent_steps(config) > 1:
    return edge, none  # That of one ascent step is another.
  if config.optimizer == 'sam':
    return edge, edges.sam_edge(gradient_norm, learning_rate, rho, **momentum)
  if config.optimizer == 'usam':
    return edge, edges.usam_edge(learning_rate, rho, **momentum)
  return edge, none


def stacked(batches: list[Batch]) -> Batch | None:
  """Batches in a stack, the last filled up without weight; None if they do not fit."""
  if len(batches) == 1:
    return batches[0]
  leading = len(batches[0]['weights'])

  def fill(leaf):
    leaf = np.asarray(leaf)
    missing = leading - len(leaf)
    return np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))

  if not isinstance(batches[0]['inputs'], np.ndarray):
    return None  # Graphs are packed into arrays whose lengths differ.
  filled = [jax.tree.map(fill, batch) for batch in batches]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
