"""PyHessian on the network that benchmarks/hessian_of_mlp.py hands over.

  python pyhessian_mlp.py FILE --steps=N

Answers each line of standard input, 'lambda_max' or 'density', with one of JSON.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from pyhessian import hessian


def eig(matrix: torch.Tensor, eigenvectors: bool):
  """torch.eig, which PyHessian calls and PyTorch has removed, for symmetric input."""
  del eigenvectors
  values, vectors = torch.linalg.eigh(matrix)
  return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


def network(arrays) -> torch.nn.Module:
  """The exported layers with ReLU between them."""
  parts = []
  for index in range(sum(name.startswith('kernel') for name in arrays)):
    kernel, bias = (torch.tensor(arrays[f'{n}_{index}']) for n in ('kernel', 'bias'))
    layer = torch.nn.Linear(*kernel.shape)
    layer.weight.data, layer.bias.data = kernel.T.contiguous(), bias
    parts += [layer, torch.nn.ReLU()]
  return torch.nn.Sequential(*parts[:-1])


def main() -> None:
  """Answers until the input ends."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('file')
  parser.add_argument('--steps', type=int, default=80)
  arguments = parser.parse_args()
  torch.eig = eig
  with np.load(arguments.file) as arrays:
    model = network(arrays)
    data = torch.tensor(arrays['inputs']), torch.tensor(arrays['labels']).long()
  measured = hessian(model, torch.nn.CrossEntropyLoss(), data=data, cuda=False)
  for line in sys.stdin:
    start = time.perf_counter()
    if line.strip() == 'lambda_max':
      # By default it stops after 100 products, or at a change of 1e-3.
      answer = {
        'lambda_max': measured.eigenvalues()[0][0],
        'lambda_max_tight': measured.eigenvalues(maxIter=5000, tol=1e-7)[0][0],
      }
    else:
      nodes, _ = measured.density(iter=arguments.steps, n_v=1)
      answer = {'largest': float(max(nodes[0]))}
    answer['seconds'] = time.perf_counter() - start
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
