"""Largest eigenvalue and spectral density of an MLP, against PyHessian.

  python -m benchmarks.hessian_of_mlp [--peer_python=PYTHON] [--repeats=7]

PYTHON is the interpreter of an environment with torch and pyhessian; without it only
ours is measured. The network has 125,898 parameters and is trained on digits for some
steps; weights and one batch of 128 are handed to the peer in a file. Densities of 80
Lanczos steps and one probe are timed in turn, after one of each to warm up.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sam_jax
import tasks

_PEER = pathlib.Path(__file__).parent / 'peers' / 'pyhessian_mlp.py'
_MODEL = 'features=(510, 178)'
_EXAMPLES, _STEPS, _LANCZOS = 128, 300, 80


def problem() -> tuple[Any, Any, dict[str, jax.Array]]:
  """A loss, trained parameters, and the batch it is measured on."""
  config = tasks.resolve('digits_mlp', model=_MODEL)
  digits = tasks.build(config)
  model = digits.model
  params = model.init(jax.random.key(0), digits.example_inputs)['params']
  batch = next(digits.train.batches(_EXAMPLES, seed=0).epoch(0))
  batch = {name: jnp.asarray(batch[name]) for name in ('inputs', 'labels')}

  def loss(params, batch):
    logits = model.apply({'params': params}, batch['inputs'])
    chosen = optax.softmax_cross_entropy_with_integer_labels(logits, batch['labels'])
    return chosen.mean()

  @jax.jit
  def train(params):
    descend = lambda _, p: jax.tree.map(
      lambda w, g: w - 0.1 * g, p, jax.grad(loss)(p, batch)
    )
    return jax.lax.fori_loop(0, _STEPS, descend, params)

  return loss, train(params), batch


def export(path: pathlib.Path, params: Any, batch: dict[str, jax.Array]) -> None:
  """Writes kernels and biases in the order of the layers, inputs and labels."""
  layers = {
    f'{name}_{index}': params[f'Dense_{index}'][name]
    for index in range(len(params))
    for name in ('kernel', 'bias')
  }
  inputs = np.asarray(batch['inputs']).reshape(len(batch['inputs']), -1)
  np.savez(path, inputs=inputs, labels=batch['labels'], **layers)


class Peer:
  """The peer's process, which measures when it is sent a line."""

  def __init__(self, python: str, data: pathlib.Path):
    """Starts the process."""
    command = [python, '-W', 'ignore', _PEER, data, f'--steps={_LANCZOS}']
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    self._process = subprocess.Popen(command, text=True, **pipes)

  def ask(self, what: str) -> dict[str, float]:
    """Has 'density' or 'lambda_max' measured."""
    self._process.stdin.write(f'{what}\n')
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def close(self) -> None:
    """Ends the process."""
    self._process.communicate(timeout=60)


def main() -> None:
  """Measures both and prints a line each."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--peer_python', help='interpreter with torch and pyhessian')
  parser.add_argument('--repeats', type=int, default=7, help='timed densities of each')
  arguments = parser.parse_args()
  loss, params, batch = problem()
  operator = sam_jax.curvature.hessian(loss, params, [batch])
  pairs = sam_jax.curvature.eigenpairs(operator, 1, 'largest', tol=1e-6)
  print(f'{operator.size:,} parameters, {_EXAMPLES} examples')
  print(
    f'ours: lambda_max {pairs.eigenvalues[0]:.6f} (residual {pairs.residuals[0]:.1e}), '
    f'{pairs.num_matvecs} products'
  )
  peer = None
  with tempfile.TemporaryDirectory() as folder:
    if arguments.peer_python:
      path = pathlib.Path(folder) / 'mlp.npz'
      export(path, params, batch)
      peer = Peer(arguments.peer_python, path)
      found = peer.ask('lambda_max')
      print(
        f'PyHessian: lambda_max {found["lambda_max"]:.6f} at its default tolerance, '
        f'{found["lambda_max_tight"]:.6f} at 1e-7'
      )
    times = {'ours': [], 'PyHessian': []}
    for index in range(arguments.repeats + 1):
      start = time.perf_counter()
      key = jax.random.key(index)
      density = sam_jax.curvature.spectral_density(operator, _LANCZOS, 1, key=key)
      times['ours'].append(time.perf_counter() - start)
      if peer:
        found = peer.ask('density')
        times['PyHessian'].append(found['seconds'])
        largest = found['largest']
    medians = {name: statistics.median(t[1:]) for name, t in times.items() if t}
    for name, median in medians.items():
      print(f'{name}: {_LANCZOS}-step density {median:.3f} s')
    print(f'ours: largest outlier {density.outliers.max():.6f}')
    if peer:
      print(f'PyHessian: largest node {largest:.6f}')
      print(f'PyHessian / ours {medians["PyHessian"] / medians["ours"]:.2f}')
      peer.close()


if __name__ == '__main__':
  main()
