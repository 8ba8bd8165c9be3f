"""What a measurement says while it runs: its stage, and the time left by a clock."""

import io

import pytest

import measurements
from measurements import runner
from measurements.stages import Stages
from training.ticker import Ticker


class _Clock:
  """A clock that is set by hand."""

  time = 0.0

  def __call__(self):
    return self.time


@pytest.fixture
def said():
  """Stages of 3, their clock, and a function that takes the lines shown so far."""
  stream, clock = io.StringIO(), _Clock()
  stages = Stages(Ticker(stream, plain_seconds=0.0), 3, clock)

  def lines():
    found = stream.getvalue().splitlines()
    stream.seek(0)
    stream.truncate()
    return found

  return stages, clock, lines


def test_stages_are_numbered(said):
  stages, _, lines = said
  stages.begin('eigenvalues')
  stages.show('eigenpairs: 4 products')
  stages.begin('trace')
  assert lines() == [
    'stage 1 of 3: eigenvalues',
    'stage 1 of 3: eigenpairs: 4 products',
    'stage 2 of 3: trace',
  ]


@pytest.mark.parametrize('first', [0, 1, 12])
def test_time_left_is_that_of_the_pieces_after_the_first(said, first):
  """Whatever the first piece took, and whatever was done before a kill."""
  stages, clock, lines = said
  stages.begin('landscape')
  stages.count(first, 20)
  clock.time = 500.0
  if not first:
    stages.count(1, 20)
  else:
    clock.time = 0.0
  start, base = clock.time, max(first, 1)
  stages.show('begun')
  for piece in range(base + 1, 21):
    clock.time = start + 7.0 * (piece - base)
    stages.count(piece, 20)
    stages.show('on')
    minutes, seconds = divmod(7 * (20 - piece), 60)
    assert lines()[-1] == f'stage 1 of 3: on, {minutes}:{seconds:02} left'


def test_time_runs_between_two_pieces_and_ends_with_the_stage(said):
  stages, clock, lines = said
  stages.begin('one batch')
  for piece in (1, 2):
    clock.time = 30.0 * piece
    stages.count(piece, 4)
  for later in (0.0, 25.0, 100.0):
    clock.time = 60.0 + later
    stages.show('batch 3 of 4')
  stages.begin('landscape')
  stages.show('no count')
  assert lines()[1:] == [
    'stage 1 of 3: batch 3 of 4, 1:00 left',
    'stage 1 of 3: batch 3 of 4, 0:35 left',
    'stage 1 of 3: batch 3 of 4, 0:00 left',
    'stage 2 of 3: landscape',
    'stage 2 of 3: no count',
  ]


def test_pieces_of_another_number_are_counted_anew(said):
  stages, clock, lines = said
  stages.begin('layers')
  for piece in (1, 2):
    clock.time = 10.0 * piece
    stages.count(piece, 30)
  stages.count(0, 2)
  stages.show('Dense_0')
  assert lines()[-1] == 'stage 1 of 3: Dense_0'


def test_a_measurement_tells_its_stages(network, fast, tmp_path, monkeypatch):
  stream = io.StringIO()
  monkeypatch.setattr(runner, 'Ticker', lambda: Ticker(stream, plain_seconds=0.0))
  options = fast.but(trace_matvecs=5, landscape_points=3, one_batch_repeats=0)
  only = ['trace', 'landscape']
  measurements.measure(network, tmp_path, options, only)
  lines = [line.split(', ')[0] for line in stream.getvalue().splitlines()]
  assert lines[0] == 'stage 1 of 3: eigenvalues'
  assert any(line.startswith('stage 1 of 3: eigenpairs: ') for line in lines)
  expected = ['trace', *(f'trace: {n} of 5 products' for n in range(1, 6))]
  found = [line for line in lines if 'stage 2' in line]
  assert found == [f'stage 2 of 3: {text}' for text in expected]
  assert 'stage 3 of 3: landscape: 9 of 9 points' in lines
  assert '0:00 left' in stream.getvalue()
  # What the options switch off is no stage.
  stream.truncate(0)
  options = fast.but(landscape_points=0, one_batch_repeats=0)
  measurements.Measurer(network.problem, options).measure(network, tmp_path / 'all')
  active = runner._active(measurements.choose(None, options), options)
  assert 'landscape' not in active and 'one_batch' not in active and 'trace' in active
  assert f'stage {len(active)} of {len(active)}: ' in stream.getvalue()
