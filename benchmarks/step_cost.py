"""What a sharpness-aware step costs beside the base optimizer's, and an HVP a gradient.

  python -m benchmarks.step_cost [--task=mutagenicity_gcn --manual_dir=DIR]
      [--model=depth=16,width=4] [--optimizers=sam,asam] [--repeats=30]

FLOPs are the compiler's own count of the compiled step. Times are medians of
interleaved runs on one batch of the task's recipe, each run a whole step through the
training loop's mapping, so that both meet the same state of the machine.
"""

import argparse
import collections
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import sam_jax
import tasks
from training import losses, optimizers, parallel, step


def compiled_steps(
  config: Any, workload: Any, shards: Any
) -> tuple[list[tuple[float, Any]], Any]:
  """The compiled steps of a method, each with its share of all steps, and a state."""
  replicas = parallel.DataParallel(num_devices=1)
  steps_per_epoch = workload.train.batches(
    config.batch_size, shards=(1,), seed=0
  ).steps_per_epoch
  tx = optimizers.build(config, steps_per_epoch)
  state = replicas.replicate(
    step.init_state(workload.model, tx, workload.example_inputs, config.seed)
  )
  compiled = []
  total = config.epochs * steps_per_epoch
  phases = collections.Counter(
    optimizers.phase(config, steps_per_epoch, number) for number in range(total)
  )
  for phase, count in phases.items():
    train_step = step.make_train_step(
      workload.model, tx, config, phase=phase, augment=workload.augment
    )
    run = replicas.map(train_step).lower(state, shards).compile()
    compiled.append((count / total, run))
  return compiled, state


def seconds(function: Callable[[], Any]) -> float:
  """Wall time of one call, until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
  """Median wall time of each, run in turn."""
  times = {name: [] for name in functions}
  for _ in range(repeats + 2):
    for name, function in functions.items():
      times[name].append(seconds(function))
  return {name: statistics.median(t[2:]) for name, t in times.items()}


def flops(compiled: Any) -> float:
  """The compiler's count for one run."""
  return compiled.cost_analysis()['flops']


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
  """The fields of the configuration that the command line sets."""
  names = ('manual_dir', 'data_dir', 'model', 'batch_size')
  return {name: getattr(arguments, name) for name in names}


def compare_steps(arguments: argparse.Namespace, names: list[str]) -> None:
  """Prints a row a method: milliseconds and FLOPs a step, and both over the base's."""
  given = overrides(arguments)
  base = tasks.resolve(arguments.task, **given).base_optimizer
  costs, runs, shares = {}, {}, {}
  for name in [base, *names]:
    config = tasks.resolve(
      arguments.task,
      optimizer=name,
      base_optimizer=base if name != base else None,
      **given,
    )
    workload = tasks.build(config)
    batches = workload.train.batches(config.batch_size, shards=(1,), seed=0)
    shards = jax.tree.map(jax.device_put, next(batches.epoch(0)))
    compiled, state = compiled_steps(config, workload, shards)
    costs[name] = sum(share * flops(run) for share, run in compiled)
    for index, (share, run) in enumerate(compiled):
      runs[name, index] = functools.partial(run, state, shards)
      shares[name, index] = share
  times = medians(runs, arguments.repeats)
  per_step = dict.fromkeys(costs, 0.0)
  for key, time_of_phase in times.items():
    per_step[key[0]] += shares[key] * time_of_phase
  print(f'{arguments.task}, one step, over {base}')
  for name, cost in costs.items():
    time_of_step = per_step[name]
    print(
      f'  {name:16s} {1e3 * time_of_step:9.2f} ms  x{time_of_step / per_step[base]:.3f}'
      f'  {cost / 1e6:10.1f} MFLOP  x{cost / costs[base]:.3f}'
    )


def compare_hvp(arguments: argparse.Namespace) -> None:
  """Prints exact Hessian-vector products beside a gradient, on one batch.

  Those of an operator share the linearized gradient, as in Lanczos; `sam_jax.hvp` alone
  takes it anew.
  """
  config = tasks.resolve(arguments.task, **overrides(arguments))
  workload = tasks.build(config)
  batch = next(workload.train.batches(arguments.hessian_batch_size, seed=0).epoch(0))
  batch = jax.tree.map(jax.device_put, batch)
  variables = workload.model.init(jax.random.key(0), workload.example_inputs)
  params, stats = variables['params'], variables.get('batch_stats', {})
  loss = losses.loss_fn(workload.model, config)
  value = lambda p, batch: loss(p, stats, batch)[0]
  vector = sam_jax.probes.gaussian(jax.random.key(1), params)
  gradient = jax.jit(jax.grad(value)).lower(params, batch).compile()
  product = (
    jax.jit(lambda p, v, b: sam_jax.hvp(lambda p: value(p, b), p, v))
    .lower(params, vector, batch)
    .compile()
  )
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
    f'{1e3 * times["gradient"]:.2f} ms, FLOPs of sam_jax.hvp over it '
    f'{flops(product) / flops(gradient):.3f}'
  )
  for name in ('sam_jax.hvp', 'operator'):
    ratio = times[name] / times['gradient']
    print(f'  {name:16s} {1e3 * times[name]:9.2f} ms  x{ratio:.3f}')


def main() -> None:
  """Parses the command line and prints both tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--task', default='digits_mlp', help='a task of train.py')
  parser.add_argument('--manual_dir', default='', help="folder of the set's archive")
  parser.add_argument('--data_dir', default='', help='folder of prepared data sets')
  parser.add_argument('--model', help='changes to the network, as depth=16,width=4')
  parser.add_argument('--batch_size', type=int, help="unless the recipe's")
  parser.add_argument('--optimizers', default='sam,asam', help='methods, by comma')
  parser.add_argument(
    '--hessian_batch_size', type=int, default=128, help="eval_hessian.py's batch"
  )
  parser.add_argument('--repeats', type=int, default=30, help='timed runs of each')
  arguments = parser.parse_args()
  print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}')
  if arguments.optimizers:
    compare_steps(arguments, arguments.optimizers.split(','))
  compare_hvp(arguments)


if __name__ == '__main__':
  main()
