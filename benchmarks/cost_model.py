"""A cost model of a training step and of a Hessian spectrum on many devices.

  python -m benchmarks.cost_model [--batch_size=4096] [--tokens=65536]
      [--peak_tflops=197] [--efficiency=0.4] [--gigabytes_per_second=100]

Prints what a step of ResNet-50 and of ViT-B/16 computes, sends and holds on a device,
on 8, 64 and 512 devices, and the same of a product with the Hessian of decoders of 1
and 7 billion parameters. The defaults are a TPU v5e: 197 TFLOP/s in bfloat16, and 1,600
Gbit/s between chips (cloud.google.com/tpu/docs/v5e), half of which is taken to be had.
The efficiency is an assumption too.

With P bytes of parameters, G gradients a step, and n = d f devices, of which f share
the parameters, a device takes the operations of G B / n gradients of one example, and
moves, as the compiled program says (`moved`):

- data parallel (f = 1), one all-reduce of P for each gradient that is reduced: all G
  where the whole batch shares a perturbation, 1 where each device has its own;
- fully sharded, for each gradient an all-gather of P, two where `jax.checkpoint` takes
  the forward pass again, a reduce-scatter of P over the f, and an all-reduce of P / f
  over the d.

A ring of n sends (n - 1) / n of what is gathered or scattered, and twice that of what
is reduced everywhere.

A device holds C P / f for the parameters, the gradient, and what the optimizer and the
method keep, two layers of gathered parameters where f > 1, and the activations of B / n
examples.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from training import cli

_GIB = 1 << 30
_MOST_DEVICES = 512  # of the plans


class Network(NamedTuple):
  """A network, by what its gradient takes.

  Attributes:
    name: of the table.
    parameters: their number, in float32.
    flops: floating-point operations of the gradient of one example (or token).
    activations: bytes that the gradient of one example (or token) keeps.
    layers: of equal size, of which two are gathered at a time.
  """

  name: str
  parameters: float
  flops: float
  activations: float
  layers: int


class Devices(NamedTuple):
  """Devices that split a batch, and that share parameters among `fsdp` of them."""

  data: int = 1
  fsdp: int = 1

  @property
  def number(self) -> int:
    """Of devices."""
    return self.data * self.fsdp


class Method(NamedTuple):
  """A training method.

  Attributes:
    gradients: that it takes a step.
    reductions: of them, those that are reduced over the devices.
    copies: of the parameters while a step runs: parameters, gradients, perturbed
      parameters, and the optimizer's state.
  """

  gradients: float
  reductions: float
  copies: float


# SGD with momentum, and SAM over it: its second gradient takes the first one's place,
# and the perturbed parameters are one copy more.
METHODS = {
  'sgd': Method(1, 1, 3),
  'sam': Method(2, 2, 4),
  'sam, a perturbation a device': Method(2, 1, 4),
}


class Cost(NamedTuple):
  """Of a step, on each device: operations, bytes it sends, bytes it holds."""

  flops: float
  sent: float
  memory: float

  def seconds(self, flops_per_second: float, bytes_per_second: float):
    """The least time, all sending hidden behind computing, and the largest, none."""
    compute, send = self.flops / flops_per_second, self.sent / bytes_per_second
    return max(compute, send), compute + send


def moved(size: float, devices: Devices, gradients: int, gathers: int = 1):
  """What the collectives of some reduced gradients have as results, by their kind.

  Args:
    size: of the parameters, in entries or bytes.
    devices: over which they are sharded and the batch is split.
    gradients: that are reduced.
    gathers: of the parameters for one gradient, where they are sharded.
  """
  data, fsdp = devices
  found = {'all-gather': 0.0, 'reduce-scatter': 0.0, 'all-reduce': 0.0}
  if fsdp > 1:
    found['all-gather'] = gathers * size
    found['reduce-scatter'] = size / fsdp
  if data > 1:
    found['all-reduce'] = size / fsdp
  return {kind: gradients * entries for kind, entries in found.items()}


def sent(size: float, devices: Devices, gradients: int, gathers: int = 2) -> float:
  """What each device sends for that, by rings."""
  data, fsdp = devices
  found = moved(size, devices, gradients, gathers)
  inner = (fsdp - 1) / fsdp * (found['all-gather'] + fsdp * found['reduce-scatter'])
  return inner + 2 * (data - 1) / data * found['all-reduce']


def step(network: Network, method: Method, batch: float, devices: Devices) -> Cost:
  """Of a training step over a batch of some examples."""
  size = 4 * network.parameters
  each = batch / devices.number
  gathered = 2 * size / network.layers if devices.fsdp > 1 else 0
  reductions = method.gradients if devices.fsdp > 1 else method.reductions
  return Cost(
    method.gradients * network.flops * each,
    sent(size, devices, reductions),
    method.copies * size / devices.fsdp + gathered + network.activations * each,
  )


def product(network: Network, tokens: float, vectors: int, devices: Devices) -> Cost:
  """Of a product with the Hessian over a batch of some tokens, in Lanczos.

  A product takes 8/3 of a gradient, and twice its activations; parameters, vector and
  their tangents are gathered together. The Lanczos vectors are shared by all devices,
  wherever parameters lie.
  """
  size = 4 * network.parameters
  each = tokens / devices.number
  gathered = 4 * size / network.layers if devices.fsdp > 1 else 0
  whole = 3 * size / devices.fsdp + vectors * size / devices.number
  return Cost(
    8 / 3 * network.flops * each,
    2 * sent(size, devices, 1),
    whole + gathered + 2 * network.activations * each,
  )


def decoder(name: str, layers: int, width: int, vocabulary: int = 50304) -> Network:
  """A decoder-only language model; its layers are taken again in the backward pass.

  Then a token keeps its features between the layers, and 34 numbers a feature of the
  one layer that is being taken again; 4 more operations a parameter and token are
  those of a gradient and of the second forward pass.
  """
  parameters = 12 * layers * width**2 + 2 * vocabulary * width
  activations = 4 * width * (layers + 34)
  return Network(name, parameters, 8 * parameters, activations, layers)


# Operations and memory are the compiler's for a gradient in float32 at 224 pixels, the
# difference of batches of 6 and 2 (models.ResNet and models.VisionTransformer, CPU).
RESNET_50 = Network('ResNet-50', 25_557_032, 23.9e9, 132e6, 50)
VIT_B = Network('ViT-B/16', 86_567_656, 106.3e9, 267e6, 12)


def _rows(costs: dict[tuple[str, str, int], Cost], flops: float, sending: float):
  rows = []
  for (name, what, number), cost in costs.items():
    least, largest = cost.seconds(flops, sending)
    rows.append(
      f'  {name:11}{what:30}{number:8}{cost.flops / 1e12:9.2f}{cost.sent / _GIB:10.3f}'
      f'{cost.memory / _GIB:10.2f}{1e3 * least:10.1f}{1e3 * largest:10.1f}'
    )
  return rows


def tables(arguments: argparse.Namespace) -> str:
  """The plans of training and of spectra."""
  flops = 1e12 * arguments.peak_tflops * arguments.efficiency
  sending = 1e9 * arguments.gigabytes_per_second
  head = (
    f'  {"":11}{"":30}{"devices":>8}{"TFLOP":>9}{"GiB sent":>10}{"GiB held":>10}'
    f'{"ms, least":>10}{"largest":>10}'
  )
  training = {
    (network.name, name, n): step(network, method, arguments.batch_size, Devices(n))
    for network in (RESNET_50, VIT_B)
    for name, method in METHODS.items()
    for n in (8, 64, 512)
  }
  # Float32 at the highest precision takes six products of bfloat16 on a TPU.
  spectra = {
    (network.name, f'{vectors} vectors', n): product(
      network, arguments.tokens, vectors, Devices(1, n)
    )
    for network, vectors in (
      (decoder('1B', 16, 2048), 23),
      (decoder('7B', 32, 4096), 23),
    )
    for n in (8, 64, 512)
  }
  return '\n'.join(
    [
      f'A step over {arguments.batch_size:,} examples, on each device',
      head,
      *_rows(training, flops, sending),
      '',
      f'A product with the Hessian over {arguments.tokens:,} tokens, on each device',
      head,
      *_rows(spectra, flops / 6, sending),
    ]
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the plans."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch_size', type=int, default=4096, help='examples a step')
  parser.add_argument('--tokens', type=int, default=65536, help='of a product')
  parser.add_argument('--peak_tflops', type=float, default=197.0, help='of a device')
  parser.add_argument('--efficiency', type=float, default=0.4, help='share of the peak')
  parser.add_argument(
    '--gigabytes_per_second', type=float, default=100.0, help='that a device sends'
  )
  arguments = parser.parse_args(argv)
  if arguments.batch_size < _MOST_DEVICES or arguments.tokens < _MOST_DEVICES:
    parser.error(f'--batch_size and --tokens must be at least {_MOST_DEVICES}')
  if not 0 < arguments.efficiency <= 1:
    parser.error('--efficiency must be above 0 and at most 1')
  if min(arguments.peak_tflops, arguments.gigabytes_per_second) <= 0:
    parser.error('--peak_tflops and --gigabytes_per_second must be above 0')
  print(tables(arguments))


if __name__ == '__main__':
  sys.exit(cli.run(lambda argv: main(argv[1:]), sys.argv))
