"""The metrics file and the running means."""

import json
import math

import pytest

from training import TrainingDiverged, metrics


def _line(step):
  return json.dumps({'step': step, 'split': 'train', 'loss': step / 3}) + '\n'


@pytest.mark.parametrize('tail', ['', '{"step": 2, "lo', '\x00\x00', _line(9)[:-1]])
def test_the_file_is_cut_back_to_the_restored_step(tmp_path, tail):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(''.join(map(_line, [1, 2, 3, 4])) + tail)
  file = metrics.MetricsFile(tmp_path, 2, 'accuracy')
  file.write(step=3, split='train', loss=0.5)
  file.flush()
  file.close()
  assert path.read_text().startswith(_line(1) + _line(2))
  assert [line['step'] for line in metrics.read(tmp_path)] == [1, 2, 3]


def test_lines_have_every_field_and_no_clock_when_told(tmp_path):
  file = metrics.MetricsFile(tmp_path, 0, 'accuracy')
  file.write(step=1, seconds=2.0)
  file.close()
  (line,) = metrics.read(tmp_path)
  assert list(line) == [
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
  ]
  assert line['rho'] is None
  file = metrics.MetricsFile(tmp_path, 0, 'accuracy', timing=False)
  file.write(step=1, seconds=2.0)
  file.close()
  (line,) = metrics.read(tmp_path)
  assert 'seconds' not in line and 'examples_per_second' not in line


def test_means_weigh_by_examples_and_survive_json():
  steps = [
    {'loss': 1.0, 'accuracy': 0.5, 'examples': 30.0, 'learning_rate': 0.1},
    {'loss': 4.0, 'accuracy': 1.0, 'examples': 10.0, 'learning_rate': 0.05},
  ]
  means = metrics.EpochMeans()
  for step in steps:
    means = metrics.EpochMeans(json.loads(json.dumps(means.state)))
    means.add(step, seconds=2.0)
  got = means.means()
  assert got['loss'] == (30 * 1.0 + 10 * 4.0) / 40
  assert got['accuracy'] == (30 * 0.5 + 10 * 1.0) / 40
  assert got['learning_rate'] == 0.05
  assert got['examples_per_second'] == 10.0


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_number_that_is_none_stops_the_run(value):
  with pytest.raises(TrainingDiverged, match=f'gradient_norm of step 7 is {value}'):
    metrics.check_finite({'loss': 1.0, 'gradient_norm': value}, 7)
