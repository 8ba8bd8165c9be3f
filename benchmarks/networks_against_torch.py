"""Gradients and SAM steps of the two large networks, against PyTorch.

  python -m benchmarks.networks_against_torch --peer_python=PYTHON [--network=attention]
      [--batch_size=64] [--dtype=bfloat16] [--channels_last] [--compile]

PYTHON is the interpreter of an environment with torch (benchmarks/peers). The network
is WRN-16-4 (--depth, --width) or the paper's attention network, on one random batch
that lies on the device; a gradient is forward and backward, a SAM step two of them with
SGD and momentum. Ours and PyTorch's take turns, so that both meet the same state of the
machine, and the medians are compared. Both must have the same number of parameters.
With --compile PyTorch runs a second time, under torch.compile.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import models
import tasks
from training import compiler, parallel, scores, sharing, step
from training import problem as problem_lib

_PEER = pathlib.Path(__file__).parent / 'peers' / 'torch_networks.py'
_TASKS = {'wrn': 'cifar10_wrn', 'attention': 'mitbih_attention'}


class Ours:
  """Our network, as `training` runs it."""

  def __init__(self, arguments: argparse.Namespace):
    """Makes the network and its batch, and compiles on the first run of each kind."""
    config = tasks.resolve(
      _TASKS[arguments.network],
      optimizer='sam',
      learning_rate=1e-3,
      batch_size=arguments.batch_size,
      dtype=arguments.dtype,
    )
    batch = arguments.batch_size
    if arguments.network == 'wrn':
      model = models.WideResNet(depth=arguments.depth, width=arguments.width)
      shape, classes = (batch, 32, 32, 3), 10
    else:
      model = models.Attention()
      shape, classes = (batch, 187), 5
    keys = jax.random.split(jax.random.key(0))
    self._batch = {
      'inputs': jax.random.uniform(keys[0], shape),
      'labels': jax.random.randint(keys[1], (batch,), 0, classes),
      'weights': jnp.ones(batch),
    }
    problem = problem_lib.Problem(
      model=model,
      train=None,  # One batch is all there is.
      test=None,
      example_losses=scores.smoothed_kl(config.label_smoothing),
      scores=scores.Classification(classes),
      example_inputs=self._batch['inputs'][:1],
    )
    stepper = step.Stepper(problem, config, 1000, sharing.of(config))
    self._state = jax.jit(stepper.init)(0)
    self.num_parameters = sum(x.size for x in jax.tree.leaves(self._state.params))
    self._runs = {'gradient': self._gradients(stepper), 'sam': self._steps(stepper)}

  def _gradients(self, stepper: step.Stepper) -> Callable[[int], Any]:
    """Takes so many gradients."""
    problem, dtype = stepper.problem, stepper.config.dtype

    @jax.jit
    def gradient(params, stats, batch, key):
      objective = lambda p: problem_lib.loss(
        problem, p, stats, batch, train=True, key=key, dtype=dtype
      )
      return jax.value_and_grad(objective, has_aux=True)(params)

    def run(steps):
      for _ in range(steps):
        result = gradient(
          self._state.params, self._state.batch_stats, self._batch, self._state.key
        )
      return result

    return run

  def _steps(self, stepper: step.Stepper) -> Callable[[int], Any]:
    """Takes so many steps of SAM."""
    replicas = parallel.DataParallel(num_devices=1)
    train_step = replicas.map(stepper.train, donate=True)
    state = replicas.place(replicas.replicate(self._state))
    batch = replicas.place(self._batch)

    def run(steps):
      nonlocal state
      for _ in range(steps):
        state, metrics = train_step(state, batch)
      return state

    return run

  def seconds(self, what: str, steps: int) -> float:
    """Seconds of so many gradients or SAM steps."""
    start = time.perf_counter()
    jax.block_until_ready(self._runs[what](steps))
    return time.perf_counter() - start


class Peer:
  """PyTorch's network, in a process of its own."""

  def __init__(self, arguments: argparse.Namespace, *, compiled: bool):
    """Starts the process, which makes the same network and a batch."""
    names = ('depth', 'width', 'batch_size', 'dtype')
    flags = [f'--{name}={getattr(arguments, name)}' for name in names]
    flags += [f'--device={"cuda" if jax.default_backend() == "gpu" else "cpu"}']
    flags += ['--channels_last'] * arguments.channels_last + ['--compile'] * compiled
    self._process = subprocess.Popen(
      [arguments.peer_python, '-W', 'ignore', _PEER, arguments.network, *flags],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    about = self._answer()
    self.version, self.num_parameters = about['torch'], about['parameters']

  def seconds(self, what: str, steps: int) -> float:
    """Seconds of so many gradients or SAM steps."""
    print(what, steps, file=self._process.stdin, flush=True)
    return self._answer()['seconds']

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      self.close()
      raise SystemExit(f'--peer_python={self._process.args[0]} ended, see above.')
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self._process.communicate()


def medians(sides: dict[str, Any], what: str, turns: int, steps: int) -> dict[str, Any]:
  """Median seconds of a step of each side, which take turns after a warm-up."""
  for side in sides.values():
    side.seconds(what, 2)
  times = {name: [] for name in sides}
  for _ in range(turns):
    for name, side in sides.items():
      times[name].append(side.seconds(what, steps) / steps)
  return {name: statistics.median(found) for name, found in times.items()}


def compare(arguments: argparse.Namespace) -> None:
  """Times all sides and prints a row each."""
  ours = Ours(arguments)
  with contextlib.ExitStack() as stack:
    peers = [
      stack.enter_context(contextlib.closing(Peer(arguments, compiled=compiled)))
      for compiled in ([False, True] if arguments.compile else [False])
    ]
    count, theirs = ours.num_parameters, peers[0].num_parameters
    if count != theirs:
      raise SystemExit(
        f'the networks differ: {count:,} parameters and {theirs:,} in PyTorch.'
      )
    names = ['sam_jax', f'torch {peers[0].version}', 'torch.compile']
    sides = dict(zip(names, [ours, *peers], strict=False))
    print(
      f'{arguments.network}, {count:,} parameters, batch {arguments.batch_size}, '
      f'{arguments.dtype}, jax {jax.__version__} on {jax.devices()[0].device_kind}'
    )
    for what in ('gradient', 'sam'):
      found = medians(sides, what, arguments.turns, arguments.steps)
      for name, seconds in found.items():
        print(
          f'  {what:9}{name:20}{1e3 * seconds:10.2f} ms '
          f'{arguments.batch_size / seconds:12,.0f} examples/s   '
          f'x{seconds / found["sam_jax"]:.2f}'
        )


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and compares."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--peer_python', required=True, help="the peer's interpreter")
  parser.add_argument('--network', default='wrn', choices=list(_TASKS))
  parser.add_argument('--depth', type=int, default=16, help='of the wrn')
  parser.add_argument('--width', type=int, default=4, help='of the wrn')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument(
    '--channels_last', action='store_true', help='of the images in PyTorch'
  )
  parser.add_argument('--compile', action='store_true', help='torch.compile too')
  parser.add_argument('--turns', type=int, default=9)
  parser.add_argument('--steps', type=int, default=3, help='steps a turn')
  arguments = parser.parse_args(argv)
  compiler.use_all_cores()
  compare(arguments)


if __name__ == '__main__':
  main()
