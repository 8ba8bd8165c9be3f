"""Measures how sharp trained networks are, and compares them.

  python eval_hessian.py --workdir=runs/sgd
  python eval_hessian.py --workdir=runs/sgd,runs/sam --out=runs/compare
  python eval_hessian.py --workdir='runs/sweep/*/seed_*' --out=runs/compare
  python eval_hessian.py --workdir=runs/sgd --measure=eigenvalues,trace

Each --workdir is that of a train.py run; its newest checkpoint is measured. Its folder
hessian/ gets summary.json (the extreme eigenvalues of the Hessian of the training loss
with their residuals, trace, adaptive sharpness), spectrum.npz, spectral_density.png,
landscape.npz, landscape.png and report.html, which holds all of it in one file. With
several runs --out gets comparison.md, report.html and figures side by side; runs that
differ in their seed only are averaged. --steps measures several checkpoints of each run
instead: its sharpness over training. What was measured before with the same flags is
not measured again, and a measurement that was killed goes on where it stood.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import measurements
import tasks
from input_pipelines import DataError
from reports import comparison, over_training
from sam_jax.curvature import SecondDerivativeError
from training import checkpoints, cli, compiler, meshes
from training import config as config_lib
from training.config import Config
from training.errors import UsageError

# What no task's model, data or loss depends on.
_OF_TRAINING = ('optimizer', 'base_optimizer', 'rho', 'seed', 'hyperparameters')


def _define_flags() -> cli.Flags:
  flags = cli.Flags()
  flags.heading('What to measure')
  flags.define('workdir', 'list', 'folders of train.py runs; * and ? match several')
  flags.define('out', 'str', 'folder of the comparison', 'runs/compare')
  flags.define(
    'steps', 'list', 'these checkpoints of each run, or all; else the newest'
  )
  names = ', '.join(measurements.find())
  flags.define('measure', 'list', f'only some, and what they need, of {names}')
  flags.heading('How')
  for field in dataclasses.fields(measurements.Options):
    flags.define(field.name, str(field.type), field.metadata['help'], field.default)
  flags.define(
    'mesh',
    'str',
    'splits parameters, vectors and batches over all devices, as data:4,fsdp:2; unset, '
    'one device has all',
  )
  flags.define('cache', 'bool', 'keep compiled programs in ~/.cache/sam_jax', True)
  flags.heading('Where the data lies, if not where the run found it')
  for name in ('manual_dir', 'data_dir'):
    field = next(f for f in dataclasses.fields(Config) if f.name == name)
    flags.define(name, 'str', field.metadata['help'])
  return flags


def _workdirs(patterns: Sequence[str] | None) -> list[pathlib.Path]:
  """The folders that the flag names.

  Raises:
    UsageError: it names none, or a pattern matches none.
  """
  if not patterns:
    raise UsageError(
      '--workdir is missing: give the folder of a train.py run, or more.'
    )
  found: dict[pathlib.Path, None] = {}
  for pattern in patterns:
    matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    if not matches:
      raise UsageError(f'--workdir={pattern} matches no folder: check the pattern.')
    found.update(dict.fromkeys(pathlib.Path(match) for match in matches))
  return list(found)


def _steps(values: Sequence[str], workdir: pathlib.Path) -> list[int]:
  """The checkpoints that --steps names."""
  found = checkpoints.steps(workdir)
  if not found:
    checkpoints.load(workdir)  # which says so
  if list(cli.entries('steps', values)) == ['all']:
    return found
  try:
    wanted = sorted({int(value.replace('_', 'x')) for value in values})
  except ValueError:
    raise UsageError(
      f'--steps={",".join(values)}: give numbers of steps, as 100,200, or all.'
    ) from None
  for step in wanted:
    if step not in found:
      checkpoints.load(workdir, step)  # which says what there is
  return wanted


class _Measurers:
  """A measurer for each problem: data are loaded, programs compiled once for many."""

  def __init__(self, options: Any, only: Sequence[str] | None, mesh: str | None):
    self._options = options
    self._only = only
    self._mesh = None if mesh is None else meshes.MeshParallel(mesh)
    self._last: tuple[str, measurements.Measurer] | None = None

  def of(self, config: Config) -> measurements.Measurer:
    """The measurer of a run's problem; the one before if that is the same."""
    known = dataclasses.asdict(config)
    kept = {name: known[name] for name in known if name not in _OF_TRAINING}
    key = json.dumps(kept, sort_keys=True)
    if self._last is None or self._last[0] != key:
      self._last = None  # Its data go before others come.
      problem = tasks.build(config)
      measurer = measurements.Measurer(problem, self._options, self._only, self._mesh)
      self._last = key, measurer
    return self._last[1]


def _measure_newest(runs, measurers: _Measurers) -> list[comparison.Run]:
  """Measures the newest checkpoint of each (workdir, config)."""
  measured = []
  for number, (workdir, config) in enumerate(runs, 1):
    print(f'[{number}/{len(runs)}] {workdir}', flush=True)
    measurer = measurers.of(config)
    network = measurements.restore(workdir, config, measurer.problem)
    summary = measurer.measure(network, workdir / measurements.FOLDER)
    print(comparison.describe(summary))
    measured.append(comparison.Run(workdir, config, summary))
    comparison.write_single(measured[-1])
  return measured


def _measure_steps(workdir, config, steps, measurers: _Measurers) -> None:
  """Measures several checkpoints of one run and draws them by step."""
  summaries = []
  measurer = measurers.of(config)
  for step in steps:
    print(f'{workdir}, step {step}', flush=True)
    network = measurements.restore(workdir, config, measurer.problem, step)
    folder = over_training.folder(workdir, step)
    summaries.append(measurer.measure(network, folder))
  title = config_lib.title(config)
  print(f'\n{over_training.write(workdir, summaries, title)}')
  print(f'\n{workdir / measurements.FOLDER}/')


def main(argv: Sequence[str]) -> None:
  """Measures what the flags say."""
  flags = _define_flags().parse(argv, __doc__)
  names = [field.name for field in dataclasses.fields(measurements.Options)]
  options = measurements.Options(**{name: flags[name].value for name in names})
  options.validate()
  only = cli.entries('measure', flags.measure)
  measurements.choose(only, options)
  where = {
    name: flags[name].value
    for name in ('manual_dir', 'data_dir')
    if flags[name].value is not None
  }
  workdirs = _workdirs(flags.workdir)
  # All configurations first: a wrong name must not cost the time of the others.
  configs = [
    dataclasses.replace(config_lib.load(workdir), **where) for workdir in workdirs
  ]
  runs = list(zip(workdirs, configs, strict=True))
  compared = flags.steps is None and (len(runs) > 1 or flags['out'].present)
  out = pathlib.Path(flags.out)
  if flags.steps is not None and flags['out'].present:
    raise UsageError(
      f'--out={out} is for the comparison of several runs: what --steps measures is in '
      f'WORKDIR/{measurements.FOLDER}.'
    )
  series = [_steps(flags.steps, w) for w in workdirs] if flags.steps is not None else []
  if compared:
    comparison.claim(out)
  compiler.use_all_cores()
  if flags.cache:
    compiler.keep_programs()
  measurers = _Measurers(options, only, flags.mesh)
  for (workdir, config), steps in zip(runs, series, strict=False):
    _measure_steps(workdir, config, steps, measurers)
  if flags.steps is not None:
    return
  measured = _measure_newest(runs, measurers)
  if compared:
    print(f'\n{comparison.write(measured, out)}\n\n{out}/')


if __name__ == '__main__':
  sys.exit(cli.run(main, sys.argv, errors=(DataError, SecondDerivativeError)))
