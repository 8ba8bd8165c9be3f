"""A 2-D convolution whose gradients are fast on the CPU wherever they are taken."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.nn.initializers import Initializer


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  r"""Convolution, padded by k // 2 zeros on each side.

  .. math:: y_{n,i,j,o} = \sum_{a,b,c} x_{n,\; s i + a - p,\; s j + b - p,\; c}\;
            w_{a,b,c,o}, \qquad p = \lfloor k / 2 \rfloor

  XLA's CPU compiler has a fast path for convolutions with the labels NHWC, HWIO, NHWC.
  It brings other labels into that form in a program's entry computation, but not inside
  `scan`, `map`, `while_loop` and `cond`, where the gradients that JAX writes with other
  labels are 20 to 100 times slower than the convolution. Here all derivatives, of any
  order and in both modes, are convolutions with those labels.

  Args:
    x: `(N, H, W, C)`.
    kernel: `(k, k, C, O)`, k odd.
    stride: s, of both axes.

  Returns:
    `(N, ceil(H / s), ceil(W / s), O)`.

  >>> from jax import numpy as jnp
  >>> conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), stride=2)[0, :, :, 0]
  Array([[4., 6.],
         [6., 9.]], dtype=float32)
  """
  pads = tuple((size // 2, size // 2) for size in kernel.shape[:2])
  window = _Window(pads, stride)
  # Other compilers recognise gradients by the labels that autodiff gives them.
  if jax.default_backend() == 'cpu':
    return _conv_p.bind(x, kernel, window=window)
  return _lax_conv(x, kernel, window=window)


class _Window(NamedTuple):
  """How a kernel moves: y_i = sum_a x_j w_a with j x_step = i step + a kernel_step - p.

  Strides, and the two dilations, change places when a convolution is transposed.
  """

  pads: tuple[tuple[int, int], tuple[int, int]]
  step: int = 1
  x_step: int = 1
  kernel_step: int = 1


def _lax_conv(x: jax.Array, kernel: jax.Array, *, window: _Window) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (window.step,) * 2,
    window.pads,
    lhs_dilation=(window.x_step,) * 2,
    rhs_dilation=(window.kernel_step,) * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _input_gradient(
  cotangent: jax.Array, x: ad.UndefinedPrimal, kernel: jax.Array, *, window: _Window
) -> jax.Array:
  """Convolves the cotangent with the kernel flipped and transposed."""

  def pads(axis):
    reach = (kernel.shape[axis] - 1) * window.kernel_step
    before = reach - window.pads[axis][0]
    x_span = (x.aval.shape[axis + 1] - 1) * window.x_step
    span = (cotangent.shape[axis + 1] - 1) * window.step
    return before, x_span - span - before + reach

  flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
  turned = _Window((pads(0), pads(1)), window.x_step, window.step, window.kernel_step)
  return _conv_p.bind(cotangent, flipped, window=turned)


def _kernel_gradient(
  cotangent: jax.Array, x: jax.Array, kernel: ad.UndefinedPrimal, *, window: _Window
) -> jax.Array:
  """Convolves inputs with cotangents; examples and channels change places."""

  def pads(axis):
    reach = (kernel.aval.shape[axis] - 1) * window.kernel_step
    before = window.pads[axis][0]
    x_span = (x.shape[axis + 1] - 1) * window.x_step
    span = (cotangent.shape[axis + 1] - 1) * window.step
    return before, reach - x_span - before + span

  turned = _Window((pads(0), pads(1)), window.kernel_step, window.x_step, window.step)
  x, cotangent = x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
  return _conv_p.bind(x, cotangent, window=turned).transpose(1, 2, 0, 3)


def _batched(arrays, axes, *, window):
  """Maps over examples by joining the axis to theirs, over kernels as JAX does."""
  (x, kernel), (x_axis, kernel_axis) = arrays, axes
  if kernel_axis is not None:
    mapped = jax.vmap(lambda x, kernel: _lax_conv(x, kernel, window=window), axes)
    return mapped(x, kernel), 0
  x = jax.numpy.moveaxis(x, x_axis, 0)
  joined = x.reshape(-1, *x.shape[2:])
  y = _conv_p.bind(joined, kernel, window=window)
  return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _abstract(x, kernel, *, window):
  shape = jax.eval_shape(lambda *arrays: _lax_conv(*arrays, window=window), x, kernel)
  return jax.core.ShapedArray(shape.shape, shape.dtype)


_conv_p = Primitive('canonical_conv')
_conv_p.def_impl(jax.jit(_lax_conv, static_argnames='window'))
_conv_p.def_abstract_eval(_abstract)
ad.defbilinear(_conv_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[_conv_p] = _batched
mlir.register_lowering(_conv_p, mlir.lower_fun(_lax_conv, multiple_results=False))


class Conv(nn.Module):
  """`conv` with a kernel, and a bias if asked for, in the dtype of its kernel.

  Attributes:
    features: number O of output channels.
    size: k, odd.
    stride: of both axes.
    use_bias: whether there is a bias, zero at first.
    kernel_init: initializer of the kernel.
  """

  features: int
  size: int = 3
  stride: int = 1
  use_bias: bool = False
  kernel_init: Initializer = nn.initializers.he_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `(N, ceil(H / s), ceil(W / s), O)` for `x` of shape `(N, H, W, C)`."""
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape)
    x = conv(x.astype(kernel.dtype), kernel, self.stride)
    if not self.use_bias:
      return x
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    return x + bias[None, None, None]
