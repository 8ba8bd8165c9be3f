"""The loop: resumed runs equal uninterrupted ones, bit for bit."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from training import (
  Config,
  TrainingDiverged,
  UsageError,
  checkpoints,
  loop,
  metrics,
  summary,
)
from training import config as config_lib
from training.hooks import Hook

_CONFIG = Config(
  optimizer='sam',
  base_optimizer='adam',
  rho=0.1,
  epochs=3,
  batch_size=8,
  learning_rate=0.01,
  checkpoint_every=2,
  log_every=2,
)
_STEPS = 9  # 3 epochs of 22 examples in batches of 8


class _Killed(Exception):
  """Stands for a kill: nothing of the run's own code runs after it."""


class _Disturbed:
  """A split that calls a function before it gives the batch of a given number."""

  def __init__(self, split, at, action):
    self._split, self._left, self._action = split, at, action
    self.num_examples, self.arrays = split.num_examples, split.arrays

  def batches(self, *args, seed=None, **kwargs):
    inner = self._split.batches(*args, seed=seed, **kwargs)
    if seed is None:  # evaluation
      return inner
    outer = self

    class Batches:
      steps_per_epoch = inner.steps_per_epoch

      def indices(self, epoch, start=0):
        for indices in inner.indices(epoch, start):
          if outer._left == 0:
            outer._action()
          outer._left -= 1
          yield indices

    return Batches()


def _train(problem, workdir, config=_CONFIG):
  return loop.train(config, problem, workdir, num_devices=2, timing=False)


def _outcome(workdir):
  """The final parameters and the metrics, as bytes."""
  arrays = checkpoints.load(workdir).arrays
  lines = (workdir / 'metrics.jsonl').read_bytes()
  return {name: array.tobytes() for name, array in arrays.items()}, lines


@pytest.fixture(scope='module')
def titles():
  """The titles of the figures that a run draws, in their order."""
  return []


@pytest.fixture(scope='module')
def whole(small, titles, tmp_path_factory):
  """The workdir of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('loop') / 'whole'
  save = Figure.savefig

  def savefig(figure, *args, **options):
    titles.append(figure.get_suptitle() or figure.axes[0].get_title())
    save(figure, *args, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Figure, 'savefig', savefig)
    _train(small.problem(), workdir)
  return workdir


def test_figures_of_a_run_name_it(whole, titles):
  config = config_lib.load(whole)
  assert titles == [config_lib.title(config)] * 2
  words = f'{config.optimizer} over {config.base_optimizer}, rho {config.rho:g}, seed '
  assert words in titles[0]


def test_files_and_numbers_of_a_run(whole, small):
  assert {p.name for p in whole.iterdir()} == {
    '.lock',
    'config.json',
    'metrics.jsonl',
    'checkpoints',
    'summary.json',
    'confusion.png',
    'curves.png',
  }
  lines = metrics.read(whole)
  train = [line for line in lines if line['split'] == 'train']
  assert [line['step'] for line in train] == [3, 6, 9]
  assert [x['step'] for x in lines if x['split'] == 'step'] == [2, 4, 6, 8]
  assert all(line['perturbed_loss'] > line['loss'] for line in train)
  final = summary.read(whole)['final']
  gap = final['test_loss'] - final['train_loss']
  assert final['generalization_gap'] == gap
  tests = [line for line in lines if line['split'] == 'test']
  assert tests[-1]['loss'] == final['test_loss']
  assert summary.read(whole)['num_parameters'] == 5 * 8 + 8 + 2 * 8 + 8 * 3 + 3


def test_the_logged_loss_is_that_of_the_checkpoint(whole, small):
  problem = small.problem()
  arrays = checkpoints.load(whole).arrays
  p = checkpoints.select(arrays, 'params')
  stats = checkpoints.select(arrays, 'batch_stats')
  batch = next(problem.test.batches(13).epoch(0))
  x = batch['inputs'] @ p['Dense_0/kernel'] + p['Dense_0/bias']
  x = (x - stats['BatchNorm_0/mean']) / np.sqrt(stats['BatchNorm_0/var'] + 1e-5)
  x = np.tanh(x * p['BatchNorm_0/scale'] + p['BatchNorm_0/bias'])
  logits = x @ p['Dense_1/kernel'] + p['Dense_1/bias']
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  targets = np.where(np.eye(3)[batch['labels']] > 0, 0.9, 0.05)
  loss = (targets * (np.log(targets) - log_probs)).sum(-1).mean()
  final = summary.read(whole)['final']
  np.testing.assert_allclose(final['test_loss'], loss, rtol=1e-5)
  accuracy = (logits.argmax(-1) == batch['labels']).mean()
  np.testing.assert_allclose(final['test_accuracy'], accuracy, rtol=1e-6)


@pytest.mark.parametrize(
  'at', [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 3, 4, 8))]
)
def test_a_killed_run_ends_as_if_never_stopped(whole, small, tmp_path, at):
  def kill():
    raise _Killed

  workdir = tmp_path / 'run'
  with pytest.raises(_Killed):
    _train(small.problem(_Disturbed(small.split(22), at, kill)), workdir)
  # What a kill may leave: lines beyond the checkpoint, and half of one.
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 99, "epoch": 1, "split": "step"}\n{"step": 3, "lo')
  _train(small.problem(), workdir)
  assert _outcome(workdir) == _outcome(whole)


@pytest.mark.parametrize(
  'number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_first(whole, small, tmp_path, capsys, number):
  def send():
    os.kill(os.getpid(), number)

  config = dataclasses.replace(_CONFIG, checkpoint_every=0)
  disturbed = small.problem(_Disturbed(small.split(22), 4, send))
  before = signal.getsignal(number)
  with pytest.raises(SystemExit) as caught:
    _train(disturbed, tmp_path / 'run', config)
  assert caught.value.code == 128 + number
  assert signal.getsignal(number) is before
  saved = checkpoints.load(tmp_path / 'run').position
  # The batch was being made while a step before it ran.
  assert 3 <= saved['step'] <= 5
  assert f'\nstopped after step {saved["step"]}, which is' in capsys.readouterr().out
  _train(small.problem(), tmp_path / 'run')
  assert f'going on after step {saved["step"]} of' in capsys.readouterr().out
  assert _outcome(tmp_path / 'run') == _outcome(whole)


@pytest.mark.slow
def test_streamed_batches_change_no_bit(whole, small, tmp_path):
  def kill():
    raise _Killed

  workdir = tmp_path / 'run'
  with pytest.raises(_Killed):
    _train(small.problem(_Disturbed(small.split(22), 4, kill)), workdir)
  config = dataclasses.replace(_CONFIG, device_data_gib=0.0)
  _train(small.problem(), workdir, config)
  assert _outcome(workdir) == _outcome(whole)
  for run in (whole, workdir):
    assert 0 < summary.read(run)['input_wait_share'] < 1


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_no_bit(whole, small, tmp_path):
  def kill():
    raise _Killed

  workdir = tmp_path / 'run'
  with pytest.raises(_Killed):
    _train(small.problem(_Disturbed(small.split(22), 5, kill)), workdir)
  newest = max((workdir / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  (newest / 'state' / 'manifest.ocdbt').write_bytes(b'\0')
  with pytest.warns(UserWarning, match=f'step {newest.name} .* is damaged'):
    _train(small.problem(), workdir)
  assert _outcome(workdir) == _outcome(whole)


def test_a_number_that_is_none_stops_and_keeps_the_last_good(small, tmp_path):
  train = small.split(22)
  # An example of the third batch of the first epoch.
  (example,) = train.batches(8, shards=(1,), seed=0).indices(0)[2][0, :1]
  train.arrays['inputs'][example] = np.nan
  config = dataclasses.replace(_CONFIG, checkpoint_every=1)
  with pytest.raises(TrainingDiverged, match='loss of step 3 is nan'):
    _train(small.problem(train), tmp_path, config)
  kept = checkpoints.load(tmp_path)
  assert kept.position['step'] == 2
  assert all(np.isfinite(x).all() for x in kept.arrays.values())
  assert not (tmp_path / 'summary.json').exists()


def test_a_finished_run_is_only_read(whole, small):
  files = {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
  again = _train(small.problem(), whole)
  assert again == json.loads((whole / 'summary.json').read_text())
  assert files == {p: p.stat().st_mtime_ns for p in whole.rglob('*')}


def test_a_foreign_workdir_is_left_alone(whole, small):
  files = {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
  with pytest.raises(UsageError, match='rho is 0.1 there and 0.3 here'):
    _train(small.problem(), whole, dataclasses.replace(_CONFIG, rho=0.3))
  assert files == {p: p.stat().st_mtime_ns for p in whole.rglob('*')}


def test_parameters_of_another_run(whole, small, tmp_path):
  config = dataclasses.replace(
    _CONFIG, init_from=str(whole), learning_rate=0.0, epochs=1
  )
  _train(small.problem(), tmp_path / 'run', config)
  ours, theirs = (
    checkpoints.select(checkpoints.load(w).arrays, 'params')
    for w in (tmp_path / 'run', whole)
  )
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name])


def test_parameters_of_another_model_are_refused(whole, small, tmp_path):
  problem = small.problem()._replace(example_inputs=np.zeros((1, 6), np.float32))
  config = dataclasses.replace(_CONFIG, init_from=str(whole))
  with pytest.raises(UsageError, match=r'init_from=.*0/kernel is float32\[5, 8\]'):
    _train(problem, tmp_path / 'run', config)
  assert not (tmp_path / 'run').exists()


class _Norm(Hook):
  """A hook: the sum of squares of the parameters."""

  name = 'norm'

  def __init__(self, every, log=None):
    self._every, self._log = every, log

  def due(self, step, steps_per_epoch):
    return step % (self._every or steps_per_epoch) == 0

  def __call__(self, state, step):
    assert set(state.batch_stats['BatchNorm_0']) == {'mean', 'var'}
    leaves = jax.tree.leaves(state.params)
    return {'value': float(sum((np.asarray(x, float) ** 2).sum() for x in leaves))}


@pytest.mark.parametrize(('every', 'steps'), [(2, [0, 2, 4, 6, 8]), (0, [0, 3, 6, 9])])
def test_hooks_measure_the_network_of_their_step(every, steps, small, tmp_path):
  hooks = [_Norm(every)]
  loop.train(
    _CONFIG, small.problem(), tmp_path, num_devices=2, timing=False, hooks=hooks
  )
  lines = [x for x in metrics.read(tmp_path) if x['split'] == 'norm']
  assert [line['step'] for line in lines] == steps
  epochs = [-(-step // 3) for step in steps]
  assert [line['epoch'] for line in lines] == epochs
  arrays = checkpoints.select(checkpoints.load(tmp_path).arrays, 'params')
  last = sum((x.astype(float) ** 2).sum() for x in arrays.values())
  if steps[-1] == 9:
    np.testing.assert_allclose(lines[-1]['value'], last, rtol=1e-12)


class _Counted(Hook):
  """A hook whose values depend on how often it was called, and which draws."""

  name = 'counted'

  def __init__(self):
    self.recall({})

  def due(self, step, steps_per_epoch):
    return True

  def __call__(self, state, step):
    self._calls += 1
    return {'calls': int(self._calls)}

  def memory(self):
    return {'calls': np.array(self._calls)}

  def recall(self, memory):
    self._calls = memory.get('calls', np.array(0))

  def draw(self, workdir, lines):
    (workdir / 'counted.txt').write_text(str(len(lines)))
    return True

  def summarize(self, lines, step):
    return {'last': lines[-1]['calls']}


@pytest.mark.parametrize('stop', [4, 5])
def test_what_a_hook_remembers_is_kept_over_a_kill(stop, small, tmp_path):
  problem = small.problem()
  run = lambda where, problem: loop.train(
    _CONFIG, problem, tmp_path / where, timing=False, hooks=[_Counted()]
  )
  whole = run('whole', problem)['during_training']['counted']
  assert whole['last'] == _STEPS + 1
  assert 0 <= whole['share_of_wall_time'] < 1
  assert (tmp_path / 'whole' / 'counted.txt').read_text() == str(_STEPS + 1)

  def kill():
    raise _Killed

  with pytest.raises(_Killed):
    run('cut', problem._replace(train=_Disturbed(problem.train, stop, kill)))
  run('cut', problem)
  texts = [(tmp_path / name / 'metrics.jsonl').read_text() for name in ('cut', 'whole')]
  assert texts[0] == texts[1]


@pytest.mark.parametrize('every', [2, 5])
def test_the_test_split_is_evaluated_now_and_then_and_at_the_end(
  every, small, tmp_path
):
  config = dataclasses.replace(_CONFIG, evaluate_every=every)
  found = loop.train(config, small.problem(), tmp_path, timing=False)
  lines = metrics.read(tmp_path)
  epochs = {
    s: [x['epoch'] for x in lines if x['split'] == s] for s in ('train', 'test')
  }
  assert epochs == {'train': [1, 2, 3], 'test': [2, 3] if every == 2 else [3]}
  assert lines[-1]['loss'] == found['final']['test_loss']


@pytest.mark.parametrize('stop', [2, 3])
def test_a_resumed_run_writes_the_lines_of_its_hooks_once(
  stop, small, tmp_path, monkeypatch
):
  make = lambda where: loop.train(
    _CONFIG,
    small.problem(),
    tmp_path / where,
    num_devices=2,
    timing=False,
    hooks=[_Norm(1)],
  )
  make('whole')
  with monkeypatch.context() as patch:
    patch.setattr(loop.parallel, 'agree_to_stop', lambda step, asked: step == stop)
    with pytest.raises(SystemExit):
      make('cut')
  make('cut')
  texts = [(tmp_path / name / 'metrics.jsonl').read_text() for name in ('cut', 'whole')]
  assert texts[0] == texts[1]
