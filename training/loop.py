"""The training loop: dispatch, log, checkpoint, resume."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from training import (
  checkpoints,
  extension,
  feeding,
  meshes,
  optimizers,
  parallel,
  sharing,
  step,
  stopping,
  summary,
)
from training import config as config_lib
from training import metrics as metrics_lib
from training.config import Config
from training.errors import UsageError
from training.hooks import Hook, Hooks, without
from training.problem import Problem
from training.progress import Progress

# Of the time, what checkpoints at the ends of short epochs may take.
SAVING_SHARE = 0.05


def train(
  config: Config,
  problem: Problem,
  workdir: str | os.PathLike[str],
  *,
  num_devices: int = 0,
  mesh: str | None = None,
  timing: bool = True,
  hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
  """Trains on a problem, or continues the run that workdir holds.

  A run that is stopped at any moment and called again ends as if never stopped, bit for
  bit on the same devices. A finished run is only read; one of fewer epochs goes on, if
  nothing in it depends on their number.

  Args:
    config: a resolved configuration (`resolve` of the tasks package).
    problem: model, data, loss and scores.
    workdir: folder of the run's files; made if needed.
    num_devices: devices of this process to use; 0 uses all.
    mesh: splits parameters and batches over all devices, as ``data:4,fsdp:2``; by
      default every device is a replica.
    timing: False leaves the clock's fields out of `metrics.jsonl`.
    hooks: what is measured during training, on the primary process.

  Returns:
    The run's summary, as in `summary.json`.

  Raises:
    UsageError: the configuration, a workdir that belongs to another, or a hook that
      measures otherwise than at an earlier start.
    TrainingDiverged: a metric or parameter is not finite.
    SystemExit: 128 + signal number after SIGTERM or SIGINT, with a checkpoint saved.
  """
  workdir = pathlib.Path(workdir)
  config_lib.validate(config)
  optimizers.validate(config)
  replicas, shared = meshes.fit(config, problem, num_devices, mesh, hooks)
  extension.check(config, workdir)
  finished = extension.finished(config, workdir)
  if parallel.broadcast_json(bool(finished)):  # All do what the primary one sees.
    return finished or {}
  newest = max(checkpoints.steps(workdir), default=-1)
  earlier = [line for line in metrics_lib.read(workdir) if line['step'] <= newest]
  for hook in hooks:
    hook.check([line for line in earlier if line['split'] == hook.name])
  run = _Run(config, problem, workdir, replicas, shared, timing, hooks)
  with contextlib.closing(run), stopping.listen() as stop:
    run.start()
    return run.finish() if run.train(stop) else run.leave(stop)


class _Run:
  """One run: its compiled steps, its state, and its files (on the primary process)."""

  def __init__(
    self,
    config: Config,
    problem: Problem,
    workdir: pathlib.Path,
    replicas: parallel.DataParallel | meshes.MeshParallel,
    shared: sharing.Sharing,
    timing: bool,
    hooks: Sequence[Hook],
  ):
    self._config, self._problem, self._workdir = config, problem, workdir
    self._replicas, self._score = replicas, problem.scores.main
    self._batches = problem.train.batches(
      config.batch_size, shards=(*replicas.axes, *shared.axes), seed=config.seed
    )
    self._steps_per_epoch = self._batches.steps_per_epoch
    stepper = step.Stepper(
      problem, config, self._steps_per_epoch, shared, replicas.axis_name
    )
    state = replicas.make(stepper.init, config.seed)
    if config.init_from:
      state = state._replace(params=other_params(config.init_from, problem))
    self._num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    # One compiled step a phase of a periodic method; one for all others.
    self._train_steps = {
      phase: replicas.map(functools.partial(stepper.train, phase=phase), donate=True)
      for phase in (None, False, True)
    }
    self._eval_step = replicas.map(stepper.evaluate)
    splits = (problem.train, problem.test)
    resident = feeding.fit(splits, config.device_data_gib)
    self._train_feed, self._test_feed = (
      feeding.Feed(split, replicas, resident=resident) for split in splits
    )
    self._timing, self._wanted_hooks, self._fresh = timing, hooks, state
    self._checkpoints = self._lock = self._metrics = self._progress = None
    self._hooks = Hooks()

  def start(self) -> None:
    """Takes the workdir, and goes on where it stands.

    Nothing is written before, so that all that was built has proved usable.
    """
    config, workdir = self._config, self._workdir
    if parallel.is_primary():
      self._lock = extension.claim(config, workdir)
      self._checkpoints = checkpoints.Checkpoints(workdir, config.keep_checkpoints)
      self._hooks = Hooks(self._wanted_hooks)
    self._restore(self._fresh)
    self._fresh = None
    if parallel.is_primary():
      if not self._step:
        metrics_lib.keep_earlier(workdir, any_line=self._checkpoints.made)
      tested = config_lib.tested(config, self._epoch)
      self._metrics = metrics_lib.MetricsFile(
        workdir,
        self._step or -1,
        self._score.name,
        tested=frozenset(tested),
        timing=self._timing,
      )
      if missing := self._metrics.missing(tested):
        warnings.warn(
          f'{workdir / metrics_lib.FILE_NAME} lacks epochs that the checkpoint has '
          f'trained ({len(missing)} of {len(tested)}): curves and best values are '
          'without them.',
          stacklevel=2,
        )
      total = config.epochs * self._steps_per_epoch
      self._progress = Progress(config.epochs, total, self._score)
      if self._step:
        self._progress.say(f'going on after step {self._step} of {workdir}/')
    self._started = time.monotonic()
    self._next_save = self._started
    if not self._step:
      self._measure()

  def _restore(self, state: step.TrainState) -> None:
    """Takes the newest checkpoint's state and position, else the given state's."""
    position = None
    if self._checkpoints:
      newest = self._checkpoints.restore_newest()
      if newest:
        origin = f'the checkpoint in {self._workdir}'
        state = checkpoints.from_arrays(without(newest.arrays), state, origin)
        position = newest.position
      hooks = position.get('hook_seconds', {}) if position else {}
      self._hooks.restore(newest.arrays if newest else {}, hooks)
    position = parallel.broadcast_json(position)
    self._state = self._replicas.spread(state, restored=bool(position))
    position = position or {'step': 0, 'epoch': 0, 'start': 0, 'means': None}
    self._step, self._epoch = position['step'], position['epoch']
    self._start = position['start']
    self._means = metrics_lib.EpochMeans(position['means'])
    self._seconds_before = position.get('seconds', 0.0)
    self._stopwatch = feeding.Stopwatch(*position.get('input_wait', ()))

  def train(self, stop: stopping.Stop) -> bool:
    """Runs the epochs that are left; False if it was told to stop."""
    while self._epoch < self._config.epochs:
      if not self._train_epoch(stop):
        self._save()
        return False
      self._end_epoch()
      last = self._epoch == self._config.epochs
      stopping = stop.requested(self._step)
      if self._checkpoint_due() or last or stopping:
        self._save()
      if stopping and not last:
        return False
    return True

  def leave(self, stop: stopping.Stop) -> Any:
    """Ends the process as the signal would have done."""
    if self._progress:
      self._progress.say(
        f'stopped after step {self._step}, which is saved: the same command goes on.'
      )
    stop.leave()

  def _train_epoch(self, stop: stopping.Stop) -> bool:
    """Runs the rest of an epoch; False if it was told to stop inside."""
    every = self._config.checkpoint_every
    pending = None
    metrics = None
    feed = self._train_feed.epoch(self._batches, self._epoch, self._start)
    self._tick = time.monotonic()
    with contextlib.closing(feed):
      while (batch := self._stopwatch.next(feed, metrics)) is not None:
        phase = optimizers.phase(self._config, self._steps_per_epoch, self._step)
        self._state, metrics = self._train_steps[phase](self._state, batch)
        # The device is busy with this step while the one before is read.
        self._record(pending)
        self._step, self._start = self._step + 1, self._start + 1
        pending = (self._step, metrics)
        if self._start == self._steps_per_epoch:
          break
        stopping = stop.requested(self._step)
        saving = stopping or (every and self._step % every == 0)
        if saving or self._hooks.due(self._step, self._steps_per_epoch):
          self._record(pending)
          pending = None
          self._measure()
        if stopping:
          return False
        if saving:
          self._save()
    self._record(pending)
    return True

  def _measure(self) -> None:
    """Lets the hooks that are due measure the network as it is now."""
    due = self._hooks.due(self._step, self._steps_per_epoch)
    if not due:
      return
    state = self._replicas.variables(self._state)
    epoch = self._epoch + (self._start > 0)
    for hook in due:
      values = self._hooks.measure(hook, state, self._step)
      self._metrics.write_measured(self._step, epoch, hook.name, values)
    self._hooks.draw(self._workdir, self._metrics.measured)
    self._tick = time.monotonic()  # Not part of the next step.

  def _record(self, pending: tuple[int, Any] | None) -> None:
    """Reads the metrics of a dispatched step, which waits for it."""
    if pending is None:
      return
    number, mapped = pending
    metrics = {name: float(x) for name, x in self._replicas.first(mapped).items()}
    metrics_lib.check_finite(metrics, number)
    now = time.monotonic()
    self._means.add(metrics, now - self._tick)
    self._stopwatch.total += now - self._tick
    self._tick = now
    if not self._metrics:
      return
    self._progress.step(self._epoch, number, self._means.means())
    if self._config.log_every and number % self._config.log_every == 0:
      self._metrics.write(
        **{**metrics, 'step': number, 'epoch': self._epoch + 1, 'split': 'step'},
        seconds=self._seconds(),
      )

  def _end_epoch(self) -> None:
    """Logs the epoch that has just been trained and moves on to the next."""
    means = self._means.means()
    self._epoch, self._start = self._epoch + 1, 0
    self._means = metrics_lib.EpochMeans()
    tested = config_lib.is_tested(self._config, self._epoch)
    test = self._evaluate(self._test_feed)[0] if tested else None
    if not self._metrics:
      return
    common = {'step': self._step, 'epoch': self._epoch, 'seconds': self._seconds()}
    self._metrics.write(**common, split='train', **means)
    if test:
      self._metrics.write(**common, split='test', **test)
      self._progress.test(test[self._score.name])
    self._measure()

  def _evaluate(self, feed: feeding.Feed) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean loss and score of a split in evaluation mode, and the sums of its totals."""
    # No larger than what a step takes at once.
    size = self._config.batch_size // self._config.grad_accum_steps
    batches = feed.split.batches(size, shards=self._replicas.axes)
    variables = (self._state.params, self._state.batch_stats)
    sums = metrics_lib.Sums(
      (self._eval_step(variables, batch) for batch in feed.epoch(batches, 0)),
      self._replicas.first,
    )
    metrics = sums.means('loss', self._score.name)
    metrics_lib.check_finite(metrics, self._step)
    return metrics, sums.totals

  def _checkpoint_due(self) -> bool:
    """Whether to save at this end of an epoch."""
    every = self._config.checkpoint_every
    if every:
      return self._step % every == 0
    return parallel.broadcast_json(time.monotonic() >= self._next_save)

  def _save(self) -> None:
    """Stores the state and the position, after the metrics that lead up to it."""
    before = time.monotonic()
    state = self._replicas.first(self._state)  # All processes take part.
    if not self._checkpoints:
      return
    self._metrics.flush()
    position = {
      'step': self._step,
      'epoch': self._epoch,
      'start': self._start,
      'means': self._means.state if self._start else None,
      'seconds': self._seconds(),
      'input_wait': [self._stopwatch.waited, self._stopwatch.total],
      'hook_seconds': self._hooks.seconds,
    }
    self._checkpoints.save(state, position, self._hooks.arrays())
    after = time.monotonic()
    self._next_save = after + (after - before) / SAVING_SHARE

  def finish(self) -> dict[str, Any]:
    """Evaluates the last parameters and writes summary and picture."""
    train, _ = self._evaluate(self._train_feed)
    test, totals = self._evaluate(self._test_feed)
    if not self._metrics:
      return {}
    self._progress.close()
    if self._metrics.missing([self._epoch]):
      common = {'step': self._step, 'epoch': self._epoch, 'seconds': self._seconds()}
      self._metrics.write(**common, split='test', **test)
      self._metrics.flush()
    facts = {
      'steps': self._step,
      'num_parameters': self._num_parameters,
      'wall_time_seconds': self._seconds(),
      'input_wait_share': self._stopwatch.share,
      **self._replicas.facts,
    }
    self._hooks.draw(self._workdir, self._metrics.measured, last=True)
    facts['during_training'] = self._hooks.summarize(
      self._metrics.measured,
      self._config.epochs * self._steps_per_epoch,
      facts['wall_time_seconds'],
    )
    return summary.finish(
      self._workdir,
      self._config,
      self._problem,
      train=train,
      test=test,
      totals=totals,
      facts=facts,
    )

  def _seconds(self) -> float:
    """Wall time of the run over all its starts."""
    return round(self._seconds_before + time.monotonic() - self._started, 3)

  def close(self) -> None:
    """Releases files and threads."""
    with contextlib.ExitStack() as stack:
      for opened in (self._lock, self._checkpoints, self._metrics, self._progress):
        if opened:
          stack.callback(opened.close)


def other_params(workdir: str, problem: Problem) -> Any:
  """The parameters of another run, which must fit this one's.

  Args:
    workdir: of the other run.
    problem: of this one.

  Raises:
    UsageError: they do not fit, or there are none.
  """
  try:
    return checkpoints.load_variables(workdir, problem)[0]
  except UsageError as error:
    raise UsageError(f'--init_from={workdir}: {error}') from error
