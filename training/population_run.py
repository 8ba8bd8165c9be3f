"""One population from its first step to its last: log, checkpoint, resume.

What a member's folder holds in the end is what `training.loop` leaves of a single run.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from training import (
  checkpoints,
  extension,
  feeding,
  grouping,
  loop,
  microbatches,
  optimizers,
  sharing,
  step,
  stopping,
  summary,
)
from training import config as config_lib
from training import members as members_lib
from training import metrics as metrics_lib
from training.config import Config
from training.members import DIED, Members
from training.problem import Problem
from training.progress import MembersProgress

FILE_NAME = 'population.json'


def remove(folder: pathlib.Path) -> None:
  """Removes what a population needs only while it trains."""
  shutil.rmtree(folder)
  with contextlib.suppress(OSError):  # There may be others.
    folder.parent.rmdir()


def stepper_of(
  config: Config, problem: Problem, seeds: Sequence[int]
) -> tuple[step.Stepper, Any]:
  """The step of a member, and the batches of all.

  Args:
    config: of one of them.
    problem: what is trained.
    seeds: of all.
  """
  shared = sharing.of(config)
  microbatches.check(problem, shared.microbatches)
  batches = problem.train.batches(
    config.batch_size, shards=shared.axes, seed=tuple(seeds)
  )
  stepper = step.Stepper(problem, config, batches.steps_per_epoch, shared)
  return stepper, batches


def is_resident(problem: Problem, config: Config) -> bool:
  """Whether the data live on the devices."""
  return feeding.fit((problem.train, problem.test), config.device_data_gib)


class Run:
  """One population: its compiled steps, its state, and the files of its members.

  Attributes:
    mapping: how a device goes through its members.
  """

  def __init__(
    self,
    configs: dict[str, Config],
    problem: Problem,
    workdir: pathlib.Path,
    folder: pathlib.Path,
    devices: Sequence[jax.Device],
    mapping: str | None,
  ):
    """Builds the steps and the first state; writes nothing.

    Args:
      configs: the members by folder.
      problem: what is trained.
      workdir: the sweep's folder.
      folder: the population's own.
      devices: those to choose from.
      mapping: see `population.Options`.
    """
    self._configs, self._problem, self._workdir = configs, problem, workdir
    self._folder, self._names = folder, list(configs)
    self._config = config = next(iter(configs.values()))
    self._score, self._count = problem.scores.main, len(configs)
    seeds = [own.seed for own in configs.values()]
    stepper, self._batches = stepper_of(config, problem, seeds)
    self._steps_per_epoch = stepper.steps_per_epoch
    self._opened = contextlib.ExitStack()
    self._members = Members(stepper, self._count, devices, mapping or 'vmap')
    state = self._members.init(seeds, grouping.hyperparams([*configs.values()]))
    if config.init_from:
      params = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (self._count, *leaf.shape)),
        loop.other_params(config.init_from, problem),
      )
      state = self._members.place(
        state._replace(members=state.members._replace(params=params))
      )
    self._state = state
    resident = is_resident(problem, config)
    self._train_source, self._test_source = (
      feeding.Source(split, self._members.place_shared, resident=resident)
      for split in (problem.train, problem.test)
    )
    self.mapping = mapping or self._choose(stepper, devices)

  def _choose(self, stepper: step.Stepper, devices: Sequence[jax.Device]) -> str:
    """The mapping that is faster here, which the run takes from then on."""
    if devices[0].platform != 'cpu':
      return 'vmap'
    place = self._members.place_dealt
    item = next(self._train_source.items(self._batches, 0, 0, place))
    phase = optimizers.phase(self._config, self._steps_per_epoch, 0)
    candidates = {
      'vmap': self._members,
      'map': Members(stepper, self._count, devices, 'map'),
    }
    times = {
      name: members.time(phase, self._state, self._train_source.arrays, item)
      for name, members in candidates.items()
    }
    best = min(times, key=lambda name: times[name])
    self._members = candidates[best]
    print(
      f'a step of {self._count} members takes {1e3 * times["vmap"]:.2f} ms by vmap and '
      f'{1e3 * times["map"]:.2f} ms by lax.map: {best} is taken'
    )
    return best

  def run(self, stop: stopping.Stop, timing: bool) -> None:
    """Trains to the end, unless a signal ends the process before."""
    self._start(timing)
    if self._train(stop):
      self._finish()
      return
    self._progress.say(
      f'stopped after step {self._step}, which is saved: the same command goes on.'
    )
    stop.leave()

  def _start(self, timing: bool) -> None:
    """Takes the members' folders, and goes on where the population stands."""
    self._files: list[metrics_lib.MetricsFile | None] = [None] * self._count
    open_ones = [
      (index, config, self._workdir / name)
      for index, (name, config) in enumerate(self._configs.items())
      if not extension.finished(config, self._workdir / name)
    ]
    for _, config, folder in open_ones:
      self._opened.enter_context(contextlib.closing(extension.claim(config, folder)))
    self._folder.mkdir(parents=True, exist_ok=True)
    if not (self._folder / FILE_NAME).exists():
      config_lib.write_json(
        self._folder / FILE_NAME, {'members': self._names, 'mapping': self.mapping}
      )
    self._checkpoints = checkpoints.Checkpoints(self._folder)
    self._opened.enter_context(contextlib.closing(self._checkpoints))
    self._restore()
    for index, config, folder in open_ones:
      if not self._step:
        metrics_lib.keep_earlier(folder, any_line=False)
      if self._alive[index]:  # A start that was killed may have come further.
        (folder / checkpoints.DIVERGED).unlink(missing_ok=True)
      tested = frozenset(config_lib.tested(config, self._epoch))
      file = metrics_lib.MetricsFile(
        folder, self._step or -1, self._score.name, tested=tested, timing=timing
      )
      self._files[index] = self._opened.enter_context(contextlib.closing(file))
    total = self._config.epochs * self._steps_per_epoch
    self._progress = MembersProgress(self._config.epochs, total, self._score)
    self._opened.enter_context(contextlib.closing(self._progress))
    if self._step:
      self._progress.say(f'going on after step {self._step} of {self._folder}/')
    self._started = self._next_save = time.monotonic()

  def _restore(self) -> None:
    newest = self._checkpoints.restore_newest()
    position = {'step': 0, 'epoch': 0, 'start': 0, 'means': None}
    if newest:
      origin = f'the checkpoint in {self._folder}'
      state = checkpoints.from_arrays(newest.arrays, self._state, origin)
      self._state, position = self._members.place(state), newest.position
    self._step, self._epoch = position['step'], position['epoch']
    self._start_of_epoch = position['start']
    self._means = metrics_lib.EpochMeans(_in_numpy(position['means']))
    self._seconds_before = position.get('seconds', 0.0)
    self._stopwatch = feeding.Stopwatch(*position.get('input_wait', ()))
    self._died = np.array(self._state.died)

  @property
  def _alive(self) -> np.ndarray:
    return self._died == 0

  def _train(self, stop: stopping.Stop) -> bool:
    """Runs the epochs that are left; False if it was told to stop."""
    while self._epoch < self._config.epochs and self._alive.any():
      if not self._train_epoch(stop):
        self._save()
        return False
      self._end_epoch()
      last = self._epoch == self._config.epochs
      stopping_now = stop.requested(self._step)
      if self._checkpoint_due() or last or stopping_now:
        self._save()
      if stopping_now and not last:
        return False
    return True

  def _train_epoch(self, stop: stopping.Stop) -> bool:
    """Runs the rest of an epoch; False if it was told to stop inside."""
    every, pending, metrics = self._config.checkpoint_every, None, None
    source, place = self._train_source, self._members.place_dealt
    feed = source.items(self._batches, self._epoch, self._start_of_epoch, place)
    self._tick = time.monotonic()
    with contextlib.closing(feed):
      while (items := self._stopwatch.next(feed, metrics)) is not None:
        phase = optimizers.phase(self._config, self._steps_per_epoch, self._step)
        self._state, metrics = self._members.train[phase](
          self._state, source.arrays, items
        )
        # The device is busy with this step while the one before is read.
        self._record(pending)
        self._step, self._start_of_epoch = self._step + 1, self._start_of_epoch + 1
        pending = (self._step, metrics)
        if self._start_of_epoch == self._steps_per_epoch:
          break
        stopping_now = stop.requested(self._step)
        if stopping_now or (every and self._step % every == 0):
          self._record(pending)
          pending = None
          if stopping_now:
            return False
          self._save()
    self._record(pending)
    return True

  def _record(self, pending: tuple[int, Any] | None) -> None:
    """Reads the metrics of a dispatched step, which waits for it."""
    if pending is None:
      return
    number, metrics = pending
    values = {name: np.asarray(x) for name, x in metrics.items()}
    self._bury(values.pop(DIED))
    values = {
      name: np.where(self._alive, x, 0).astype(np.float64) for name, x in values.items()
    }
    examples = float(values.pop('examples').max())
    now = time.monotonic()
    self._means.add({**values, 'examples': examples}, now - self._tick)
    self._stopwatch.total += now - self._tick
    self._tick = now
    self._progress.step(self._epoch, number, self._means.means(), self._alive)
    if self._config.log_every and number % self._config.log_every == 0:
      self._write(values, step=number, epoch=self._epoch + 1, split='step')

  def _bury(self, died: np.ndarray) -> None:
    """Reports the members that have died since the last time."""
    for index in np.flatnonzero(self._alive & (died > 0)):
      name, number = self._names[index], int(died[index])
      sentence = (
        f'{name} has diverged: its loss, another metric or a parameter is not finite '
        f'at step {number}. It stops there; the other members go on.'
      )
      if self._files[index]:
        path = self._workdir / name / checkpoints.DIVERGED
        config_lib.write_json(path, {'step': number, 'note': sentence})
      self._progress.say(sentence)
    self._died = np.array(died)

  def _write(self, values: Mapping[str, np.ndarray], **common: Any) -> None:
    """Appends a line for each member that goes on."""
    seconds = self._seconds()
    for index in np.flatnonzero(self._alive):
      if file := self._files[index]:
        own = {name: float(x[index]) for name, x in values.items()}
        file.write(**own, **common, seconds=seconds)

  def _end_epoch(self) -> None:
    """Logs the epoch that has just been trained and moves on to the next."""
    means = self._means.means()
    speed = means.pop('examples_per_second')
    self._epoch, self._start_of_epoch = self._epoch + 1, 0
    self._means = metrics_lib.EpochMeans()
    tested = config_lib.is_tested(self._config, self._epoch)
    test = self._evaluate(self._test_source)[0] if tested else None
    common = {'step': self._step, 'epoch': self._epoch}
    self._write(means, **common, split='train', examples_per_second=speed)
    if test:
      self._write(test, **common, split='test')
      self._progress.test(test[self._score.name][self._alive])

  def _evaluate(self, source: feeding.Source) -> tuple[dict[str, np.ndarray], Any]:
    """Mean loss and score of a split in evaluation mode, and the sums of its totals.

    A member for which they are not finite dies.
    """
    size = self._config.batch_size // self._config.grad_accum_steps
    items = source.items(source.split.batches(size), 0, 0, self._members.place_shared)
    members = self._state.members
    sums = metrics_lib.Sums(
      (self._members.evaluate(members, source.arrays, item) for item in items),
      functools.partial(jax.tree.map, np.asarray),
    )
    metrics = sums.means('loss', self._score.name)
    finite = np.all([np.isfinite(x) for x in metrics.values()], axis=0)
    if (self._alive & ~finite).any():
      died = np.where(self._alive & ~finite, self._step, self._died).astype(np.int32)
      self._bury(died)
      self._state = self._state._replace(died=self._members.place_dealt(died))
    return metrics, sums.totals

  def _checkpoint_due(self) -> bool:
    """Whether to save at this end of an epoch."""
    every = self._config.checkpoint_every
    return self._step % every == 0 if every else time.monotonic() >= self._next_save

  def _position(self) -> dict[str, Any]:
    """Where in the data the population stands, and its running sums; JSON."""
    return {
      'step': self._step,
      'epoch': self._epoch,
      'start': self._start_of_epoch,
      'means': _in_json(self._means.state) if self._start_of_epoch else None,
      'seconds': self._seconds(),
      'input_wait': [self._stopwatch.waited, self._stopwatch.total],
      'hook_seconds': {},
    }

  def _save(self) -> None:
    """Stores the state and the position, after the metrics that lead up to it."""
    for file in filter(None, self._files):
      file.flush()
    before = time.monotonic()
    self._checkpoints.save(self._state, self._position())
    after = time.monotonic()
    self._next_save = after + (after - before) / loop.SAVING_SHARE

  def _finish(self) -> None:
    """Evaluates the last parameters, and gives each member what a run ends with."""
    train, _ = self._evaluate(self._train_source)
    test, totals = self._evaluate(self._test_source)
    facts = {
      'steps': self._step,
      'wall_time_seconds': self._seconds(),
      'input_wait_share': self._stopwatch.share,
      'device': jax.local_devices()[0].device_kind,
      'num_replicas': 1,
      'during_training': {},
      'population': {
        'members': self._count,
        'mapping': self.mapping,
        'devices': self._members.num_devices,
      },
    }
    members, position = members_lib.fetch(self._state.members), self._position()
    for index in np.flatnonzero(self._alive):
      if file := self._files[index]:
        one = lambda tree, i=index: jax.tree.map(lambda leaf: leaf[i], tree)
        ends = [
          {name: float(x) for name, x in one(split).items()} for split in (train, test)
        ]
        if file.missing([self._epoch]):
          common = {'step': self._step, 'epoch': self._epoch}
          file.write(**common, seconds=self._seconds(), split='test', **ends[1])
        file.flush()
        state = members_lib.unstack(members, index)
        self._finish_member(index, state, position, *ends, one(totals), facts)
    remove(self._folder)

  def _finish_member(
    self,
    index: int,
    state: step.TrainState,
    position: dict[str, Any],
    train: dict[str, float],
    test: dict[str, float],
    totals: Any,
    facts: dict[str, Any],
  ) -> None:
    """Writes the last checkpoint of a member, its pictures and its summary."""
    name = self._names[index]
    folder, config = self._workdir / name, self._configs[name]
    if self._step not in checkpoints.steps(folder):  # of a start that was killed here
      saved = checkpoints.Checkpoints(folder, config.keep_checkpoints)
      with contextlib.closing(saved):
        saved.save(state, position)
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    summary.finish(
      folder,
      config,
      self._problem,
      train=train,
      test=test,
      totals=totals,
      facts={**facts, 'num_parameters': num_parameters},
    )

  def _seconds(self) -> float:
    """Wall time of the population over all its starts."""
    return round(self._seconds_before + time.monotonic() - self._started, 3)

  def close(self) -> None:
    """Releases files and threads."""
    self._opened.close()


def _in_json(means: Mapping[str, Any]) -> dict[str, Any]:
  """The state of `EpochMeans` of all members, with lists for arrays."""
  lists = lambda found: {name: x.tolist() for name, x in found.items()}
  return {**means, 'sums': lists(means['sums']), 'latest': lists(means['latest'])}


def _in_numpy(means: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """What `_in_json` was made of."""
  if means is None:
    return None
  arrays = lambda found: {name: np.array(x) for name, x in found.items()}
  return {**means, 'sums': arrays(means['sums']), 'latest': arrays(means['latest'])}
