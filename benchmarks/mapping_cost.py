"""One device: a step under a plain jit beside the same step under a pmap over one.

  python -m benchmarks.mapping_cost [--task=digits_mlp] [--optimizer=sam] [--steps=20]
      [--repeats=30]

Under jit the step takes whole batches and has no axis; under pmap every array has a
leading axis of 1 and the step averages over it. Both start from the same state and take
turns of some steps in a row on one batch, with the metrics of a step read while the
next one runs, as in training. The medians are compared.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

import tasks
from benchmarks import step_cost
from input_pipelines import DataError
from training import cli, compiler, parallel


def turn(train_step: Any, state: Any, batch: Any, steps: int) -> Callable[[], Any]:
  """A function that takes so many steps and reads the metrics of each."""

  def run():
    nonlocal state  # Given away to the step, as in training.
    before = None
    for _ in range(steps):
      state, metrics = train_step(state, batch)
      if before is not None:
        jax.device_get(before)
      before = metrics
    jax.device_get(before)
    return state

  return run


def turns(config: Any, steps: int) -> dict[str, Callable[[], Any]]:
  """A turn of each mapping, by name."""
  problem = tasks.build(config)
  batch = next(problem.train.batches(config.batch_size, seed=0).epoch(0))
  plain = step_cost.one_device(config, problem)
  mapped = step_cost.one_device(config, problem, parallel.AXIS)
  devices = jax.local_devices()[:1]
  init = jax.jit(plain.init)
  leading = lambda tree: jax.pmap(lambda x: x, devices=devices)(
    jax.tree.map(lambda leaf: leaf[None], tree)
  )
  return {
    'jit': turn(
      jax.jit(plain.train, donate_argnums=0),
      init(config.seed),
      jax.device_put(batch, devices[0]),
      steps,
    ),
    'pmap': turn(
      jax.pmap(
        mapped.train, axis_name=parallel.AXIS, devices=devices, donate_argnums=0
      ),
      leading(init(config.seed)),
      leading(batch),
      steps,
    ),
  }


def main(argv: Sequence[str] | None = None) -> None:
  """Prints milliseconds of a step under each mapping, and their ratio."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--task', default='digits_mlp', help='a task of train.py')
  parser.add_argument('--manual_dir', default='', help="folder of the set's archive")
  parser.add_argument('--data_dir', default='', help='folder of prepared data sets')
  parser.add_argument('--model', help='changes to the network, as depth=16,width=4')
  parser.add_argument('--batch_size', type=int, help="unless the recipe's")
  parser.add_argument('--dtype', help="float32 or bfloat16, unless the recipe's")
  parser.add_argument('--optimizer', default='sam', help='method or base optimizer')
  parser.add_argument('--steps', type=int, default=20, help='steps in a turn')
  parser.add_argument('--repeats', type=int, default=30, help='timed turns of each')
  arguments = parser.parse_args(argv)
  if min(arguments.steps, arguments.repeats) < 1:
    parser.error('--steps and --repeats must be at least 1')
  compiler.use_all_cores()
  config = tasks.resolve(
    arguments.task,
    optimizer=arguments.optimizer,
    **step_cost.overrides(arguments),
  )
  found = step_cost.medians(turns(config, arguments.steps), arguments.repeats)
  jit, pmap = (1e3 * found[name] / arguments.steps for name in ('jit', 'pmap'))
  print(
    f'{arguments.task}, {arguments.optimizer}, jax {jax.__version__} on '
    f'{jax.devices()[0].device_kind}: a step under jit {jit:.3f} ms, under pmap '
    f'{pmap:.3f} ms, jit / pmap {jit / pmap:.3f}'
  )


if __name__ == '__main__':
  sys.exit(cli.run(lambda argv: main(argv[1:]), sys.argv, errors=(DataError,)))
