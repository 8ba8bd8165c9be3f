"""What is measured while a network trains: hooks, their memory and their time."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.step import TrainState

_PREFIX = 'hooks'
# Of the time since a hook's last picture, what the next one may take.
_DRAWING_SHARE = 0.02


class Hook:
  """A measurement that the training loop calls; what a subclass may override.

  What a call returns is a pure function of its arguments and of the memory: a run that
  was killed and started again has to write the same lines as one that was not.

  Attributes:
    name: the `split` of its lines in `metrics.jsonl`.
  """

  name: str

  def due(self, step: int, steps_per_epoch: int) -> bool:
    """Whether to measure after a number of steps; the first call is at step 0."""
    raise NotImplementedError

  def __call__(self, state: TrainState, step: int) -> dict[str, Any]:
    """What JSON holds, by name.

    Args:
      state: of one replica, as the next step takes it, which consumes it.
      step: updates done.
    """
    raise NotImplementedError

  def check(self, lines: Sequence[dict[str, Any]]) -> None:
    """Refuses to go on from its lines of earlier starts if it measures otherwise now.

    Raises:
      UsageError: its own lines would not be comparable with these.
    """

  def memory(self) -> dict[str, np.ndarray]:
    """What later calls depend on, by name; a checkpoint keeps it."""
    return {}

  def recall(self, memory: dict[str, np.ndarray]) -> None:
    """Takes what `memory` gave; it is empty at the start of a run."""

  def draw(self, workdir: pathlib.Path, lines: Sequence[dict[str, Any]]) -> bool:
    """Draws its lines so far; False where there is no picture."""
    return False

  def summarize(self, lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """Entries of `summary.json` from all of its lines and the run's last step."""
    return {}


class Hooks:
  """The hooks of a run.

  Attributes:
    seconds: what each has taken so far, over all starts of the run.
  """

  def __init__(self, hooks: Sequence[Hook] = ()):
    """Takes the hooks."""
    self._hooks = tuple(hooks)
    self.seconds = {hook.name: 0.0 for hook in self._hooks}
    self._next_drawing = dict.fromkeys(self.seconds, 0.0)

  def due(self, step: int, steps_per_epoch: int) -> list[Hook]:
    """Those that measure after this step."""
    return [hook for hook in self._hooks if hook.due(step, steps_per_epoch)]

  def measure(self, hook: Hook, state: TrainState, step: int) -> dict[str, Any]:
    """Calls a hook and counts its time."""
    started = time.monotonic()
    values = hook(state, step)
    self.seconds[hook.name] += time.monotonic() - started
    return values

  def arrays(self) -> dict[str, np.ndarray]:
    """The memories of all, by path, for a checkpoint."""
    return {
      f'{_PREFIX}/{hook.name}/{key}': np.asarray(value)
      for hook in self._hooks
      for key, value in hook.memory().items()
    }

  def restore(
    self, arrays: Mapping[str, np.ndarray], seconds: Mapping[str, float]
  ) -> None:
    """Gives the memories and the times of a checkpoint back.

    Args:
      arrays: of the checkpoint by path; those that are no memories are passed over.
      seconds: by the name of a hook.
    """
    for hook in self._hooks:
      start = f'{_PREFIX}/{hook.name}/'
      hook.recall(
        {key[len(start) :]: x for key, x in arrays.items() if key.startswith(start)}
      )
      self.seconds[hook.name] = seconds.get(hook.name, 0.0)

  def draw(
    self,
    workdir: pathlib.Path,
    lines: Mapping[str, Sequence[dict[str, Any]]],
    *,
    last: bool = False,
  ) -> None:
    """Draws the pictures, not so often that it costs more than a small share.

    Args:
      workdir: the run's folder.
      lines: of `metrics.jsonl` by the name of a hook.
      last: whether the run is over, and every picture is drawn.
    """
    for hook in self._hooks:
      started = time.monotonic()
      found = lines.get(hook.name)
      if not found or not (last or started >= self._next_drawing[hook.name]):
        continue
      if hook.draw(workdir, found):
        ended = time.monotonic()
        self.seconds[hook.name] += ended - started
        self._next_drawing[hook.name] = ended + (ended - started) / _DRAWING_SHARE

  def summarize(
    self, lines: Mapping[str, Sequence[dict[str, Any]]], step: int, wall_time: float
  ) -> dict[str, Any]:
    """What the summary says of each: its own numbers, and its share of the time."""
    return {
      hook.name: {
        **hook.summarize(lines.get(hook.name, ()), step),
        'seconds': round(self.seconds[hook.name], 3),
        'share_of_wall_time': round(self.seconds[hook.name] / wall_time, 4),
      }
      for hook in self._hooks
      if wall_time > 0
    }


def without(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint that are no memories of hooks."""
  return {k: x for k, x in arrays.items() if not k.startswith(f'{_PREFIX}/')}
