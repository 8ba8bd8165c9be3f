"""Measures how sharp trained networks are, and compares them.

  python eval_hessian.py --workdir=runs/sgd
  python eval_hessian.py --workdir=runs/sgd,runs/sam --out=runs/compare
  python eval_hessian.py --workdir='runs/sweep/*/seed_*' --out=runs/compare

Each --workdir is that of a train.py run; its newest checkpoint is measured. Its folder
hessian/ gets summary.json (the extreme eigenvalues of the Hessian of the training loss
with their residuals, trace, adaptive sharpness), spectrum.npz, spectral_density.png,
landscape.npz and landscape.png. With several runs --out gets comparison.md and figures
side by side; runs that differ in their seed only are averaged. What was measured before
with the same flags is not measured again.
"""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import sys
from collections.abc import Sequence

import tasks
from input_pipelines import DataError
from training import cli, comparison, parallel, sharpness
from training import config as config_lib
from training.errors import UsageError


def _define_flags() -> cli.Flags:
  flags = cli.Flags()
  flags.heading('What to measure')
  flags.define('workdir', 'list', 'folders of train.py runs; * and ? match several')
  flags.define('out', 'str', 'folder of the comparison', 'runs/compare')
  flags.heading('How')
  for field in dataclasses.fields(sharpness.Options):
    flags.define(field.name, str(field.type), field.metadata['help'], field.default)
  flags.define('cache', 'bool', 'keep compiled programs in ~/.cache/sam_jax', True)
  flags.heading('Where the data lies, if not where the run found it')
  for name in ('manual_dir', 'data_dir'):
    field = next(f for f in dataclasses.fields(config_lib.Config) if f.name == name)
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


def main(argv: Sequence[str]) -> None:
  """Measures what the flags say."""
  flags = _define_flags().parse(argv, __doc__)
  options = sharpness.Options(
    **{
      field.name: flags[field.name].value
      for field in dataclasses.fields(sharpness.Options)
    }
  )
  options.validate()
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
  if flags.cache:
    parallel.enable_compilation_cache()
  runs = []
  for number, (workdir, config) in enumerate(zip(workdirs, configs, strict=True), 1):
    print(f'[{number}/{len(workdirs)}] {workdir}', flush=True)
    network = sharpness.restore(workdir, config, tasks.build)
    summary = sharpness.measure(network, workdir, options)
    print(sharpness.describe(summary))
    runs.append(comparison.Run(workdir, config, summary))
  if len(runs) > 1:
    out = pathlib.Path(flags.out)
    print(f'\n{comparison.write(runs, out)}\n\n{out}/')


if __name__ == '__main__':
  sys.exit(cli.run(main, sys.argv, errors=(DataError,)))
