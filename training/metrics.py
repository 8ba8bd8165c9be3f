"""The metrics of a run: one JSON object a line in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from training.errors import TrainingDiverged

FILE_NAME = 'metrics.jsonl'
_FIELDS = (
  'step',
  'epoch',
  'split',
  'loss',
  'perturbed_loss',
  'accuracy',
  'gradient_norm',
  'learning_rate',
  'rho',
  'seconds',
  'examples_per_second',
)
_CLOCK = ('seconds', 'examples_per_second')
_MEANS = ('loss', 'perturbed_loss', 'accuracy', 'gradient_norm')
_LATEST = ('learning_rate', 'rho')


class MetricsFile:
  """Appends lines; what a restored run will write again is cut away first."""

  def __init__(self, workdir: pathlib.Path, step: int, *, timing: bool = True):
    """Opens the file for a run that stands after `step`.

    Args:
      workdir: the run's folder.
      step: lines of later steps, and a half line at the end, are removed.
      timing: False leaves out the clock's fields, so that equal runs write equal files.
    """
    self._path = workdir / FILE_NAME
    self._timing = timing
    kept = [line for line in read(workdir) if line['step'] <= step]
    temporary = self._path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    os.replace(temporary, self._path)
    self._file = self._path.open('a')

  def write(self, **values: Any) -> None:
    """Appends one line; fields that are not given are null."""
    fields = [f for f in _FIELDS if self._timing or f not in _CLOCK]
    self._file.write(json.dumps({name: values.get(name) for name in fields}) + '\n')

  def flush(self) -> None:
    """Puts the lines on the disk; call it before the checkpoint they belong to."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run, without a half line at the end."""
  path = pathlib.Path(workdir) / FILE_NAME
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(errors='replace').splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      break
  return lines


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
    for name in _MEANS:
      if name in metrics:
        weighted = metrics[name] * examples
        state['sums'][name] = state['sums'].get(name, 0.0) + weighted
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
