"""The wide residual network and the attention network in PyTorch.

A peer for `benchmarks/networks_against_torch.py`: the same layers, batch and loss, on
random inputs. It runs in an environment of its own, prints its number of parameters,
and then for every line `WHAT STEPS` on stdin, WHAT gradient or sam, takes so many steps
and prints their seconds:

  echo 'sam 5' | python torch_networks.py wrn --batch_size=32 [--compile] ...
"""

import argparse
import json
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional

_SMOOTHING, _RHO = 0.1, 0.05
_DROPOUT, _EPSILON = 0.1, 1e-12
_SAMPLES = 187


class Block(nn.Module):
  """Normalization, ReLU, convolution, twice, beside a shortcut."""

  def __init__(self, inner: int, outer: int, stride: int):
    """Takes the numbers of channels and the stride of the first convolution."""
    super().__init__()
    self.norm1, self.norm2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
    self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
    self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
    self.shortcut = None
    if stride > 1 or inner != outer:
      self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns `(B, outer, H / stride, W / stride)`."""
    y = self.norm1(x).relu()
    shortcut = x if self.shortcut is None else self.shortcut(y)
    y = self.norm2(self.conv1(y)).relu()
    return shortcut + self.conv2(y)


class WideResNet(nn.Module):
  """WRN-depth-width."""

  def __init__(self, depth: int, width: int, classes: int = 10):
    """Makes the layers with PyTorch's own initialization."""
    super().__init__()
    layers, channels = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)], 16
    for group in range(3):
      for index in range((depth - 4) // 6):
        outer = 16 * 2**group * width
        layers.append(Block(channels, outer, 2 if group and not index else 1))
        channels = outer
    self.blocks = nn.Sequential(*layers)
    self.norm = nn.BatchNorm2d(channels)
    self.logits = nn.Linear(channels, classes)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Returns logits for images `(B, 3, H, W)`."""
    x = self.norm(self.blocks(images)).relu()
    return self.logits(x.mean(dim=(2, 3)))


class Attention(nn.Module):
  """Embedding, one encoder layer with normalization after each sum, dense head."""

  def __init__(self, features: int = 200, heads: int = 2, hidden: int = 128):
    """Makes the layers with PyTorch's own initialization."""
    super().__init__()
    self.heads = heads
    self.embedding = nn.Linear(1, features)
    self.register_buffer('positions', _sinusoids(_SAMPLES, features))
    self.projections = nn.Linear(features, 3 * features)
    self.output = nn.Linear(features, features)
    self.feed_forward = nn.Sequential(
      nn.Linear(features, hidden),
      nn.ReLU(),
      nn.Dropout(_DROPOUT),
      nn.Linear(hidden, features),
    )
    self.norms = nn.ModuleList(nn.LayerNorm(features, eps=_EPSILON) for _ in range(3))
    widths = [_SAMPLES * features, 512, 256, 128]
    head = []
    for inner, outer in zip(widths[:-1], widths[1:], strict=True):
      head += [nn.Linear(inner, outer), nn.ReLU()]
    self.head = nn.Sequential(nn.Flatten(), *head, nn.Linear(128, 5))

  def forward(self, samples: torch.Tensor) -> torch.Tensor:
    """Returns logits for samples `(B, T)`."""
    x = self._dropout(self.embedding(samples[..., None]) + self.positions)
    x = self.norms[0](x + self._dropout(self._attend(x)))
    x = self.norms[1](x + self._dropout(self.feed_forward(x)))
    return self.head(self.norms[2](x))

  def _attend(self, x: torch.Tensor) -> torch.Tensor:
    parts = self.projections(x).unflatten(-1, (3, self.heads, -1))
    q, k, v = parts.permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(q, k, v)
    return self.output(y.transpose(1, 2).flatten(2))

  def _dropout(self, x: torch.Tensor) -> torch.Tensor:
    return functional.dropout(x, _DROPOUT, self.training)


def _sinusoids(length: int, features: int) -> torch.Tensor:
  rate = torch.exp(-math.log(10_000.0) / features * torch.arange(0, features, 2))
  angle = torch.arange(length)[:, None] * rate
  return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class Trainer:
  """A network on one random batch: gradients, and steps of SAM over momentum."""

  def __init__(self, arguments: argparse.Namespace):
    """Makes network, batch and optimizer as the command line says."""
    self._device = torch.device(arguments.device)
    self._dtype = getattr(torch, arguments.dtype)
    batch = arguments.batch_size
    if arguments.network == 'wrn':
      model = WideResNet(arguments.depth, arguments.width)
      self._inputs = torch.randn(batch, 3, 32, 32, device=self._device)
      classes = 10
    else:
      model = Attention()
      self._inputs = torch.rand(batch, _SAMPLES, device=self._device)
      classes = 5
    self._labels = torch.randint(classes, (batch,), device=self._device)
    model = model.to(self._device).train()
    if arguments.channels_last:
      model = model.to(memory_format=torch.channels_last)
      self._inputs = self._inputs.to(memory_format=torch.channels_last)
    self.parameters = list(model.parameters())
    self._norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    self._model = torch.compile(model) if arguments.compile else model
    self._optimizer = torch.optim.SGD(
      self.parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4
    )

  def gradient(self) -> None:
    """Forward and backward."""
    self._optimizer.zero_grad()
    mixed = self._dtype != torch.float32
    with torch.autocast(self._device.type, self._dtype, enabled=mixed):
      logits = self._model(self._inputs)
    log_probabilities = functional.log_softmax(logits.float(), dim=1)
    target = torch.full_like(log_probabilities, _SMOOTHING / (logits.shape[1] - 1))
    target.scatter_(1, self._labels[:, None], 1 - _SMOOTHING)
    loss = functional.kl_div(log_probabilities, target, reduction='batchmean')
    loss.backward()

  @torch.no_grad()
  def sam(self) -> None:
    """One step of SAM; batch statistics are those of the first pass."""
    with torch.enable_grad():
      self.gradient()
    gradients = [parameter.grad for parameter in self.parameters]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    perturbation = torch._foreach_mul(gradients, _RHO / norm.clamp_min(1e-12))
    torch._foreach_add_(self.parameters, perturbation)
    self._follow(0.0)
    with torch.enable_grad():
      self.gradient()
    self._follow(0.1)
    torch._foreach_sub_(self.parameters, perturbation)
    self._optimizer.step()

  def _follow(self, momentum: float) -> None:
    for norm in self._norms:
      norm.momentum = momentum

  def seconds(self, what: str, steps: int) -> float:
    """Seconds of so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
      getattr(self, what)()
    if self._device.type == 'cuda':
      torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
  """Answers lines on stdin until there are no more."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('network', choices=['wrn', 'attention'])
  parser.add_argument('--depth', type=int, default=16)
  parser.add_argument('--width', type=int, default=4)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--device', default='cpu')
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--channels_last', action='store_true')
  parser.add_argument('--compile', action='store_true')
  trainer = Trainer(parser.parse_args())
  count = sum(parameter.numel() for parameter in trainer.parameters)
  print(json.dumps({'torch': torch.__version__, 'parameters': count}), flush=True)
  for line in sys.stdin:
    what, steps = line.split()
    print(json.dumps({'seconds': trainer.seconds(what, int(steps))}), flush=True)


if __name__ == '__main__':
  main()
