"""Data parallelism and groups of examples inside an optax chain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from sam_jax import ascent, perturbations, varying


def cross_replica_mean(
  axis_name: str, *, keep_varying: bool = False
) -> optax.GradientTransformationExtraArgs:
  r"""Averages the updates over the replicas of a mapped axis.

  Always needed **after** a sharpness-aware method under `jax.pmap`: every replica then
  perturbs on its own batch, which is m-sharpness with m = batch / replicas. A second
  one **before** the method gives all replicas one common perturbation.

  `jax.shard_map` sums the gradients of replicated parameters over the axis by itself
  unless ``check_vma=False``. Then take them at ``jax.lax.pcast(params, axis_name,
  to='varying')``, so that there is something to average.

  Args:
    axis_name: the name given to `jax.pmap` or `jax.vmap`, or of a mesh axis of
      `jax.shard_map`.
    keep_varying: whether the mean counts as a value of each replica, which a method
      after it needs under `jax.shard_map` with ``check_vma=True``. It changes nothing
      elsewhere.

  Returns:
    A stateless transformation.

  Raises:
    ValueError: ``update`` where `jax.shard_map` has summed the gradients already.

  >>> import jax, jax.numpy as jnp, sam_jax
  >>> tx = sam_jax.cross_replica_mean('batch')
  >>> mean = lambda g: tx.update(g, tx.init(g))[0]
  >>> jax.vmap(mean, axis_name='batch')(jnp.array([1.0, 3.0])).tolist()
  [2.0, 2.0]

  References:
    Foret et al., 2021, section 4.1 on m-sharpness (arXiv:2010.01412).
  """

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    varying.require(updates, axis_name)
    mean = jax.lax.pmean(updates, axis_name)
    return (varying.as_much_as(mean, updates) if keep_varying else mean), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


def m_sharpness(
  inner: optax.GradientTransformation, num_groups: int
) -> optax.GradientTransformationExtraArgs:
  r"""Runs a method on each group of m examples by itself and averages the results.

  .. math:: \frac{1}{n} \sum_{j=1}^{n} \nabla L_j(w + \hat\epsilon_j), \qquad
            \hat\epsilon_j \text{ from } \nabla L_j(w)

  The groups are taken in a loop: memory of one group. ``update`` expects
  ``grad_fn(params, group)`` or ``value_and_grad_fn(params, group)`` with ``group`` an
  int32 scalar in ``[0, num_groups)`` that picks the examples; for groups of unequal
  size the function scales its mean loss by ``count * num_groups / total``. The incoming
  updates are ignored, so the caller need not take the clean gradient, and so is a
  ``value``: each group has its own loss.

  Args:
    inner: a method that starts from the clean gradient, `sam` for instance; so not
      `msam`, `graphsam`, `esam` or `decoupled_wsam`. All groups start from its state;
      of the states they end with, floating-point leaves are averaged.
    num_groups: number of groups in a batch, n = batch / m.

  Returns:
    A transformation with the state of ``inner``.

  Raises:
    ValueError: num_groups < 1; ``update`` without exactly one function.
    TypeError: ``init`` with a method that does not go with groups.

  >>> import jax, jax.numpy as jnp, optax, sam_jax
  >>> x = jnp.arange(8.0).reshape(4, 2)  # 4 groups of 2 examples
  >>> loss = lambda w, group: jnp.mean((x[group] - w) ** 2)
  >>> tx = optax.chain(sam_jax.m_sharpness(sam_jax.sam(0.05), 4), optax.sgd(0.1))
  >>> w = jnp.array(0.0)
  >>> updates, _ = tx.update(w, tx.init(w), w, grad_fn=jax.grad(loss))
  >>> round(float(updates), 4)
  0.71

  References:
    Foret et al., 2021, section 4.1 (arXiv:2010.01412); Andriushchenko and Flammarion,
    2022, section 3 (arXiv:2206.06232).
  """
  ascent.check_transformation(inner, 'inner')
  ascent.check_positive(num_groups=num_groups)
  num_groups = ascent.static_int('num_groups', num_groups, default=1)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    state = inner.init(params)
    ascent.check_method_state(state, 'm_sharpness')
    if hasattr(state, 'chooses_examples'):
      raise TypeError(
        'm_sharpness does not go with esam: both choose the examples of a gradient.'
      )
    return state

  def update_fn(
    updates, state, params=None, *, grad_fn=None, value_and_grad_fn=None, **extra_args
  ):
    del updates

    def one_group(group):
      def at_group(function):
        return function and (lambda at: function(at, group))

      functions = {
        'grad_fn': at_group(grad_fn),
        'value_and_grad_fn': at_group(value_and_grad_fn),
      }
      loss, grads = ascent.gradient_function(params, **functions)(params)
      # The caller's value is that of the whole batch.
      others = {name: x for name, x in extra_args.items() if name != 'value'}
      own = {} if value_and_grad_fn is None else {'value': loss}
      return inner.update(grads, state, params, **functions, **others, **own)

    def body(total, group):
      return jax.tree.map(_accumulate, total, one_group(group)), None

    total = jax.tree.map(_zero, perturbations.at_least_float32((params, state)))
    groups = jnp.arange(num_groups, dtype=jnp.int32)
    total = varying.scan_start(total, body, groups[0])
    total, _ = jax.lax.scan(body, total, groups)
    mean, new_state = jax.tree.map(lambda t: _divide(t, num_groups), total)
    return ascent.cast_like(mean, params), ascent.cast_like(new_state, state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zero(x: jax.Array) -> jax.Array:
  return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _accumulate(total: jax.Array, x: jax.Array) -> jax.Array:
  """Sums floating-point leaves; of all others (counts) the last one stays."""
  return total + x if jnp.issubdtype(x.dtype, jnp.floating) else x


def _divide(total: jax.Array, num_groups: int) -> jax.Array:
  return total / num_groups if jnp.issubdtype(total.dtype, jnp.floating) else total
