"""Seconds of one SAM epoch of Mutagenicity, against PyTorch Geometric.

  python -m benchmarks.gcn_epoch --manual_dir=DIR [--peer_python=PYTHON]

DIR holds Mutagenicity.zip. PYTHON is the interpreter of an environment with torch and
torch_geometric; without it only our epoch is timed. Epochs of the two alternate, so
that both meet the same state of the machine, and the medians are compared. Both train
the same network with SAM over Adam at batch size 64, batching included. Before the
timing every shape of a batch has been compiled, as after the first epochs of a run.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax

import tasks
import training
from input_pipelines import DataError
from training import cli, parallel, sharing, step

_PEER = pathlib.Path(__file__).parent / 'peers' / 'pyg_gcn_sam.py'


def epoch_runner(
  config: training.Config, problem: training.Problem
) -> Callable[[int], float]:
  """Returns a function that trains an epoch and returns its seconds."""
  replicas = parallel.DataParallel(num_devices=1)
  batches = problem.train.batches(config.batch_size, seed=config.seed)
  stepper = step.Stepper(
    problem, config, batches.steps_per_epoch, sharing.of(config), replicas.axis_name
  )
  train_step = replicas.map(stepper.train, donate=True)
  state = replicas.place(replicas.replicate(jax.jit(stepper.init)(config.seed)))

  def run(epoch: int) -> float:
    nonlocal state
    start = time.perf_counter()
    for batch in batches.epoch(epoch):
      state, _ = train_step(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  return run


class Peer:
  """The peer's process, which trains an epoch when it is sent a line."""

  def __init__(self, python: str, archive: pathlib.Path, epochs: int):
    """Starts the process; it reads the data and warms up while others wait."""
    self._process = subprocess.Popen(
      [python, '-W', 'ignore', _PEER, archive, '--wait', f'--timed={epochs}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self) -> float:
    """Trains an epoch and returns its seconds."""
    print(file=self._process.stdin, flush=True)
    return json.loads(self._process.stdout.readline())['seconds']

  def close(self) -> None:
    """Ends the process."""
    self._process.communicate()


def _report(name: str, seconds: list[float]) -> float:
  median = statistics.median(seconds)
  print(
    f'{name}: {median:.3f} s an epoch, median of {len(seconds)} '
    f'({min(seconds):.3f} to {max(seconds):.3f})'
  )
  return median


def main() -> None:
  """Times both and prints the medians and their ratio."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--manual_dir', required=True, help='folder of Mutagenicity.zip')
  parser.add_argument('--data_dir', default='', help='folder of prepared data sets')
  parser.add_argument('--peer_python', default='', help="the peer's interpreter")
  parser.add_argument('--epochs', type=int, default=9, help='epochs to time')
  arguments = parser.parse_args()

  config = tasks.resolve(
    'mutagenicity_gcn',
    optimizer='sam',
    manual_dir=arguments.manual_dir,
    data_dir=arguments.data_dir,
  )
  ours = epoch_runner(config, tasks.build(config))
  for epoch in range(arguments.epochs):
    ours(epoch)
  if not arguments.peer_python:
    _report('sam_jax', [ours(epoch) for epoch in range(arguments.epochs)])
    return
  archive = pathlib.Path(arguments.manual_dir) / 'Mutagenicity.zip'
  peer = Peer(arguments.peer_python, archive, 1 + arguments.epochs)
  peer.run()  # Returns once the peer has started and is warm.
  pairs = [(ours(epoch), peer.run()) for epoch in range(arguments.epochs)]
  peer.close()
  our_seconds, peer_seconds = map(list, zip(*pairs, strict=True))
  ratio = _report('PyTorch Geometric', peer_seconds) / _report('sam_jax', our_seconds)
  print(f'sam_jax is {ratio:.2f} times as fast')


if __name__ == '__main__':
  sys.exit(cli.run(lambda _: main(), sys.argv, errors=(DataError,)))
