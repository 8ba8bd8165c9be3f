"""Trains a network, with or without sharpness-aware minimization.

  python train.py                                     the embedded digits, with SGD
  python train.py --optimizer=sam --rho=0.05          the same with SAM
  python train.py --optimizer=sgd,sam --seeds=3       a sweep: a table and a figure
  python train.py --learning_rate=.1,.3 --batch_size=16,32       a sweep over a grid
  python train.py --optimizer=sam --rho=.02,.05,.1 --seeds=8 --population  all at once
  python train.py --task=mutagenicity_gcn --manual_dir=DIR --optimizer=sam
  python train.py --task=my_task.py                   a task of your own

A run that was stopped continues when the same command is given again.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import measurements
import reports
import tasks
from input_pipelines import DataError
from training import (
  checkpoints,
  cli,
  compiler,
  extension,
  hooks,
  loop,
  members,
  meshes,
  methods,
  metrics,
  optimizers,
  parallel,
  peers,
  population,
  summary,
  sweep,
)
from training import config as config_lib
from training.errors import UsageError

# Flags of what is measured during training.
_MEASURED = (
  'measure',
  'measure_every',
  'track',
  'track_every',
  'track_on',
  'track_share',
)
_DONE = {'measure': 'measured', 'track': 'tracked'}


def _methods(argv: Sequence[str]) -> list[str]:
  """The library's methods and those of one's own that a command line names."""
  own = [name for name in cli.named(argv, 'optimizer').split(',') if name]
  return [*methods.found(), *(n for n in own if n.endswith('.py') or '.' in n)]


def _define_flags(task: str, names: Sequence[str]) -> cli.Flags:
  flags = cli.Flags()
  flags.heading(
    'Flags of a run; unset, the task decides (--task=NAME --help tells). Several\n'
    'values, as --rho=.05,.1 or --schedule=step,cosine, make a sweep'
  )
  recipe = tasks.resolve(task) if task else None
  network = getattr(tasks.load(task), 'NETWORK', None) if task else None
  keys = tasks.networks.described(network) if network is not None else ''
  flags.define_config(recipe=recipe, keys=keys)
  flags.heading('Arguments of methods; unset, the task or the method decides')
  flags.define_methods(names)
  flags.define(
    'sync_perturbation', 'bool', 'one perturbation for the whole batch: the default'
  )
  flags.heading('Several runs')
  flags.define('seeds', 'int', 'runs of each kind, with seeds from --seed on')
  flags.define(
    'population',
    'bool',
    'train runs that differ in seed, rho, learning rate and weight decay only as one '
    'program, all at once',
  )
  flags.define(
    'population_gib',
    'float',
    'memory that --population may take; unset, most of what the devices have',
  )
  flags.define(
    'population_mapping',
    'str',
    'vmap computes the members of --population side by side, map one after the other '
    'in a loop; unset, vmap on accelerators, and on a CPU the faster',
  )
  flags.define(
    'sharpness', 'bool', 'measure lambda_max after each run of a sweep', True
  )
  flags.heading('Measured during training, into metrics.jsonl')
  flags.define('measure', 'list', f'any of {", ".join(measurements.hooks())}')
  flags.define('measure_every', 'int', 'steps between two; 0: each epoch', 0)
  flags.define('track', 'list', f'any of {", ".join(measurements.trackers())}')
  flags.define('track_every', 'int', 'steps between two; 0: each epoch', 0)
  flags.define(
    'track_on',
    'str',
    'the examples of --track=edges: batch (those of the step that comes), train (all), '
    'or a number',
    'batch',
  )
  flags.define(
    'track_share',
    'float',
    "largest share of a run's gradients that --track=edges may spend, which it "
    'stretches --track_every for; 0: no bound',
    0.0,
  )
  flags.heading('This start')
  flags.define('workdir', 'str', "folder of the run's files", 'runs/TASK_OPTIMIZER')
  flags.define('timing', 'bool', 'write clock times into metrics.jsonl', True)
  flags.define('cache', 'bool', 'keep compiled programs in ~/.cache/sam_jax', True)
  flags.define('devices', 'int', 'devices of this process to use; 0: all', 0)
  flags.define(
    'mesh',
    'str',
    'splits the parameters over the devices of fsdp, and the batch over all, as '
    'data:4,fsdp:2; unset, every device has all parameters',
  )
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
    'Tasks': tasks.names(),
    'Methods': methods.found(),
    'Base optimizers': optimizers.BASES,
  }
  lists = (
    textwrap.fill(f'{kind}: {", ".join(found)}.', 88, subsequent_indent='  ')
    for kind, found in names.items()
  )
  about = (tasks.load(task).__doc__ or f'The task {task}.') if task else __doc__
  return about + '\n' + '\n'.join(lists)


def _points(
  flags, given: dict[str, Any], swept: dict[str, list[Any]], task: str
) -> dict[str, config_lib.Config]:
  """The configurations of the runs by their folder."""
  sweep.refuse(list(swept))
  if flags.sync_perturbation and (
    given.pop('m_sharpness', None) or swept.pop('m_sharpness', None)
  ):
    raise UsageError(
      '--sync_perturbation makes one group of the whole batch, --m_sharpness many: '
      'choose one.'
    )
  kinds = [swept.pop(n, [given.pop(n, None)]) for n in ('optimizer', 'rho')]
  points = sweep.points(
    # The seed of a run in a sweep takes the place of the one that is given.
    lambda **fields: tasks.resolve(task, **{**given, **fields}),
    *kinds,
    flags.seeds,
    swept,
  )
  configs = points.values()
  optimizers.refuse_unheeded([*given, *swept], configs)
  chosen = sorted({config.optimizer for config in configs})
  if flags.sync_perturbation and not any(map(methods.is_method, chosen)):
    raise UsageError(
      f'--sync_perturbation has no effect with --optimizer={",".join(chosen)}.'
    )
  return points


def _check_measured(flags, config, workdir: pathlib.Path, *, finished: bool) -> None:
  """Checks what is to be measured during training, before data are read.

  Warns of what a finished run did not measure.
  """
  named = {n: cli.entries(n, flags[n].value) or [] for n in ('measure', 'track')}
  if flags.measure_every < 0:
    raise UsageError(f'--measure_every={flags.measure_every}: must not be negative.')
  for flag in _MEASURED:
    kind = flag.partition('_')[0]
    if flags[flag].present and not named[kind]:
      raise UsageError(f'--{flag}={flags[flag].value} has no effect without --{kind}.')
  for name in ('track_on', 'track_share'):
    if flags[name].present and not measurements.adjustable(named['track']):
      tracked = ','.join(named['track'])
      raise UsageError(
        f'--{name} has no effect with --track={tracked}: it belongs to edges.'
      )
  for name in named['measure']:
    measurements.check_hook(name, flags.measure_every)
  lines = metrics.read(workdir) if finished else []
  options = flags.track_every, flags.track_on, flags.track_share
  for name in named['track']:
    own = [line for line in lines if line['split'] == name]
    measurements.check_tracker(name, config, *options, own)
  known = {line['split'] for line in lines}
  for flag, done in (('measure', 'measured'), ('track', 'tracked')):
    for name in set(named[flag]) - known if finished else ():
      warnings.warn(
        f'--{flag}={name}: the run in {workdir} is finished and nothing was {done} '
        'while it trained: choose another --workdir to train again.',
        stacklevel=2,
      )


def _hooks(flags, problem, config) -> list[hooks.Hook]:
  """What is measured during training, of checked flags."""
  every = flags.measure_every
  options = flags.track_every, flags.track_on, flags.track_share
  return [
    *(measurements.hook(name, problem, config, every) for name in flags.measure or ()),
    *(
      measurements.tracker(name, problem, config, *options)
      for name in flags.track or ()
    ),
  ]


def _lambda_max(config, problem, workdir: pathlib.Path) -> dict[str, Any]:
  """The largest Hessian eigenvalue of a finished run, measured once."""
  path = workdir / 'sharpness.json'
  try:
    return {'lambda_max': json.loads(path.read_text())['lambda_max']}
  except (FileNotFoundError, ValueError, KeyError):  # Not measured yet, or damaged.
    params, batch_stats, _ = checkpoints.load_variables(workdir, problem)
    found = measurements.lambda_max(problem, params, batch_stats)
    config_lib.write_json(path, found)
  return {'lambda_max': found['lambda_max']}


def _check_population(flags, *, single: bool) -> None:
  """Checks the flags of populations, before anything is read."""
  gib, mapping = flags.population_gib, flags.population_mapping
  for name in ('population_gib', 'population_mapping'):
    if flags[name].present and not flags.population:
      raise UsageError(
        f'--{name}={flags[name].value} has no effect without --population.'
      )
  if mapping is not None:
    config_lib.require_choice('population_mapping', mapping, members.MAPPINGS)
  if gib is not None and not 0 < gib < math.inf:
    raise UsageError(f'--population_gib={gib}: must be a positive number of GiB.')
  if not flags.population:
    return
  if single:
    raise UsageError(
      '--population has no effect on a single run: give several values, as '
      '--rho=.05,.1, or --seeds.'
    )
  if flags.mesh is not None:
    raise UsageError(
      f'--mesh={flags.mesh} splits one network, and --population trains many side by '
      'side: leave out one of them.'
    )
  if flags.num_processes != 1 or flags.coordinator:
    raise UsageError(
      '--population trains in one process: leave out --coordinator and --num_processes.'
    )


def _sweep(points, swept, workdir: pathlib.Path, flags, options) -> None:
  """Trains and compares several runs."""
  for name in _MEASURED:
    if flags[name].present:
      raise UsageError(f'--{name} is for a single run: a sweep measures its ends.')
  measure = _lambda_max if flags.sharpness else None
  together = population.Options(
    flags.population_gib, flags.population_mapping, flags.devices, flags.timing
  )
  run = functools.partial(
    sweep.run,
    swept=swept,
    measure=measure,
    population=together if flags.population else None,
    **options,
  )
  if run(points, tasks.build, workdir):
    print(f'\n{reports.sweep.write(workdir)}\n{workdir}/')


def main(argv: Sequence[str]) -> None:
  """Trains what the flags say."""
  named, known = cli.named(argv, 'task'), _methods(argv)
  defined = _define_flags(named, known)
  flags = defined.parse(argv, lambda: _usage(named))
  given, swept = defined.split(known)
  task = given.pop('task', 'digits_mlp')
  points = _points(flags, given, swept, task)
  if flags['workdir'].present and not flags.workdir:
    raise UsageError('--workdir= is empty: give a folder.')
  if flags.mesh is not None:
    meshes.parse(flags.mesh)
  _check_population(flags, single=list(points) == [''])
  compiler.use_all_cores()
  if flags.cache:
    compiler.keep_programs()
  parallel.initialize(flags.coordinator, flags.num_processes, flags.process_id)
  parallel.check_same(points, mesh=flags.mesh)
  options = {
    'num_devices': flags.devices,
    'mesh': flags.mesh,
    'timing': flags.timing,
  }
  first = next(iter(points.values()))
  name = config_lib.short(first.optimizer) if len(points) == 1 else 'sweep'
  workdir = pathlib.Path(
    flags.workdir
    if flags['workdir'].present
    else f'runs/{config_lib.short(task)}_{name}'
  )
  if list(points) != ['']:
    _sweep(points, list(swept), workdir, flags, options)
    return
  extension.check(first, workdir)
  finished = extension.finished(first, workdir)
  _check_measured(flags, first, workdir, finished=bool(finished))
  # Every process does what the primary one sees, whose folder others may not have.
  if not parallel.broadcast_json(bool(finished)):
    problem = tasks.build(first)
    measured = _hooks(flags, problem, first)
    finished = loop.train(first, problem, workdir, hooks=measured, **options)
  if finished and parallel.is_primary():
    print(f'{summary.describe(finished)}\n  {workdir}/')


if __name__ == '__main__':
  sys.exit(peers.together(cli.run, main, sys.argv, errors=(DataError,)))
