"""What a point of a loss surface costs beside one forward pass over the same examples.

  python -m benchmarks.landscape_cost --task=mutagenicity_gcn --manual_dir=DIR
      [--model=depth=16,width=2] [--num_examples=1000] [--points=31]

Rows of the surface and as many forward passes (the loss, compiled, batch by batch) are
timed in turn; the medians are compared.
"""

import argparse
import statistics
import sys
import time

import jax
import numpy as np

import sam_jax
import tasks
from input_pipelines import DataError
from training import cli, compiler
from training import problem as problem_lib


def main() -> None:
  """Prints milliseconds a point, milliseconds a forward pass, and their ratio."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--task', default='digits_mlp', help='a task of train.py')
  parser.add_argument('--manual_dir', default='', help="folder of the set's archive")
  parser.add_argument('--data_dir', default='', help='folder of prepared data sets')
  parser.add_argument('--model', help='changes to the network, as depth=16,width=2')
  parser.add_argument('--num_examples', type=int, default=0, help='0: the whole split')
  parser.add_argument('--points', type=int, default=31, help='points a side')
  parser.add_argument('--rows', type=int, default=0, help='rows to time; 0: all')
  arguments = parser.parse_args()
  compiler.use_all_cores()
  names = ('manual_dir', 'data_dir', 'model')
  config = tasks.resolve(
    arguments.task, **{name: getattr(arguments, name) for name in names}
  )
  problem = tasks.build(config)
  batches, left = [], arguments.num_examples or problem.train.num_examples
  for batch in problem.train.batches(128, seed=0).epoch(0):
    if left > 0:
      batches.append(jax.tree.map(jax.device_put, batch))
      left -= float(problem_lib.num_examples(batch))
  variables = problem.model.init(jax.random.key(0), problem.example_inputs)
  params, stats = variables['params'], variables.get('batch_stats', {})
  loss = lambda p, batch: problem_lib.loss(
    problem, p, stats, batch, dtype=config.dtype
  )[0]
  forward = jax.jit(loss)
  directions = sam_jax.landscape.random_directions(jax.random.key(1), params)
  axis = np.linspace(-1, 1, arguments.points)
  times = {'point': [], 'forward': []}
  for y in (axis[0], *axis[: arguments.rows or None]):
    start = time.perf_counter()
    sam_jax.landscape.surface(
      loss, params, directions, axis, [y], batches, weight=problem_lib.num_examples
    )
    times['point'].append((time.perf_counter() - start) / len(axis))
    start = time.perf_counter()
    for _ in axis:
      with jax.default_matmul_precision('highest'):
        jax.block_until_ready([forward(params, batch) for batch in batches])
    times['forward'].append((time.perf_counter() - start) / len(axis))
  point, once = (1e3 * statistics.median(t[1:]) for t in times.values())
  print(
    f'{arguments.task}: {len(times["point"]) - 1} rows of {len(axis)} points, a point '
    f'{point:.1f} ms, a forward pass {once:.1f} ms, ratio {point / once:.3f}'
  )


if __name__ == '__main__':
  sys.exit(cli.run(lambda _: main(), sys.argv, errors=(DataError,)))
