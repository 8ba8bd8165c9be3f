"""More epochs for a finished run: the same run as one that was started with them."""

import dataclasses
import json

import pytest

from training import Config, UsageError, checkpoints, extension, loop, metrics, summary
from training import config as config_lib

_CONFIG = Config(
  optimizer='sam',
  base_optimizer='adam',
  rho=0.1,
  epochs=3,
  batch_size=8,
  learning_rate=0.01,
  schedule='constant',
  warmup_epochs=0.5,
  perturb_from=0.4,
)


def _with(**fields):
  return dataclasses.replace(_CONFIG, **fields)


def _train(small, workdir, **fields):
  options = {'num_devices': 1, 'timing': False}
  return loop.train(_with(**fields), small.problem(), workdir, **options)


def test_more_epochs_change_no_bit(small, tmp_path):
  whole, grown = tmp_path / 'whole', tmp_path / 'grown'
  expected = _train(small, whole)
  _train(small, grown, epochs=1)
  (grown / 'sharpness.json').write_text('{"lambda_max": 1}')  # As a sweep measures it.
  found = _train(small, grown)
  assert config_lib.load(grown) == _CONFIG
  assert not (grown / 'sharpness.json').exists()
  clock = ('wall_time_seconds', 'input_wait_share')
  for name in set(expected) - set(clock):
    assert found[name] == expected[name], name
  lines = [(workdir / 'metrics.jsonl').read_bytes() for workdir in (whole, grown)]
  assert lines[0] == lines[1]
  arrays = [checkpoints.load(workdir).arrays for workdir in (whole, grown)]
  assert {n: x.tobytes() for n, x in arrays[0].items()} == {
    n: x.tobytes() for n, x in arrays[1].items()
  }
  # Fewer are still refused.
  with pytest.raises(UsageError, match='epochs is 3 there and 2 here'):
    extension.check(_with(epochs=2), grown)


@pytest.mark.parametrize(('every', 'first'), [(2, 1), (2, 2)])
def test_only_the_tests_of_the_whole_run_stay(small, tmp_path, every, first):
  """The test at the end of a shorter run is not one of the longer run's."""
  whole, grown = tmp_path / 'whole', tmp_path / 'grown'
  expected = _train(small, whole, evaluate_every=every)
  _train(small, grown, evaluate_every=every, epochs=first)
  assert metrics.read(grown)[-1]['split'] == 'test'
  found = _train(small, grown, evaluate_every=every)
  lines = [(workdir / 'metrics.jsonl').read_bytes() for workdir in (whole, grown)]
  assert lines[0] == lines[1]
  assert found['best'] == expected['best'] and found['final'] == expected['final']


def _finished(workdir, config):
  config_lib.claim(config, workdir).close()
  (workdir / summary.FILE_NAME).write_text(json.dumps({'epochs': config.epochs}))


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'schedule': 'cosine'}, 'epochs=3, and --schedule=cosine stretches over all'),
    ({'schedule': 'step'}, 'epochs=3, and --schedule=step stretches over all'),
    ({'optimizer': 'gsam'}, 'epochs=3, and --optimizer=gsam counts on the number'),
  ],
)
def test_another_run_is_refused(tmp_path, fields, words):
  _finished(tmp_path, _with(**fields))
  with pytest.raises(UsageError, match=f'--epochs=9: .*{words}'):
    extension.check(_with(epochs=9, **fields), tmp_path)


def test_other_fields_are_named_as_ever(tmp_path):
  _finished(tmp_path, _CONFIG)
  with pytest.raises(UsageError, match='rho is 0.1 there and 0.2 here') as caught:
    extension.check(_with(epochs=9, rho=0.2), tmp_path)
  assert 'epochs is 3 there and 9 here' in str(caught.value)


def test_a_start_that_is_killed_on_the_way_loses_nothing(tmp_path, monkeypatch):
  """At each moment the folder is an unfinished run of one of the two lengths."""
  _finished(tmp_path, _CONFIG)
  longer = _with(epochs=9, keep_checkpoints=7)

  def save(config, workdir):
    assert config == longer and extension.finished(_CONFIG, tmp_path) is None
    raise KeyboardInterrupt

  monkeypatch.setattr(config_lib, 'save', save)
  with pytest.raises(KeyboardInterrupt):
    extension.claim(longer, tmp_path)
  monkeypatch.undo()
  extension.check(longer, tmp_path)
  extension.claim(longer, tmp_path).close()
  assert config_lib.load(tmp_path) == longer
  assert extension.finished(longer, tmp_path) is None
