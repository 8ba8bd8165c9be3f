"""Seconds from the start of a process to the first step, for one or two source trees.

  python -m benchmarks.start_up [--tree=A,B] [--repeats=5] [--nocache]
  python -m benchmarks.start_up [--tree=A,B] --hessian

A run is `python train.py --epochs=1 --workdir=NEW` as a whole process, and its first
step has ended when the first line of progress arrives. With --hessian it is
`python eval_hessian.py --steps=all` over the ten checkpoints of a short run, which each
tree trains for itself before, and the whole process is timed. Trees take turns; medians
are compared. The first turn is not counted: it fills the caches that later ones find.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

_ROOT = pathlib.Path(__file__).parents[1]
_PROGRESS = 'epoch 1/'
# Ten checkpoints, and what is measured of them.
_CHECKPOINTS = 10
_RUN = ('--epochs=1', '--checkpoint_every=4', f'--keep_checkpoints={_CHECKPOINTS}')
_MEASURED = ('--top_k=1', '--num_probes=1', '--num_matvecs=10', '--landscape_points=5')


def command(script: str, *flags: str) -> list[str]:
  """The command line of a script of a tree."""
  return [sys.executable, script, *flags]


def first_step(tree: pathlib.Path, folder: pathlib.Path, flags: Sequence[str]) -> float:
  """Seconds until train.py has taken its first step; it is then ended.

  Args:
    tree: a source tree.
    folder: of the run, new.
    flags: further flags of train.py.

  Raises:
    SystemExit: it ended before.
  """
  start = time.perf_counter()
  process = subprocess.Popen(
    command('train.py', '--epochs=1', f'--workdir={folder}', *flags),
    cwd=tree,
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    for line in process.stdout:
      if line.startswith(_PROGRESS):
        seconds = time.perf_counter() - start
        process.kill()
        return seconds
  raise SystemExit(f'--tree={tree}: train.py ended without a step, see above.')


def whole(tree: pathlib.Path, script: str, flags: Sequence[str]) -> float:
  """Seconds of a script from its start to its end."""
  start = time.perf_counter()
  process = subprocess.run(
    command(script, *flags), cwd=tree, stdout=subprocess.DEVNULL, check=False
  )
  if process.returncode:
    raise SystemExit(f'--tree={tree}: {script} failed, see above.')
  return time.perf_counter() - start


def checkpoints_of(tree: pathlib.Path, folder: pathlib.Path) -> None:
  """Trains a run of ten checkpoints."""
  whole(tree, 'train.py', [f'--workdir={folder}', *_RUN])


def take_turns(runs: dict[str, Callable[[int], float]], repeats: int) -> dict:
  """Median seconds of each, which take turns; the first turn is not counted."""
  times = {name: [] for name in runs}
  for turn in range(repeats + 1):
    for name, run in runs.items():
      times[name].append(run(turn))
  return {name: statistics.median(found[1:]) for name, found in times.items()}


def compare(arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, float]:
  """Median seconds by tree; files of runs lie in a folder."""
  cache = [] if arguments.cache else ['--nocache']
  runs = {}
  for index, name in enumerate(arguments.tree):
    tree = pathlib.Path(name).absolute()
    own = folder / str(index)
    if not arguments.hessian:
      runs[name] = lambda turn, tree=tree, own=own: first_step(
        tree, own / str(turn), cache
      )
      continue
    checkpoints_of(tree, own)
    # What was measured with the same flags is not measured again: a seed a turn.
    runs[name] = lambda turn, tree=tree, own=own: whole(
      tree,
      'eval_hessian.py',
      [f'--workdir={own}', '--steps=all', f'--seed={turn}', *_MEASURED, *cache],
    )
  return take_turns(runs, arguments.repeats)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the median of each tree, and the ratio of each to the first."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--tree',
    type=lambda text: text.split(','),
    default=[os.fspath(_ROOT)],
    help='source trees, by comma; default: this one',
  )
  parser.add_argument('--repeats', type=int, default=5, help='timed runs of each')
  parser.add_argument('--hessian', action='store_true', help='ten checkpoints instead')
  parser.add_argument(
    '--nocache', dest='cache', action='store_false', help='compile anew in each run'
  )
  arguments = parser.parse_args(argv)
  if arguments.repeats < 1:
    parser.error('--repeats must be at least 1')
  with tempfile.TemporaryDirectory() as folder:
    found = compare(arguments, pathlib.Path(folder))
  what = 'ten checkpoints' if arguments.hessian else 'first step'
  base = next(iter(found.values()))
  for name, seconds in found.items():
    print(f'{what}: {seconds:8.2f} s  x{seconds / base:.3f}  {name}')


if __name__ == '__main__':
  main()
