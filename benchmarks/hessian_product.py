"""Hessian-vector products and top eigenvalues of a language model or a ResNet.

  python -m benchmarks.hessian_product [--width=768] [--layers=12] [--heads=12]
      [--vocabulary=50304] [--length=512] [--batch_size=8] [--chunk=256] [--repeats=5]
      [--top=5] [--manual_dir=DIR]
  python -m benchmarks.hessian_product --depth=18 --pixels=64 [--batch_size=8]

A gradient and a product with the Hessian, compiled, over one batch: seconds, medians of
runs in turn, the compiler's count of temporary memory, and FLOPs. --chunk bounds the
positions whose logits are in memory; 0 holds all logits. --depth is of a ResNet in
place of the language model, in evaluation mode on random images. With --top that many
of the largest eigenvalues are measured, by Lanczos to a relative residual of 1e-4.

The network is at its initialisation. Tokens are the characters of Tiny Shakespeare with
--manual_dir, which has 65 of them, and random numbers below --vocabulary without.

FLOPs of a ResNet are the compiler's count. Those of a language model, of which the
compiler counts the body of a loop once, count matrix products alone. One forward pass
is 1: a gradient takes 3, the jvp of it 8 (3 forward; backward 1 for the inputs'
gradient, which lower layers need, and 4 for the tangents of both), and a product whose
linearized gradient is kept 6. Under `jax.checkpoint` the forward part of the head is
taken once, in the backward pass, so the head takes 3 and 8.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sam_jax
from benchmarks import step_cost
from input_pipelines import DataError, shakespeare
from models import LanguageModel, ResNet
from models import resnet as resnet_lib
from training import cli, compiler

_GIB = 1 << 30
_KEPT = 'product, linearization kept'
# Forward passes whose operations each takes, see the head of the file.
_PASSES = {'gradient': 3, 'product': 8, _KEPT: 6}


def forward_flops(model: LanguageModel, positions: int, length: int) -> float:
  """Of the matrix products of one forward pass over some positions."""
  inner = model.num_heads * model.head_features
  layer = 4 * model.features * inner + 2 * model.widening * model.features**2
  attention = 2 * length * inner
  whole = model.num_layers * (layer + attention) + model.features * model.vocabulary
  return 2 * positions * whole


def tokens(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  """A batch of tokens and the ones after them, (B, T) each."""
  shape = arguments.batch_size, arguments.length + 1
  if arguments.manual_dir:
    split, _ = shakespeare.load(manual_dir=arguments.manual_dir)
    text = np.ravel(split.arrays['inputs'])[: shape[0] * shape[1]]
  else:
    text = np.random.default_rng(0).integers(0, arguments.vocabulary, np.prod(shape))
  text = np.reshape(text, shape).astype(np.int32)
  return text[:, :-1], text[:, 1:]


def loss(model: LanguageModel, chunk: int) -> Callable[[Any, Any], jax.Array]:
  """The mean cross-entropy of a batch, with the logits in chunks or whole."""

  def in_chunks(params, batch):
    return jnp.mean(model.token_losses(params, *batch, chunk=chunk))

  def whole(params, batch):
    log_probs = jax.nn.log_softmax(model.apply({'params': params}, batch[0]))
    return -jnp.mean(jnp.take_along_axis(log_probs, batch[1][..., None], axis=-1))

  return in_chunks if chunk else whole


def language_model(arguments: argparse.Namespace) -> tuple[Any, Any, Any, float]:
  """The loss, parameters, a batch, and the operations of a forward pass."""
  model = LanguageModel(
    vocabulary=arguments.vocabulary,
    features=arguments.width,
    num_layers=arguments.layers,
    num_heads=arguments.heads,
    head_features=arguments.width // arguments.heads,
  )
  batch = jax.device_put(tokens(arguments))
  params = jax.jit(model.init)(jax.random.key(0), batch[0][:1])['params']
  forward = forward_flops(model, batch[0].size, arguments.length)
  return loss(model, arguments.chunk), params, batch, forward


def resnet(arguments: argparse.Namespace) -> tuple[Any, Any, Any, None]:
  """The loss in evaluation mode, parameters, and a batch; the compiler counts."""
  model = ResNet(depth=arguments.depth, pixel_mean=(127.5,) * 3, pixel_std=(64.0,) * 3)
  shape = arguments.batch_size, arguments.pixels, arguments.pixels, 3
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, shape).astype(np.uint8)
  labels = generator.integers(0, 1000, len(images)).astype(np.int32)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  stats = variables['batch_stats']

  def loss_fn(params, batch):
    logits = model.apply({'params': params, 'batch_stats': stats}, batch[0])
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, batch[1][:, None], axis=-1))

  return loss_fn, variables['params'], jax.device_put((images, labels)), None


def compare(
  loss_fn: Callable[[Any, Any], jax.Array],
  params: Any,
  batch: Any,
  repeats: int,
  forward: float | None,
) -> None:
  """Prints what a product takes beside a gradient.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``.
    params: where the Hessian is taken.
    batch: over which.
    repeats: timed runs of each.
    forward: operations of a forward pass; None asks the compiler for those of all.
  """
  vector = sam_jax.probes.gaussian(jax.random.key(1), params)
  product = sam_jax.curvature.hessian_product(loss_fn)
  linear = jax.jit(product.linearize)(params, batch)
  programs = {
    'gradient': jax.jit(jax.grad(loss_fn)).lower(params, batch).compile(),
    'product': jax.jit(product).lower(params, batch, vector).compile(),
    _KEPT: jax.jit(lambda f, v: f(v)).lower(linear, vector).compile(),
  }
  arguments = {'gradient': (params, batch), 'product': (params, batch, vector)}
  arguments[_KEPT] = linear, vector
  memory = {n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()}
  memory[_KEPT] += sum(x.nbytes for x in jax.tree.leaves(linear))
  flops = {
    name: _PASSES[name] * forward if forward else step_cost.flops(program)
    for name, program in programs.items()
  }
  times = step_cost.medians(
    {n: functools.partial(p, *arguments[n]) for n, p in programs.items()}, repeats
  )
  print(
    f'  {"":28}{"s":>8}{"x":>7}{"FLOPs x":>9}{"GFLOP/s":>9}{"GiB beside params":>19}'
  )
  for name, seconds in times.items():
    print(
      f'  {name:28}{seconds:8.3f}{seconds / times["gradient"]:7.3f}'
      f'{flops[name] / flops["gradient"]:9.3f}{flops[name] / seconds / 1e9:9.0f}'
      f'{memory[name] / _GIB:19.3f}'
    )


def top(loss_fn, params, batch, k: int) -> None:
  """Prints the largest eigenvalues, and what they took."""
  operator = sam_jax.curvature.hessian(
    loss_fn, params, [batch], weight=lambda b: len(b[0]), max_cache_gib=0.0
  )
  start = time.perf_counter()
  say = lambda now: print(
    f'  {now.num_matvecs} products, {time.perf_counter() - start:.0f} s, residual '
    f'{now.residual:.1e}',
    flush=True,
  )
  found = sam_jax.curvature.eigenpairs(
    operator,
    k,
    'largest',
    tol=1e-4,
    max_basis_size=16,
    max_basis_gib=16.0,
    verify=False,
    progress=say,
  )
  seconds = time.perf_counter() - start
  print(
    f'  top {k}: {", ".join(f"{x:.5g}" for x in found.eigenvalues)}\n'
    f'  relative residuals at most {max(found.residuals) / found.scale:.1e}, '
    f'{found.num_matvecs} products, {seconds / found.num_matvecs:.1f} s each'
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and prints both."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--width', type=int, default=768, help='features')
  parser.add_argument('--layers', type=int, default=12, help='layers')
  parser.add_argument('--heads', type=int, default=12, help='heads of width / heads')
  parser.add_argument('--vocabulary', type=int, default=50304, help='tokens')
  parser.add_argument('--length', type=int, default=512, help='positions a sequence')
  parser.add_argument('--batch_size', type=int, default=8, help='sequences')
  parser.add_argument('--chunk', type=int, default=256, help='0: all logits at once')
  parser.add_argument('--depth', type=int, default=0, help='of a ResNet; 0: none')
  parser.add_argument('--pixels', type=int, default=64, help='of its images, a side')
  parser.add_argument('--repeats', type=int, default=5, help='timed runs; 0: none')
  parser.add_argument('--top', type=int, default=0, help='eigenvalues; 0: none')
  parser.add_argument('--manual_dir', default='', help='folder of tinyshakespeare.txt')
  arguments = parser.parse_args(argv)
  if arguments.width % arguments.heads:
    parser.error('--width must be a multiple of --heads')
  if min(arguments.batch_size, arguments.length, arguments.pixels) < 1:
    parser.error('--batch_size, --length and --pixels must be at least 1')
  if arguments.depth not in (0, *resnet_lib.DEPTHS):
    parser.error(f'--depth must be one of {", ".join(map(str, resnet_lib.DEPTHS))}')
  compiler.use_all_cores()
  build = resnet if arguments.depth else language_model
  loss_fn, params, batch, forward = build(arguments)
  count = sum(x.size for x in jax.tree.leaves(params))
  print(
    f'jax {jax.__version__} on {jax.devices()[0].device_kind}: {count:,} parameters '
    f'({4 * count / _GIB:.2f} GiB), a batch of {" x ".join(map(str, batch[0].shape))}'
  )
  if arguments.repeats:
    compare(loss_fn, params, batch, arguments.repeats, forward)
  if arguments.top:
    top(loss_fn, params, batch, arguments.top)


if __name__ == '__main__':
  sys.exit(cli.run(lambda argv: main(argv[1:]), sys.argv, errors=(DataError,)))
