"""The metrics of a run: one JSON object a line in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from training.errors import TrainingDiverged

FILE_NAME = 'metrics.jsonl'
_DAMAGED, _EARLIER = 'damaged_metrics', 'earlier_metrics'
# Of a line about a split; SCORE stands for the name of the problem's main score.
_FIELDS = (
  'step',
  'epoch',
  'split',
  'loss',
  'perturbed_loss',
  'SCORE',
  'gradient_norm',
  'learning_rate',
  'rho',
  'seconds',
  'examples_per_second',
)
_CLOCK = ('seconds', 'examples_per_second')
_SPLITS = ('train', 'test', 'step')
_LATEST = ('learning_rate', 'rho')


class MetricsFile:
  """Appends lines; what a restored run will write again is cut away first.

  Attributes:
    measured: the lines of measurements during training so far, by name.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    step: int,
    score: str,
    *,
    tested: Collection[int] | None = None,
    timing: bool = True,
  ):
    """Opens the file for a run that stands after `step`.

    A file with lines that cannot be read is kept under another name, with a warning.

    Args:
      workdir: the run's folder.
      step: lines of later steps, and a half line at the end, are removed.
      score: name of the problem's main score.
      tested: epochs after which the run evaluates the test split; lines about that
        split of other epochs are removed, as of the end of a run that now goes on for
        more epochs. None keeps all.
      timing: False leaves out the clock's fields, so that equal runs write equal files.
    """
    self._path = workdir / FILE_NAME
    fields = [name.replace('SCORE', score) for name in _FIELDS]
    self._fields = [f for f in fields if timing or f not in _CLOCK]
    lines, damaged = _parse(self._path)
    if damaged:
      warnings.warn(
        f'{self._path} has {len(damaged)} line(s) that cannot be read (the first is '
        f'line {damaged[0]}): it is kept as {_set_aside(self._path, _DAMAGED)}, and '
        'its good lines go on.',
        stacklevel=2,
      )
    kept = [
      line
      for line in lines
      if line['step'] <= step
      and (tested is None or line['split'] != 'test' or line.get('epoch') in tested)
    ]
    self._tested = {line.get('epoch') for line in kept if line['split'] == 'test'}
    self.measured: dict[str, list[dict[str, Any]]] = {}
    for line in kept:
      if line['split'] not in _SPLITS:
        self.measured.setdefault(line['split'], []).append(line)
    temporary = self._path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    os.replace(temporary, self._path)
    self._file = self._path.open('a')

  def missing(self, epochs: Iterable[int]) -> list[int]:
    """Those of some epochs that have no line about the test split."""
    return [epoch for epoch in epochs if epoch not in self._tested]

  def write(self, **values: Any) -> None:
    """Appends a line about a split; fields that are not given are null."""
    if values.get('split') == 'test':
      self._tested.add(values.get('epoch'))
    self._append({name: values.get(name) for name in self._fields})

  def write_measured(
    self, step: int, epoch: int, name: str, values: dict[str, Any]
  ) -> None:
    """Appends what a measurement found during training, under its name as split."""
    line = {'step': step, 'epoch': epoch, 'split': name, **values}
    self.measured.setdefault(name, []).append(line)
    self._append(line)

  def _append(self, line: dict[str, Any]) -> None:
    self._file.write(json.dumps(line) + '\n')

  def flush(self) -> None:
    """Puts the lines on the disk; call it before the checkpoint they belong to."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run that can be read."""
  return _parse(pathlib.Path(workdir) / FILE_NAME)[0]


def keep_earlier(workdir: pathlib.Path, *, any_line: bool) -> None:
  """Keeps a copy of the metrics of a run whose checkpoints are gone, if it has any.

  Args:
    workdir: the run's folder, without a checkpoint.
    any_line: whether a line of any step is reason enough; else that of an epoch is,
      because a run that is killed in its first epoch has no checkpoint yet.
  """
  splits = ('train', 'test')
  steps = [x['step'] for x in read(workdir) if any_line or x['split'] in splits]
  if max(steps, default=0) > 0:
    kept = _set_aside(workdir / FILE_NAME, _EARLIER)
    warnings.warn(
      f'{workdir} has metrics up to step {max(steps)} and no checkpoint: they are kept '
      f'as {kept}, and the run begins anew.',
      stacklevel=2,
    )


def _parse(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[int]]:
  """The lines of a file, and the numbers of those that cannot be read.

  A half line at the end is what a killed run leaves, and no damage.
  """
  if not path.exists():
    return [], []
  *whole, half = path.read_text(errors='replace').split('\n')
  parsed = [_line(text) for text in whole]
  damaged = [number for number, line in enumerate(parsed, 1) if line is None]
  return [line for line in (*parsed, _line(half)) if line is not None], damaged


def _line(text: str) -> dict[str, Any] | None:
  """One line, or None if it is not what a run writes."""
  try:
    line = json.loads(text)
  except ValueError:
    return None
  good = (
    isinstance(line, dict) and isinstance(line.get('step'), int) and 'split' in line
  )
  return line if good else None


def _set_aside(path: pathlib.Path, stem: str) -> str:
  """Copies a file to a name that is free, and returns that."""
  number, name = 1, f'{stem}{path.suffix}'
  while path.with_name(name).exists():
    number, name = number + 1, f'{stem}_{number + 1}{path.suffix}'
  shutil.copyfile(path, path.with_name(name))
  return name


class Sums:
  """Sums over the batches of a split, of one run or side by side of several.

  Attributes:
    totals: float64, what further scores are made of; None before the first batch.
  """

  def __init__(self, dispatched: Iterable[Any], read: Callable[[Any], Any]):
    """Adds up what an evaluation step gives for each batch.

    Args:
      dispatched: results that may still be computed, with an entry 'totals'.
      read: brings one to the host. It is called one behind, so that batches and totals
        do not pile up on the devices.
    """
    self._sums, self.totals, running = [], None, None
    for found in dispatched:
      if running is not None:
        self._add(read(running))
      running = found
    if running is not None:
      self._add(read(running))

  def _add(self, found: Any) -> None:
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), found.pop('totals'))
    self.totals = new if self.totals is None else jax.tree.map(np.add, self.totals, new)
    self._sums.append(found)

  def means(self, *names: str) -> dict[str, Any]:
    """Means over the examples of what is named, from exact sums.

    Those of several runs are NaN where a term is not finite.
    """
    total = {n: _exact([x[n] for x in self._sums]) for n in (*names, 'examples')}
    return {name: total[name] / total['examples'] for name in names}


def _exact(values: Sequence[Any]) -> Any:
  if not np.ndim(values[0]):
    return math.fsum(map(float, values))
  columns = np.asarray(values, np.float64).T
  return np.array([math.fsum(x) if np.isfinite(x).all() else math.nan for x in columns])


class EpochMeans:
  """Running sums of an epoch's step metrics, kept in the checkpoint."""

  def __init__(self, state: dict[str, Any] | None = None):
    """Starts empty, or from `state`."""
    empty = {'steps': 0, 'examples': 0.0, 'seconds': 0.0, 'sums': {}, 'latest': {}}
    self.state = state or empty

  def add(self, metrics: dict[str, float], seconds: float) -> None:
    """Adds one step, weighted by its examples.

    Args:
      metrics: scalars of `training.step`.
      seconds: time since the step before.
    """
    state = self.state
    examples = metrics['examples']
    state['steps'] += 1
    state['examples'] += examples
    state['seconds'] += seconds
    for name, value in metrics.items():
      if name not in ('examples', *_LATEST):
        state['sums'][name] = state['sums'].get(name, 0.0) + value * examples
    state['latest'] = {name: metrics[name] for name in _LATEST if name in metrics}

  def means(self) -> dict[str, float]:
    """Means over the epoch so far, and the latest learning rate and radius."""
    state = self.state
    means = {name: total / state['examples'] for name, total in state['sums'].items()}
    speed = state['examples'] / max(state['seconds'], 1e-9)
    return {**means, **state['latest'], 'examples_per_second': round(speed, 1)}


def check_finite(metrics: dict[str, float], step: int) -> None:
  """Stops a run whose metrics are no longer numbers.

  Raises:
    TrainingDiverged: names the step and the metric, the loss first.
  """
  for name in sorted(metrics, key=lambda name: name != 'loss'):
    value = metrics[name]
    if not math.isfinite(value):
      raise TrainingDiverged(
        f'the {name} of step {step} is {value}: training has diverged and stops; the '
        'last good checkpoint, if there is one, is kept. Try a lower --learning_rate '
        'or --rho, --warmup_epochs or --clip_norm, in another --workdir.'
      )
