"""The tangent kernel of a network of dense layers, without its Jacobian."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from training import problem as problem_lib

# Path of a layer: its input (n, width in) and its output (n, width out).
_Layers = dict[tuple[str, ...], tuple[jax.Array, jax.Array]]


def applies(model: Any, variables: Any, inputs: jax.Array) -> bool:
  """Whether all parameters of a network are those of dense layers, each called once.

  Args:
    model: a `flax.linen.Module`.
    variables: its variables, or their shapes.
    inputs: of some examples.
  """
  params, batch_stats = variables['params'], variables.get('batch_stats', {})

  def sizes(params, batch_stats, inputs):
    return _run(model, params, batch_stats, inputs)[1]

  try:
    layers = jax.eval_shape(sizes, params, batch_stats, inputs)
  except _CalledTwice:
    return False
  if any(len(x.shape) != 2 for pair in layers.values() for x in pair):
    return False
  known = sum(_size(_at(params, path)) for path in layers)
  return known == _size(params)


def of_dense_layers(
  model: Any, params: Any, batch_stats: Any, inputs: jax.Array
) -> jax.Array:
  r"""The tangent kernel of a network whose parameters all belong to dense layers.

  .. math:: (J J^T)_{ic,jd} = \sum_l \big(a^l_i \cdot a^l_j + \beta_l\big)\,
            \big(\delta^l_{ic} \cdot \delta^l_{jd}\big), \qquad
            \delta^l_{ic} = \frac{\partial f_{ic}}{\partial z^l_i}

  for the inputs a and the outputs z of layer l, with :math:`\beta_l = 1` where it has a
  bias. That costs one backward pass an output and two products of matrices a layer,
  much less than the Jacobian of many parameters.

  Args:
    model: a `flax.linen.Module` for which `applies` holds, in evaluation mode, in which
      no example influences another.
    params: its parameters.
    batch_stats: its running batch statistics, possibly empty.
    inputs: of n examples.

  Returns:
    (n C, n C) for outputs (n, C), and (n, n) for outputs (n,).
  """

  def forward(added):
    outputs, layers = _run(model, params, batch_stats, inputs, added)
    outputs = outputs.reshape(len(outputs), -1)
    return outputs, {path: x for path, (x, _) in layers.items()}

  with jax.default_matmul_precision('highest'):
    shapes = jax.eval_shape(lambda: _run(model, params, batch_stats, inputs)[1])
    zeros = {path: jnp.zeros(z.shape, z.dtype) for path, (_, z) in shapes.items()}
    outputs, pull, values = jax.vjp(forward, zeros, has_aux=True)
    width = outputs.shape[1]
    rows = jnp.eye(width, dtype=outputs.dtype)
    deltas = jax.vmap(lambda row: pull(jnp.tile(row, (len(outputs), 1)))[0])(rows)
    total = jnp.zeros((outputs.size, outputs.size), outputs.dtype)
    for path, value in values.items():
      delta = deltas[path].swapaxes(0, 1).reshape(outputs.size, -1)
      same = value @ value.T + ('bias' in _at(params, path))
      same = same.repeat(width, 0).repeat(width, 1)
      total += same * (delta @ delta.T)
  return total


class _CalledTwice(Exception):
  """A layer has more than one input."""


def _run(
  model: Any,
  params: Any,
  batch_stats: Any,
  inputs: jax.Array,
  added: dict[tuple[str, ...], jax.Array] | None = None,
) -> tuple[jax.Array, _Layers]:
  """The outputs, with something added to those of each dense layer, and the layers."""
  layers: _Layers = {}

  def intercept(call, args, kwargs, context):
    found = call(*args, **kwargs)
    if type(context.module) is not nn.Dense or context.method_name != '__call__':
      return found
    path = context.module.path
    if path in layers:
      raise _CalledTwice
    if added is not None:
      found = found + added[path]
    layers[path] = (args[0] if args else kwargs['inputs'], found)
    return found

  with nn.intercept_methods(intercept):
    outputs, _ = problem_lib.outputs(model, params, batch_stats, inputs)
  return outputs, layers


def _at(params: Any, path: tuple[str, ...]) -> Any:
  for name in path:
    params = params[name]
  return params


def _size(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
