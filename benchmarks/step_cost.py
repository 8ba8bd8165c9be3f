"""What a sharpness-aware step costs beside the base optimizer's, and an HVP a gradient.

  python -m benchmarks.step_cost [--task=mutagenicity_gcn --manual_dir=DIR]
      [--model=depth=16,width=4] [--optimizers=sam,asam] [--repeats=30]

FLOPs and memory are the compiler's own count for the compiled step: memory is that of
arguments, results and temporaries, without what results take over from arguments;
`copies` is what a method adds to the base, in copies of the parameters. Times are
medians of interleaved runs on one batch of the task's recipe, each run a whole step
through the training loop's mapping, so that all meet the same state of the machine.
The peak is what a large matrix product of the same type reaches on the device, or
--peak_tflops.
"""

import argparse
import collections
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import sam_jax
import tasks
from input_pipelines import DataError
from training import cli, compiler, optimizers, parallel, sharing, step
from training import problem as problem_lib
from training.problem import Problem

_MIB = 1 << 20
# Sizes of a matrix product that keeps a device busy.
_PEAK_SIZES = {'cpu': 2048}
_PEAK_SIZE = 8192


class Phase(NamedTuple):
  """One compiled step of a method.

  Attributes:
    share: its share of all steps of a run; 1 but for periodic methods.
    flops: of one run.
    memory: bytes while it runs.
    run: takes one step.
  """

  share: float
  flops: float
  memory: int
  run: Callable[[], Any]


def phases(config: Any, problem: Problem, batch: Any) -> list[Phase]:
  """The compiled steps of a method, each with a state of its own."""
  replicas = parallel.DataParallel(num_devices=1)
  stepper = one_device(config, problem, replicas.axis_name)
  steps_per_epoch = stepper.steps_per_epoch
  init = jax.jit(stepper.init)
  total = config.epochs * steps_per_epoch
  counts = collections.Counter(
    optimizers.phase(config, steps_per_epoch, number) for number in range(total)
  )
  found = []
  for phase, count in counts.items():
    state = replicas.place(replicas.replicate(init(config.seed)))
    train_step = functools.partial(stepper.train, phase=phase)
    compiled = replicas.map(train_step, donate=True).lower(state, batch).compile()
    run = steps(compiled, state, batch)
    found.append(Phase(count / total, flops(compiled), memory(compiled), run))
  return found


def one_device(
  config: Any, problem: Problem, axis_name: str | None = None
) -> step.Stepper:
  """The steps of a configuration on one device."""
  steps_per_epoch = problem.train.batches(config.batch_size).steps_per_epoch
  return step.Stepper(problem, config, steps_per_epoch, sharing.of(config), axis_name)


def steps(compiled: Any, state: Any, batch: Any) -> Callable[[], Any]:
  """A function that takes the next of a run of steps over one batch."""

  def run():
    nonlocal state  # Given away to the step, as in training.
    state, metrics = compiled(state, batch)
    return state, metrics

  return run


def seconds(function: Callable[[], Any]) -> float:
  """Wall time of one call, until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def medians(functions: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
  """Median wall time of each, run in turn."""
  times = {name: [] for name in functions}
  for _ in range(repeats + 2):
    for name, function in functions.items():
      times[name].append(seconds(function))
  return {name: statistics.median(t[2:]) for name, t in times.items()}


def flops(compiled: Any) -> float:
  """The compiler's count for one run."""
  return compiled.cost_analysis()['flops']


def memory(compiled: Any) -> int:
  """The compiler's count of bytes while it runs."""
  found = compiled.memory_analysis()
  return (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    + found.temp_size_in_bytes
    - found.alias_size_in_bytes
  )


def measured_peak(dtype: str) -> float:
  """FLOP/s of a large matrix product."""
  size = _PEAK_SIZES.get(jax.default_backend(), _PEAK_SIZE)
  factor = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  product = jax.jit(jnp.matmul)
  best = min(seconds(lambda: product(factor, factor)) for _ in range(5))
  return 2 * size**3 / best


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
  """The fields of the configuration that the command line sets."""
  names = ('manual_dir', 'data_dir', 'model', 'batch_size', 'dtype')
  return {name: getattr(arguments, name) for name in names}


def compare_steps(arguments: argparse.Namespace, names: list[str]) -> None:
  """Prints a row a method: its time, FLOPs and memory, and each over the base's."""
  given = overrides(arguments)
  base = tasks.resolve(arguments.task, **given).base_optimizer
  found = {}
  for name in [base, *names]:
    config = tasks.resolve(
      arguments.task,
      optimizer=name,
      base_optimizer=base if name != base else None,
      **given,
    )
    problem = tasks.build(config)
    batch = next(problem.train.batches(config.batch_size, seed=0).epoch(0))
    found[name] = phases(config, problem, jax.device_put(batch))
  times = medians(
    {(name, i): x.run for name, steps in found.items() for i, x in enumerate(steps)},
    arguments.repeats,
  )
  costs = {
    name: Cost(
      sum(x.share * times[name, i] for i, x in enumerate(steps)),
      sum(x.share * x.flops for x in steps),
      max(x.memory for x in steps),
    )
    for name, steps in found.items()
  }
  params = problem.variables()['params']
  copy = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  peak = 1e12 * arguments.peak_tflops or measured_peak(config.dtype)
  print(
    f'{arguments.task}, a step of {config.batch_size} examples, {config.dtype}, over '
    f'{base}; peak {peak / 1e12:.3g} TFLOP/s'
  )
  print(table(costs, config.batch_size, copy, peak))


class Cost(NamedTuple):
  """What a step of a method takes on average, and at most of memory in bytes."""

  seconds: float
  flops: float
  memory: int


def table(costs: dict[str, Cost], batch_size: int, copy: int, peak: float) -> str:
  """A row a method; the first is the base.

  Args:
    costs: by method.
    batch_size: examples in a step.
    copy: bytes of the parameters.
    peak: FLOP/s of the device.
  """
  base = next(iter(costs.values()))
  rows = [
    f'  {"":14}{"ms":>10}{"x":>7}{"examples/s":>12}{"MFLOP":>11}{"x":>7}'
    f'{"MiB":>9}{"copies":>8}{"peak %":>8}'
  ]
  rows += [
    f'  {name:14}{1e3 * cost.seconds:10.2f}{cost.seconds / base.seconds:7.3f}'
    f'{batch_size / cost.seconds:12,.0f}{cost.flops / 1e6:11.1f}'
    f'{cost.flops / base.flops:7.3f}{cost.memory / _MIB:9.1f}'
    f'{(cost.memory - base.memory) / copy:8.2f}'
    f'{100 * cost.flops / cost.seconds / peak:8.2f}'
    for name, cost in costs.items()
  ]
  return '\n'.join(rows)


def compare_hvp(arguments: argparse.Namespace) -> None:
  """Prints exact Hessian-vector products beside a gradient, on one batch.

  Those of an operator share the linearized gradient, as in Lanczos; `sam_jax.hvp` alone
  takes it anew.
  """
  config = tasks.resolve(arguments.task, **overrides(arguments))
  problem = tasks.build(config)
  batch = next(problem.train.batches(arguments.hessian_batch_size, seed=0).epoch(0))
  batch = jax.tree.map(jax.device_put, batch)
  variables = problem.model.init(jax.random.key(0), problem.example_inputs)
  params, stats = variables['params'], variables.get('batch_stats', {})
  value = lambda p, batch: problem_lib.loss(
    problem, p, stats, batch, dtype=config.dtype
  )[0]
  vector = sam_jax.probes.gaussian(jax.random.key(1), params)
  gradient = jax.jit(jax.grad(value)).lower(params, batch).compile()
  product = (
    jax.jit(lambda p, v, b: sam_jax.hvp(lambda p: value(p, b), p, v))
    .lower(params, vector, batch)
    .compile()
  )
  # What the operator keeps of a batch, and what a product then computes.
  linear = jax.jit(lambda p, b: jax.linearize(jax.grad(lambda p: value(p, b)), p)[1])
  kept = jax.jit(lambda f, v: f(v)).lower(linear(params, batch), vector).compile()
  costs = {'sam_jax.hvp': flops(product), 'operator': flops(kept)}
  operator = sam_jax.curvature.hessian(value, params, [batch])
  times = medians(
    {
      'gradient': lambda: gradient(params, batch),
      'sam_jax.hvp': lambda: product(params, vector, batch),
      'operator': lambda: operator.matvec(vector),
    },
    arguments.repeats,
  )
  print(
    f'{arguments.task}, a batch of {arguments.hessian_batch_size}: gradient '
    f'{1e3 * times["gradient"]:.2f} ms; a product over it, in time and FLOPs'
  )
  for name, cost in costs.items():
    ratio, cost_ratio = times[name] / times['gradient'], cost / flops(gradient)
    print(f'  {name:16s} {1e3 * times[name]:9.2f} ms  x{ratio:.3f}  x{cost_ratio:.3f}')


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and prints both tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--task', default='digits_mlp', help='a task of train.py')
  parser.add_argument('--manual_dir', default='', help="folder of the set's archive")
  parser.add_argument('--data_dir', default='', help='folder of prepared data sets')
  parser.add_argument('--model', help='changes to the network, as depth=16,width=4')
  parser.add_argument('--batch_size', type=int, help="unless the recipe's")
  parser.add_argument('--dtype', help="float32 or bfloat16, unless the recipe's")
  parser.add_argument(
    '--peak_tflops', type=float, default=0.0, help="the device's; 0: measured"
  )
  parser.add_argument('--optimizers', default='sam,asam', help='methods, by comma')
  parser.add_argument(
    '--hessian_batch_size', type=int, default=128, help='of the HVP; 0: none'
  )
  parser.add_argument('--repeats', type=int, default=30, help='timed runs of each')
  arguments = parser.parse_args(argv)
  if arguments.repeats < 1:
    parser.error('--repeats must be at least 1')
  compiler.use_all_cores()
  print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}')
  if arguments.optimizers:
    compare_steps(arguments, arguments.optimizers.split(','))
  if arguments.hessian_batch_size:
    compare_hvp(arguments)


if __name__ == '__main__':
  sys.exit(cli.run(lambda argv: main(argv[1:]), sys.argv, errors=(DataError,)))
