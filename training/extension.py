"""Runs that go on for more epochs than they were started with.

A run of E epochs is the beginning of one of F > E epochs where nothing in a step
depends on how many there will be: then the longer run goes on from the last checkpoint,
and ends bit-identical to one that was started with F.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from typing import Any

from training import config as config_lib
from training import methods, summary
from training.config import Config
from training.errors import UsageError

# What tells of the end of a run; made anew at the new one. The last is a sweep's.
_OF_THE_END = (summary.FILE_NAME, 'sharpness.json')


def check(config: Config, workdir: pathlib.Path) -> None:
  """Checks that workdir is this run's own, or the beginning of it, or free.

  Raises:
    UsageError: it belongs to another configuration, holds other files, or is of fewer
      epochs and not the beginning of this run.
  """
  stored = _shorter(config, workdir)
  if stored is None:
    config_lib.check(config, workdir)
    return
  if reason := _depends_on_epochs(config):
    raise UsageError(
      f'--epochs={config.epochs}: the run in --workdir={workdir} has epochs='
      f'{stored.epochs}, and {reason}, so it is not the beginning of a longer one: '
      'choose another --workdir.'
    )


def finished(config: Config, workdir: pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished run; None if it is not finished, or shorter than this."""
  return None if _shorter(config, workdir) else summary.read(workdir)


def claim(config: Config, workdir: pathlib.Path) -> Any:
  """Makes a checked workdir this run's own, as `training.config.claim`.

  What tells of the end of a shorter run is removed before its configuration is
  replaced, so that a start that is killed in between loses nothing: the same command
  goes on.
  """
  lock = config_lib.claim(config, workdir)
  try:
    if _shorter(config, workdir):
      for name in _OF_THE_END:
        (workdir / name).unlink(missing_ok=True)
      config_lib.save(config, workdir)
  except BaseException:
    lock.close()
    raise
  return lock


def _shorter(config: Config, workdir: pathlib.Path) -> Config | None:
  """The configuration in a workdir, if it is this one with fewer epochs."""
  if not (workdir / config_lib.FILE_NAME).exists():
    return None
  stored = config_lib.load(workdir)
  longer = dataclasses.replace(stored, epochs=config.epochs)
  if stored.epochs >= config.epochs or config_lib.differences(longer, config):
    return None
  return stored


def _depends_on_epochs(config: Config) -> str:
  """What in a run depends on how many epochs it has; '' if nothing does."""
  if config.schedule != 'constant':
    return f'--schedule={config.schedule} stretches over all epochs'
  function = methods.get(config.optimizer)
  if function and 'total_steps' in inspect.signature(function).parameters:
    return f'--optimizer={config.optimizer} counts on the number of all steps'
  return ''
