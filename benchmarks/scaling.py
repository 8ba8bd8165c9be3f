"""A training step on 1, 2, 4, ... devices: its time, and what it moves between them.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.scaling
      [--task=digits_mlp] [--optimizers=sgd,sam] [--batch_size=32] [--repeats=20]

Every device of the process takes its share of one batch. The all-reduces of the
compiled text that hold a whole gradient are counted, and the entries of all, beside
those of `benchmarks.cost_model`. Times are medians of steps in turn. Forced devices of
a CPU share its cores: their times tell what dividing a step costs, and not how it
scales.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax

import tasks
from benchmarks import collectives, cost_model, step_cost
from input_pipelines import DataError
from training import cli, compiler, methods, parallel, sharing, step
from training.problem import Problem


def compiled_step(config: Any, problem: Problem, number: int) -> tuple[Any, Any, Any]:
  """A step on some devices, its first state, and a batch."""
  replicas = parallel.DataParallel(number)
  shared = sharing.of(config, replicas.num_replicas)
  batches = problem.train.batches(
    config.batch_size, shards=(*replicas.axes, *shared.axes), seed=config.seed
  )
  stepper = step.Stepper(
    problem, config, batches.steps_per_epoch, shared, replicas.axis_name
  )
  init = jax.jit(stepper.init)(config.seed)
  state = replicas.place(replicas.replicate(init))
  batch = replicas.place(replicas.local(next(batches.epoch(0))))
  mapped = replicas.map(stepper.train, donate=True).lower(state, batch)
  return mapped.compile(), state, batch


def reductions(config: Any, number: int) -> int:
  """Gradients that a step reduces over some devices, by the cost model."""
  if number == 1:
    return 0
  if not methods.is_method(config.optimizer):
    return cost_model.METHODS['sgd'].reductions
  whole = sharing.of(config, number).whole
  name = 'sam' if whole else 'sam, a perturbation a device'
  return cost_model.METHODS[name].reductions


def compare(config: Any, problem: Problem, repeats: int) -> list[str]:
  """A row a number of devices."""
  numbers = [1]
  while 2 * numbers[-1] <= jax.local_device_count():
    numbers.append(2 * numbers[-1])
  programs = {n: compiled_step(config, problem, n) for n in numbers}
  runs = {n: step_cost.steps(*program) for n, program in programs.items()}
  times = step_cost.medians(runs, repeats)
  rows = []
  for n, (compiled, state, _) in programs.items():
    size = sum(x.size for x in jax.tree.leaves(state.params)) // (n if n > 1 else 1)
    found = [x.entries for x in collectives.of(compiled)]
    predicted = reductions(config, n)
    rows.append(
      f'  {config.optimizer:12}{n:8}{1e3 * times[n]:10.2f}{times[n] / times[1]:8.2f}'
      f'{sum(x >= size for x in found):8}{predicted:8}{sum(found):12,}'
      f'{predicted * size:12,}'
    )
  return rows


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--task', default='digits_mlp', help='a task of train.py')
  parser.add_argument('--manual_dir', default='', help="folder of the set's archive")
  parser.add_argument('--data_dir', default='', help='folder of prepared data sets')
  parser.add_argument('--model', help='changes to the network, as depth=16,width=4')
  parser.add_argument('--batch_size', type=int, help="unless the recipe's")
  parser.add_argument('--dtype', help="float32 or bfloat16, unless the recipe's")
  parser.add_argument('--optimizers', default='sgd,sam', help='by comma')
  parser.add_argument('--repeats', type=int, default=20, help='timed steps of each')
  arguments = parser.parse_args(argv)
  if arguments.repeats < 1:
    parser.error('--repeats must be at least 1')
  compiler.use_all_cores()
  given = step_cost.overrides(arguments)
  print(
    f'{arguments.task}, jax {jax.__version__} on {jax.devices()[0].device_kind}\n'
    f'  {"":12}{"":8}{"":10}{"":8}{"gradients":>16}{"entries":>24}\n'
    f'  {"":12}{"devices":>8}{"ms":>10}{"x":>8}{"found":>8}{"model":>8}{"found":>12}'
    f'{"model":>12}'
  )
  for name in arguments.optimizers.split(','):
    config = tasks.resolve(arguments.task, optimizer=name, **given)
    print('\n'.join(compare(config, tasks.build(config), arguments.repeats)))


if __name__ == '__main__':
  sys.exit(cli.run(lambda argv: main(argv[1:]), sys.argv, errors=(DataError,)))
