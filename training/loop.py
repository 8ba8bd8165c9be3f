"""The training loop: dispatch, log, checkpoint, resume."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from training import (
  checkpoints,
  classes,
  curves,
  feeding,
  optimizers,
  parallel,
  step,
  summary,
)
from training import config as config_lib
from training import metrics as metrics_lib
from training.config import Config
from training.errors import UsageError
from training.progress import Progress
from training.workload import Workload

# Of the time, what checkpoints at the ends of short epochs may take.
_SAVING_SHARE = 0.05


def train(
  config: Config,
  workload: Workload,
  workdir: str | os.PathLike[str],
  *,
  num_devices: int = 0,
  timing: bool = True,
) -> dict[str, Any]:
  """Trains a workload, or continues the run that workdir holds.

  A run that is stopped at any moment and called again ends as if never stopped, bit for
  bit on the same devices. A finished run is only read.

  Args:
    config: a resolved configuration (`resolve` of the tasks package).
    workload: model and data.
    workdir: folder of the run's files; made if needed.
    num_devices: devices of this process to use; 0 uses all.
    timing: False leaves the clock's fields out of `metrics.jsonl`.

  Returns:
    The run's summary, as in `summary.json`.

  Raises:
    UsageError: the configuration, or a workdir that belongs to another.
    TrainingDiverged: a metric or parameter is not finite.
    SystemExit: 128 + signal number after SIGTERM or SIGINT, with a checkpoint saved.
  """
  workdir = pathlib.Path(workdir)
  config_lib.validate(config)
  replicas = parallel.DataParallel(num_devices)
  optimizers.validate(config, replicas.num_replicas)
  config_lib.check(config, workdir)
  finished = summary.read(workdir)
  if finished:
    return finished
  run = _Run(config, workload, workdir, replicas, timing)
  with contextlib.closing(run), _stop_signal() as stop:
    return run.finish() if run.train(stop) else run.leave(stop)


class _Run:
  """One run: its compiled steps, its state, and its files (on the primary process)."""

  def __init__(
    self,
    config: Config,
    workload: Workload,
    workdir: pathlib.Path,
    replicas: parallel.DataParallel,
    timing: bool,
  ):
    self._config, self._workload, self._workdir = config, workload, workdir
    self._replicas = replicas
    groups = optimizers.num_groups(config, replicas.num_replicas)
    self._batches = workload.train.batches(
      config.batch_size,
      shards=(replicas.num_replicas, *([groups] if groups else [])),
      seed=config.seed,
    )
    self._steps_per_epoch = self._batches.steps_per_epoch
    tx = optimizers.build(config, self._steps_per_epoch, replicas.num_replicas)
    model = workload.model
    state = step.init_state(model, tx, workload.example_inputs, config.seed)
    if config.init_from:
      state = state._replace(params=_other_params(config.init_from, workload))
    self._num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    # One compiled step a phase of a periodic method; one for all others.
    self._train_steps = {
      phase: replicas.map(
        step.make_train_step(model, tx, config, groups, phase, workload.augment),
        donate=True,
      )
      for phase in (None, False, True)
    }
    self._eval_step = replicas.map(step.make_eval_step(model, config))
    splits = (workload.train, workload.test)
    resident = feeding.fit(splits, config.device_data_gib)
    self._train_feed, self._test_feed = (
      feeding.Feed(split, replicas, resident=resident) for split in splits
    )
    # Nothing is written before all of the above has proved usable.
    self._checkpoints = self._lock = None
    if parallel.is_primary():
      self._lock = config_lib.claim(config, workdir)
      self._checkpoints = checkpoints.Checkpoints(workdir, config.keep_checkpoints)
    self._restore(state)
    self._metrics = None
    self._progress = None
    if parallel.is_primary():
      self._metrics = metrics_lib.MetricsFile(workdir, self._step, timing=timing)
      self._progress = Progress(config.epochs, config.epochs * self._steps_per_epoch)
      if self._step:
        self._progress.say(f'going on after step {self._step} of {workdir}/')
    self._started = time.monotonic()
    self._next_save = self._started

  def _restore(self, state: step.TrainState) -> None:
    """Takes the newest checkpoint's state and position, else the given state's."""
    position = None
    if self._checkpoints:
      newest = self._checkpoints.restore_newest()
      if newest:
        origin = f'the checkpoint in {self._workdir}'
        state = checkpoints.from_arrays(newest.arrays, state, origin)
        position = newest.position
    position = parallel.broadcast_json(position)
    position = position or {'step': 0, 'epoch': 0, 'start': 0, 'means': None}
    self._step, self._epoch = position['step'], position['epoch']
    self._start = position['start']
    self._means = metrics_lib.EpochMeans(position['means'])
    self._seconds_before = position.get('seconds', 0.0)
    self._stopwatch = feeding.Stopwatch(*position.get('input_wait', ()))
    self._state = self._replicas.replicate(parallel.broadcast(state))

  def train(self, stop: _Stop) -> bool:
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

  def leave(self, stop: _Stop) -> Any:
    """Ends the process as the signal would have done."""
    if self._progress:
      self._progress.say(
        f'stopped after step {self._step}, which is saved: the same command goes on.'
      )
    raise SystemExit(128 + (stop.signal_number or signal.SIGTERM))

  def _train_epoch(self, stop: _Stop) -> bool:
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
        if stopping or (every and self._step % every == 0):
          self._record(pending)
          pending = None
        if stopping:
          return False
        if pending is None:
          self._save()
    self._record(pending)
    return True

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
    test, _ = self._evaluate(self._test_feed)
    self._epoch, self._start = self._epoch + 1, 0
    self._means = metrics_lib.EpochMeans()
    if not self._metrics:
      return
    common = {'step': self._step, 'epoch': self._epoch, 'seconds': self._seconds()}
    self._metrics.write(**common, split='train', **means)
    self._metrics.write(**common, split='test', **test)
    self._progress.test(test['accuracy'])

  def _evaluate(self, feed: feeding.Feed) -> tuple[dict[str, float], np.ndarray]:
    """Mean loss, accuracy and confusion matrix of a split in evaluation mode."""
    batches = feed.split.batches(
      self._config.batch_size, shards=(self._replicas.num_replicas,)
    )
    variables = (self._state.params, self._state.batch_stats)
    sums = [self._eval_step(variables, batch) for batch in feed.epoch(batches, 0)]
    sums = [self._replicas.first(x) for x in sums]
    confusion = np.sum([x.pop('confusion') for x in sums], axis=0, dtype=np.float64)
    total = {name: math.fsum(float(x[name]) for x in sums) for name in sums[0]}
    metrics = {
      'loss': total['loss'] / total['examples'],
      'accuracy': total['correct'] / total['examples'],
    }
    metrics_lib.check_finite(metrics, self._step)
    return metrics, confusion

  def _checkpoint_due(self) -> bool:
    """Whether to save at this end of an epoch."""
    every = self._config.checkpoint_every
    if every:
      return self._step % every == 0
    return time.monotonic() >= self._next_save

  def _save(self) -> None:
    """Stores the state and the position, after the metrics that lead up to it."""
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
    }
    before = time.monotonic()
    self._checkpoints.save(self._replicas.first(self._state), position)
    after = time.monotonic()
    self._next_save = after + (after - before) / _SAVING_SHARE

  def finish(self) -> dict[str, Any]:
    """Evaluates the last parameters and writes summary and picture."""
    train, _ = self._evaluate(self._train_feed)
    test, confusion = self._evaluate(self._test_feed)
    if not self._metrics:
      return {}
    self._progress.close()
    scores = classes.scores(confusion, self._workload.class_names)
    facts = {
      'steps': self._step,
      'epochs': self._epoch,
      'num_parameters': self._num_parameters,
      'num_train_examples': self._workload.train.num_examples,
      'num_test_examples': self._workload.test.num_examples,
      'wall_time_seconds': self._seconds(),
      'input_wait_share': self._stopwatch.share,
      'device': self._replicas.device_kind,
      'num_replicas': self._replicas.num_replicas,
      'test_scores': scores,
    }
    title = f'{self._config.task}, {self._config.optimizer}'
    curves.save(self._workdir, metrics_lib.read(self._workdir), title)
    classes.save(self._workdir, scores, title)
    return summary.write(
      self._workdir, self._config, train=train, test=test, facts=facts
    )

  def _seconds(self) -> float:
    """Wall time of the run over all its starts."""
    return round(self._seconds_before + time.monotonic() - self._started, 3)

  def close(self) -> None:
    """Releases files and threads."""
    if self._metrics:
      self._progress.close()
      self._metrics.close()
    if self._checkpoints:
      self._checkpoints.close()
      self._lock.close()


class _Stop:
  """Whether a signal has asked the run to save and leave."""

  signal_number = 0

  def requested(self, step_number: int) -> bool:
    """Asked on every process after the same steps; all get the same answer."""
    return parallel.agree_to_stop(step_number, bool(self.signal_number))


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
  """Turns SIGTERM and SIGINT into a request, where Python may handle signals."""
  stop = _Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return

  def handle(number, frame):
    del frame
    stop.signal_number = number

  before = {
    number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _other_params(workdir: str, workload: Workload) -> Any:
  """The parameters of another run, which must fit this one's."""
  try:
    return checkpoints.load_variables(workdir, workload)[0]
  except UsageError as error:
    raise UsageError(f'--init_from={workdir}: {error}') from error
