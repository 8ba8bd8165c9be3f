"""The GCN with SAM on Mutagenicity in PyTorch Geometric.

A peer for `benchmarks/gcn_epoch.py`: the same network, batch size, optimizer and
loss. It runs in an environment of its own, with torch and torch_geometric:

  python pyg_gcn_sam.py Mutagenicity.zip                        # seconds an epoch
  python pyg_gcn_sam.py Mutagenicity.zip --epochs=200 --seed=0  # test accuracy
"""

import argparse
import io
import json
import statistics
import sys
import time
import zipfile

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GraphConv, global_mean_pool

_FEATURES, _CLASSES, _SMOOTHING, _RHO, _BATCH_SIZE = 14, 2, 0.1, 0.005, 64


class GCN(nn.Module):
  """14-64-128-128-128 graph convolutions, mean pooling, 64, 2."""

  def __init__(self):
    """Makes the layers with PyTorch's own initialization."""
    super().__init__()
    widths = [_FEATURES, 64, 128, 128, 128]
    self.convolutions = nn.ModuleList(
      GraphConv(inner, outer, aggr='add')
      for inner, outer in zip(widths[:-1], widths[1:], strict=True)
    )
    self.hidden = nn.Linear(128, 64)
    self.logits = nn.Linear(64, _CLASSES)

  def forward(self, data: Data) -> torch.Tensor:
    """Returns logits of shape `(graphs, 2)`."""
    x = data.x
    for convolution in self.convolutions[:-1]:
      x = convolution(x, data.edge_index).relu()
    x = self.convolutions[-1](x, data.edge_index)
    x = global_mean_pool(x, data.batch)
    x = functional.dropout(x, 0.8, self.training)
    x = functional.dropout(self.hidden(x), 0.8, self.training)
    return self.logits(x)


def read(path: str) -> list[Data]:
  """Reads the publisher's archive."""

  def table(archive: zipfile.ZipFile, file: str) -> np.ndarray:
    text = archive.read(f'Mutagenicity/Mutagenicity_{file}.txt').decode()
    return np.loadtxt(io.StringIO(text), delimiter=',', dtype=np.int64)

  with zipfile.ZipFile(path) as archive:
    edges = table(archive, 'A') - 1
    graph = table(archive, 'graph_indicator') - 1
    nodes = table(archive, 'node_labels')
    labels = table(archive, 'graph_labels')
  one_hot = np.eye(_FEATURES, dtype=np.float32)[nodes]
  edges = edges[np.argsort(graph[edges[:, 0]], kind='stable')]
  last_node = np.cumsum(np.bincount(graph))
  last_edge = np.cumsum(np.bincount(graph[edges[:, 0]], minlength=len(labels)))
  first_node, first_edge = np.r_[0, last_node[:-1]], np.r_[0, last_edge[:-1]]
  return [
    Data(
      x=torch.from_numpy(one_hot[first_node[i] : last_node[i]]),
      edge_index=torch.from_numpy(
        (edges[first_edge[i] : last_edge[i]] - first_node[i]).T.copy()
      ),
      y=torch.tensor([labels[i]]),
    )
    for i in range(len(labels))
  ]


def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
  """KL(target || softmax) with label smoothing 0.1."""
  target = torch.full_like(logits, _SMOOTHING / (_CLASSES - 1))
  target.scatter_(1, labels[:, None], 1 - _SMOOTHING)
  log_probabilities = functional.log_softmax(logits, dim=1)
  return functional.kl_div(log_probabilities, target, reduction='batchmean')


def _gradient(model: GCN, data: Data) -> None:
  model.zero_grad()
  loss_fn(model(data), data.y).backward()


def train_epoch(model: GCN, optimizer: torch.optim.Optimizer, loader) -> None:
  """One epoch of plain SAM, one dropout mask for both passes."""
  model.train()
  parameters = list(model.parameters())
  for data in loader:
    state = torch.get_rng_state()
    _gradient(model, data)
    with torch.no_grad():
      gradients = [parameter.grad for parameter in parameters]
      norm = torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm(gradients))
      ).clamp_min(1e-12)
      perturbation = torch._foreach_mul(gradients, _RHO / norm.item())
      torch._foreach_add_(parameters, perturbation)
    torch.set_rng_state(state)
    _gradient(model, data)
    with torch.no_grad():
      torch._foreach_sub_(parameters, perturbation)
    optimizer.step()


@torch.no_grad()
def accuracy(model: GCN, loader) -> float:
  """Fraction of graphs classified right."""
  model.eval()
  right = sum((model(data).argmax(1) == data.y).sum().item() for data in loader)
  return right / len(loader.dataset)


def train(model: GCN, optimizer: torch.optim.Optimizer, epochs: int, loader) -> None:
  """The full recipe: learning rate x0.2 at 30, 60 and 80 % of the epochs."""
  milestones = [-(-epochs * tenths // 10) for tenths in (3, 6, 8)]
  schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.2)
  for _ in range(epochs):
    train_epoch(model, optimizer, loader)
    schedule.step()


def main() -> None:
  """Times epochs, or trains for `--epochs` and prints the test accuracy."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('archive', help='Mutagenicity.zip')
  parser.add_argument('--timed', type=int, default=5, help='epochs to time')
  parser.add_argument(
    '--wait', action='store_true', help='wait for a line on stdin before each epoch'
  )
  parser.add_argument('--epochs', type=int, default=0, help='epochs of a full run')
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()

  torch.manual_seed(arguments.seed)
  graphs = read(arguments.archive)
  order = np.random.default_rng(arguments.seed).permutation(len(graphs))
  num_train = int(0.7 * len(graphs))
  loader = DataLoader([graphs[i] for i in order[:num_train]], _BATCH_SIZE, shuffle=True)
  test = DataLoader([graphs[i] for i in order[num_train:]], 256)
  model = GCN()
  optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)

  if arguments.epochs:
    train(model, optimizer, arguments.epochs, loader)
    result = {'seed': arguments.seed, 'test_accuracy': accuracy(model, test)}
    print(json.dumps(result))
    return
  train_epoch(model, optimizer, loader)
  seconds = []
  for _ in range(arguments.timed):
    if arguments.wait and not sys.stdin.readline():
      break
    start = time.perf_counter()
    train_epoch(model, optimizer, loader)
    seconds.append(time.perf_counter() - start)
    if arguments.wait:
      print(json.dumps({'seconds': seconds[-1]}), flush=True)
  print(json.dumps({'seconds_per_epoch': statistics.median(seconds)}))


if __name__ == '__main__':
  main()
