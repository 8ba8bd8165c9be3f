"""Trains a network, with or without sharpness-aware minimization.

  python train.py                                     the embedded digits, with SGD
  python train.py --optimizer=sam --rho=0.05          the same with SAM
  python train.py --optimizer=sgd,sam --seeds=3       a sweep: a table and a figure
  python train.py --task=mutagenicity_gcn --manual_dir=DIR --optimizer=sam

A run that was stopped continues when the same command is given again.
"""

from __future__ import annotations

import pathlib
import sys
import textwrap
from collections.abc import Sequence

import tasks
from input_pipelines import DataError
from training import cli, compiler, loop, optimizers, parallel, summary, sweep
from training import config as config_lib
from training.errors import UsageError


def _named_task(argv: Sequence[str]) -> str:
  """The task that a command line names, before it is parsed; '' if it names none."""
  flag = '--task='
  named = [argument[len(flag) :] for argument in argv if argument.startswith(flag)]
  return named[-1] if named else ''


def _define_flags(task: str) -> cli.Flags:
  flags = cli.Flags()
  flags.heading('Flags of a run; unset, the task decides (--task=NAME --help tells)')
  recipe = tasks.resolve(task) if task else None
  flags.define_config(lists=('optimizer', 'rho'), recipe=recipe)
  flags.heading('Several runs')
  flags.define('seeds', 'int', 'runs of each kind, with seeds from --seed on')
  flags.define(
    'sharpness', 'bool', 'measure lambda_max after each run of a sweep', True
  )
  flags.heading('This start')
  flags.define('workdir', 'str', "folder of the run's files", 'runs/TASK_OPTIMIZER')
  flags.define('timing', 'bool', 'write clock times into metrics.jsonl', True)
  flags.define('cache', 'bool', 'keep compiled programs in ~/.cache/sam_jax', True)
  flags.define('devices', 'int', 'devices of this process to use; 0: all', 0)
  flags.define(
    'coordinator',
    'str',
    "several processes: host:port of the first, or 'cluster' to ask the cluster",
    '',
  )
  flags.define('num_processes', 'int', 'several processes: how many', 1)
  flags.define('process_id', 'int', 'several processes: which one this is', 0)
  return flags


def _usage(task: str) -> str:
  """The script's own text, or that of a task."""
  names = {
    'Tasks': tasks.TASKS,
    'Methods': optimizers.METHODS,
    'Base optimizers': optimizers.BASES,
  }
  lists = (
    textwrap.fill(f'{kind}: {", ".join(found)}.', 88, subsequent_indent='  ')
    for kind, found in names.items()
  )
  about = tasks.load(task).__doc__ if task else __doc__
  return about + '\n' + '\n'.join(lists)


def main(argv: Sequence[str]) -> None:
  """Trains what the flags say."""
  named = _named_task(argv)
  flags = _define_flags(named).parse(argv, _usage(named))
  overrides = cli.config_overrides(flags)
  task = overrides.pop('task', 'digits_mlp')
  methods = cli.entries('optimizer', overrides.pop('optimizer', None)) or [None]
  radii = cli.numbers('rho', overrides.pop('rho', None)) or [None]
  points = sweep.points(
    lambda **fields: tasks.resolve(task, **overrides, **fields),
    methods,
    radii,
    flags.seeds,
  )
  optimizers.refuse_unheeded(overrides, {p.optimizer for p in points.values()})
  if flags['workdir'].present and not flags.workdir:
    raise UsageError('--workdir= is empty: give a folder.')
  compiler.use_all_cores()
  if flags.cache:
    compiler.keep_programs()
  parallel.initialize(flags.coordinator, flags.num_processes, flags.process_id)
  options = {'num_devices': flags.devices, 'timing': flags.timing}
  name = next(iter(points.values())).optimizer
  name = name if len(points) == 1 else 'sweep'
  workdir = pathlib.Path(
    flags.workdir if flags['workdir'].present else f'runs/{task}_{name}'
  )
  if list(points) != ['']:
    sweep.run(points, tasks.build, workdir, sharpness=flags.sharpness, **options)
    return
  config = points['']
  config_lib.check(config, workdir)
  finished = summary.read(workdir)
  if not finished:
    finished = loop.train(config, tasks.build(config), workdir, **options)
  if finished:
    print(f'{summary.describe(finished)}\n  {workdir}/')


if __name__ == '__main__':
  sys.exit(cli.run(main, sys.argv, errors=(DataError,)))
