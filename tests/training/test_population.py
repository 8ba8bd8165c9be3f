"""Populations of a sweep: files of the members, kills, members that diverge."""

import dataclasses
import json
import os
import shutil
import signal
import types

import jax
import numpy as np
import pytest

from training import (
  Config,
  TrainingDiverged,
  UsageError,
  checkpoints,
  loop,
  metrics,
  population,
  summary,
  sweep,
)
from training import config as config_lib

_CONFIG = Config(
  optimizer='sam',
  base_optimizer='momentum',
  rho=0.1,
  epochs=2,
  batch_size=8,
  learning_rate=0.05,
  schedule='constant',
  weight_decay=1e-3,
  checkpoint_every=2,
  log_every=2,
)
_BAD = 'bad'


def _like(**fields):
  return dataclasses.replace(_CONFIG, **fields)


# The third is no good: nothing survives its learning rate.
_CONFIGS = {
  'a/one': _CONFIG,
  'a/two': _like(rho=0.3, learning_rate=0.1, seed=5),
  _BAD: _like(learning_rate=1e30),
}
_VMAP = population.Options(mapping='vmap', num_devices=1, timing=False)


class _Killed(Exception):
  """Stands for a kill: nothing of the population's own code runs after it."""


class _Disturbed:
  """A split that calls a function before it gives the batch of a given number."""

  def __init__(self, split, at, action):
    self._split, self._left, self._action = split, at, action
    self.num_examples, self.arrays = split.num_examples, split.arrays

  def batches(self, *args, seed=None, **kwargs):
    inner = self._split.batches(*args, seed=seed, **kwargs)
    if seed is None or len(seed) == 1:  # evaluation, and the plan
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


def _train(problem, workdir, configs=_CONFIGS, options=_VMAP):
  population.train(configs, lambda config: problem, workdir, options)


def _files(workdir):
  """The bytes of the text files, and the numbers of the last checkpoints."""
  found = {}
  for path in sorted(workdir.rglob('*.jsonl')) + sorted(
    workdir.rglob(checkpoints.DIVERGED)
  ):
    found[str(path.relative_to(workdir))] = path.read_bytes()
  for folder in _CONFIGS:
    if (workdir / folder / 'checkpoints').exists():
      arrays = checkpoints.load(workdir / folder).arrays
      found[folder] = {name: x.tobytes() for name, x in arrays.items()}
  return found


@pytest.fixture(scope='module')
def whole(small, tmp_path_factory):
  """The folder of a population that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('population') / 'whole'
  _train(small.problem(), workdir)
  return workdir


@pytest.fixture(scope='module')
def alone(small, tmp_path_factory):
  """The folders of the same runs, trained alone; without the one that diverges."""
  workdir = tmp_path_factory.mktemp('alone')
  for folder in ('a/one', 'a/two'):
    loop.train(
      _CONFIGS[folder], small.problem(), workdir / folder, num_devices=1, timing=False
    )
  return workdir


@pytest.mark.parametrize('folder', ['a/one', 'a/two'])
def test_a_member_leaves_the_files_of_a_single_run(folder, whole, alone):
  ours, theirs = whole / folder, alone / folder
  assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
  assert config_lib.load(ours) == config_lib.load(theirs) == _CONFIGS[folder]
  got, expected = metrics.read(ours), metrics.read(theirs)
  assert len(got) == len(expected)
  for a, b in zip(got, expected, strict=True):
    assert list(a) == list(b)
    for name, value in b.items():
      close = isinstance(value, float) and value
      assert a[name] == (pytest.approx(value, rel=1e-4) if close else value), name
  a, b = summary.read(ours), summary.read(theirs)
  assert a.pop('population') == {'members': 3, 'mapping': 'vmap', 'devices': 1}
  assert a.keys() == b.keys()
  for key in ('final', 'best'):
    assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
  for key in ('steps', 'epochs', 'num_parameters', 'seed', 'rho', 'num_replicas'):
    assert a[key] == b[key]
  a, b = checkpoints.load(ours), checkpoints.load(theirs)
  assert a.position.keys() == b.position.keys()
  assert a.position['start'] == b.position['start'] == 0
  assert a.arrays.keys() == b.arrays.keys()
  for name, array in b.arrays.items():
    assert a.arrays[name].dtype == array.dtype
    np.testing.assert_allclose(a.arrays[name], array, rtol=1e-3, atol=1e-6)


def test_a_member_that_diverges_stops_and_is_told(whole, small, capsys, tmp_path):
  assert not (whole / population.FOLDER).exists()
  assert {p.name for p in (whole / _BAD).iterdir()} == {
    '.lock',
    'config.json',
    'diverged.json',
    'metrics.jsonl',
  }
  number = checkpoints.diverged(whole / _BAD)
  assert number in (1, 2, 3)
  assert all(line['step'] < number for line in metrics.read(whole / _BAD))
  assert checkpoints.diverged(whole / 'a/one') is None
  with pytest.raises(UsageError, match=f'diverged at step {number} and has no ch'):
    checkpoints.load(whole / _BAD)
  # A second start neither trains anything nor fails.
  files = {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
  _train(small.problem(), whole)
  assert files == {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('at', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_killed_population_ends_as_if_never_stopped(at, whole, small, tmp_path):
  def kill():
    raise _Killed

  workdir = tmp_path / 'sweep'
  with pytest.raises(_Killed):
    _train(small.problem(_Disturbed(small.split(22), at, kill)), workdir)
  with (workdir / 'a/one/metrics.jsonl').open('a') as file:
    file.write('{"step": 99, "epoch": 1, "split": "step"}\n{"step": 3, "lo')
  # The mapping, and the members, are those of the first start.
  _train(
    small.problem(),
    workdir,
    dict(reversed(_CONFIGS.items())),
    _VMAP._replace(mapping='map'),
  )
  assert _files(workdir) == _files(whole)
  assert not (workdir / population.FOLDER).exists()


@pytest.mark.slow
def test_a_population_killed_while_it_ends(whole, small, tmp_path, monkeypatch):
  """One member has its summary, the other only its checkpoint."""
  finish, calls = summary.finish, []

  def kill(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
      raise _Killed
    return finish(*args, **kwargs)

  monkeypatch.setattr(summary, 'finish', kill)
  with pytest.raises(_Killed):
    _train(small.problem(), tmp_path)
  first = (tmp_path / 'a/one/summary.json').stat().st_mtime_ns
  _train(small.problem(), tmp_path)
  assert (tmp_path / 'a/one/summary.json').stat().st_mtime_ns == first
  assert _files(tmp_path) == _files(whole)
  assert (
    summary.read(tmp_path / 'a/two')['final'] == summary.read(whole / 'a/two')['final']
  )


@pytest.mark.slow
def test_a_signal_saves_the_population_first(whole, small, tmp_path, capsys):
  def send():
    os.kill(os.getpid(), signal.SIGTERM)

  disturbed = small.problem(_Disturbed(small.split(22), 3, send))
  with pytest.raises(SystemExit) as caught:
    _train(disturbed, tmp_path)
  assert caught.value.code == 128 + signal.SIGTERM
  assert 'which is saved: the same command goes on' in capsys.readouterr().out
  _train(small.problem(), tmp_path)
  assert 'going on after step ' in capsys.readouterr().out
  assert _files(tmp_path) == _files(whole)


@pytest.mark.slow
def test_a_member_goes_on_alone_for_more_epochs(whole, small, tmp_path):
  """As a run of all epochs alone, within float32."""
  config = _like(epochs=3)
  shutil.copytree(whole / 'a/one', tmp_path / 'longer')
  for name in ('longer', 'alone'):
    loop.train(config, small.problem(), tmp_path / name, num_devices=1, timing=False)
  ours, theirs = (summary.read(tmp_path / name) for name in ('longer', 'alone'))
  assert ours['final'] == pytest.approx(theirs['final'], rel=1e-3, abs=1e-6)
  steps = [line['step'] for line in metrics.read(tmp_path / 'longer')]
  assert steps == [line['step'] for line in metrics.read(tmp_path / 'alone')]


def test_a_sweep_leaves_the_diverged_out_of_its_means(whole, small):
  """The others as they were; no run is trained again."""
  options = {'num_devices': 1, 'timing': False}
  found = sweep.run(
    _CONFIGS, lambda config: small.problem(), whole, population=_VMAP, **options
  )
  number = checkpoints.diverged(whole / _BAD)
  assert found['diverged'] == {_BAD: number}
  assert list(found['runs']) == ['a/one', 'a/two']
  assert json.loads((whole / 'sweep.json').read_text())['diverged'] == {_BAD: number}
  # One and the bad one are seeds of one row, by what was swept.
  row = found['rows'][0]
  assert row['seeds'] == 1
  assert row['test_loss'] == summary.read(whole / 'a/one')['final']['test_loss']
  (whole / 'sweep.json').unlink()
  with pytest.raises(TrainingDiverged, match='all 1 runs in .* have diverged'):
    sweep.run({_BAD: _CONFIGS[_BAD]}, lambda config: small.problem(), whole, **options)


def test_chunks_choices_and_what_is_left(small, tmp_path, capsys):
  """Streamed batches, two chunks, a run with no other, and a choice by measurement."""
  configs = {
    f'{seed}': _like(seed=seed, epochs=1, device_data_gib=0) for seed in range(4)
  }
  configs['alone'] = _like(rho=0.0, epochs=1, device_data_gib=0)
  options = population.Options(gib=1e-9, num_devices=1, timing=False)
  with pytest.raises(UsageError, match='--population: one member needs'):
    _train(small.problem(), tmp_path, configs, options)
  assert not list(tmp_path.iterdir())
  members = population.grouping.need(*_probe(small.problem(), configs['0']))
  room = (
    2.5 * (members.state + members.work) + members.shared
  ) / population.grouping.GIB
  _train(small.problem(), tmp_path, configs, options._replace(gib=room))
  said = capsys.readouterr().out
  assert '4 runs share a program and are trained as one in 2 populations' in said
  assert said.count('ms by vmap and') == 1
  assert '2/2 members, medians:' in said
  assert not (tmp_path / 'alone').exists()
  for seed in range(4):
    assert summary.read(tmp_path / f'{seed}')['population']['members'] == 2
  loop.train(configs['2'], small.problem(), tmp_path / 'x', num_devices=1, timing=False)
  ours, theirs = (summary.read(tmp_path / name)['final'] for name in ('2', 'x'))
  assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def _probe(problem, config):
  stepper, batches = population.population_run.stepper_of(
    config, problem, [config.seed]
  )
  one = population.Members(stepper, 1, jax.local_devices()[:1])
  return one, None, one.shapes([]), None, next(iter(batches.epoch(0)))


def test_a_damaged_list_of_members_is_refused(small, tmp_path):
  path = tmp_path / population.FOLDER / '0' / 'population.json'
  path.parent.mkdir(parents=True)
  path.write_text('{"members": ')
  with pytest.raises(UsageError, match=r'population.json is damaged .*: remove '):
    _train(small.problem(), tmp_path)


def test_streams_are_refused(small):
  """A stream has one order, and its members would silently share it."""
  stream = types.SimpleNamespace(batches=lambda size: Stream())
  with pytest.raises(UsageError, match='are streamed, in the order of one seed'):
    population._require_order(small.problem()._replace(train=stream))


class Stream:
  """Stands for batches of streamed images."""

  def local_epoch(self, epoch, start, local):
    """Never called."""
