"""A 2-D convolution whose gradients are fast on the CPU wherever they are taken."""

import functools

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

_LABELS = ('NHWC', 'HWIO', 'NHWC')
_Pads = tuple[tuple[int, int], tuple[int, int]]


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  r"""Convolution, padded by k // 2 zeros on each side.

  .. math:: y_{n,i,j,o} = \sum_{a,b,c} x_{n,\; s i + a - p,\; s j + b - p,\; c}\;
            w_{a,b,c,o}, \qquad p = \lfloor k / 2 \rfloor

  XLA's CPU compiler has a fast path for convolutions with the labels NHWC, HWIO, NHWC.
  It brings other labels into that form in a program's entry computation, but not inside
  `scan`, `map`, `while_loop` and `cond`, where the gradients of a convolution are
  20 to 75 times slower than the convolution. Here they are written as convolutions with
  those labels. They can be differentiated again, in either mode; only forward mode
  without a gradient inside (`jax.jvp` of `conv`) is not defined on the CPU.

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
  # Other compilers recognise gradients by the labels that autodiff gives them.
  if jax.default_backend() == 'cpu':
    return _canonical(x, kernel, stride)
  return _forward(x, kernel, stride)


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  pads = tuple((size // 2, size // 2) for size in kernel.shape[:2])
  return _plain(x, kernel, pads, stride=stride)


def _plain(
  x: jax.Array,
  kernel: jax.Array,
  pads: _Pads,
  *,
  stride: int = 1,
  x_dilation: int = 1,
  kernel_dilation: int = 1,
) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    pads,
    lhs_dilation=(x_dilation, x_dilation),
    rhs_dilation=(kernel_dilation, kernel_dilation),
    dimension_numbers=_LABELS,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _canonical(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  return _forward(x, kernel, stride)


def _canonical_fwd(x, kernel, stride):
  return _forward(x, kernel, stride), (x, kernel)


def _canonical_bwd(stride, residuals, cotangent):
  x, kernel = residuals
  return (
    _input_gradient(cotangent, kernel, x.shape, stride),
    _kernel_gradient(cotangent, x, kernel.shape, stride),
  )


_canonical.defvjp(_canonical_fwd, _canonical_bwd)


def _input_gradient(
  cotangent: jax.Array, kernel: jax.Array, shape: tuple[int, ...], stride: int
) -> jax.Array:
  """Convolves the spread cotangent with the kernel flipped and transposed."""

  def pads(axis):
    size, spread = kernel.shape[axis - 1], stride * (cotangent.shape[axis] - 1) + 1
    before = size - 1 - size // 2
    return before, shape[axis] - spread - before + size - 1

  flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
  return _plain(cotangent, flipped, (pads(1), pads(2)), x_dilation=stride)


def _kernel_gradient(
  cotangent: jax.Array, x: jax.Array, shape: tuple[int, ...], stride: int
) -> jax.Array:
  """Convolves inputs with cotangents; examples and channels change places."""

  def pads(axis):
    size, spread = shape[axis - 1], stride * (cotangent.shape[axis] - 1) + 1
    before = size // 2
    return before, size - 1 + spread - x.shape[axis] - before

  product = _plain(
    x.transpose(3, 1, 2, 0),
    cotangent.transpose(1, 2, 0, 3),
    (pads(1), pads(2)),
    kernel_dilation=stride,
  )
  return product.transpose(1, 2, 0, 3)


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
