"""Landscapes that are killed and go on: no point twice, the same bits."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import landscape

_ROOT = pathlib.Path(__file__).parents[2]
_X, _Y = np.linspace(-1, 1, 4), np.linspace(-1, 1, 3)
_DATA = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
_PARAMS = {'w': jnp.array([[1.0, -2.0], [0.5, 0.1]])}
_DIRECTIONS = landscape.random_directions(jax.random.key(0), _PARAMS)


class Interrupted(Exception):
  """Stands for whatever ends a run."""


class Counted:
  """Batches that count how often they are gone through and may stop the run."""

  def __init__(self, stop_at=0, stop=None):
    self.turns = -1  # the first turn only asks for the weights
    self._stop_at = stop_at
    self._stop = stop

  def __iter__(self):
    self.turns += 1
    if self._stop_at and self.turns == self._stop_at:
      self._stop()
    return iter([_DATA[:4], _DATA[4:]])


def _interrupt():
  raise Interrupted


def _loss(params, batch):
  return jnp.mean(jnp.tanh(batch @ params['w']) ** 2)


def _surface(batches, record=None, params=_PARAMS, x=_X, **options):
  return landscape.surface(
    _loss, params, _DIRECTIONS, x, _Y, batches, record=record, **options
  ).loss


def _one(batches, record=None, **options):
  return _surface(batches, record, devices=jax.local_devices()[:1], **options)


@pytest.fixture(scope='module')
def expected():
  return _one(Counted())


@pytest.mark.parametrize('stop_at', [1, 2, 7, 12])
def test_an_interrupted_surface_goes_on(tmp_path, expected, stop_at):
  record = tmp_path / 'points'
  with pytest.raises(Interrupted):
    _one(Counted(stop_at, _interrupt), record)
  # The last point that was evaluated had not been read.
  missing = 12 - max(stop_at - 2, 0)
  batches, seen = Counted(), []
  got = _one(batches, record, progress=lambda *done: seen.append(done))
  np.testing.assert_array_equal(got, expected)
  assert batches.turns == missing
  assert seen == [(done, 12) for done in range(13 - missing, 13)]
  again = Counted()
  np.testing.assert_array_equal(_one(again, record), expected)
  assert again.turns == 0


def test_on_all_devices_a_surface_goes_on_too(tmp_path, expected):
  record = tmp_path / 'points'
  with pytest.raises(Interrupted):
    _surface(Counted(11, _interrupt), record)
  batches = Counted()
  np.testing.assert_array_equal(_surface(batches, record), expected)
  assert batches.turns == 12 - 2


@pytest.mark.parametrize('tail', [b'7', b'2 0x1.8', b'1 0x1.0p+0 \n', b'99 0x1.0p+0\n'])
def test_a_damaged_end_is_cut_off(tmp_path, expected, tail):
  record = tmp_path / 'points'
  _one(Counted(), record)
  whole = record.read_bytes()
  lines = whole.splitlines(keepends=True)
  record.write_bytes(b''.join(lines[:5]) + tail)
  batches = Counted()
  np.testing.assert_array_equal(_one(batches, record), expected)
  assert batches.turns == 12 - 4
  assert record.read_bytes() == whole


@pytest.mark.parametrize('half', [b'', b'sam_jax lands'])
def test_a_file_without_a_whole_first_line_is_started_anew(tmp_path, expected, half):
  record = tmp_path / 'points'
  record.write_bytes(half)
  np.testing.assert_array_equal(_one(Counted(), record), expected)


def test_a_record_of_something_else_is_not_mixed_in(tmp_path):
  record = tmp_path / 'points'
  _one(Counted(), record)
  other = {'w': _PARAMS['w'].at[0, 0].add(1e-7)}
  for change in ({'x': _X + 0.01}, {'params': other}):
    batches = Counted()
    _one(batches, record, **change)
    assert batches.turns == 12
  fewer = [_DATA[:4]]
  np.testing.assert_array_equal(
    _one(fewer, record, params=other), _one(fewer, params=other)
  )


def test_infinity_nan_and_signed_zero_come_back(tmp_path):
  values = np.array([np.inf, -np.inf, np.nan, -0.0, 5e-324, 0.1])

  def look_up(index, batch):
    del batch
    return jnp.array(values, jnp.float32)[index.astype(int)]

  def evaluate():
    return landscape.line(
      look_up, jnp.float32(0), jnp.float32(1), range(6), [_DATA], record=tmp_path / 'p'
    ).loss

  first = evaluate()
  np.testing.assert_array_equal(first, values.astype(np.float32))
  np.testing.assert_array_equal(np.signbit(evaluate()), np.signbit(first))


_PROGRAM = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_landscape_record as t
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
result = t._one(t.Counted(int(sys.argv[2]), kill), sys.argv[1])
sys.stdout.write(result.tobytes().hex())
"""


@pytest.mark.slow
def test_kill_9_in_the_middle(tmp_path, expected):
  """A real process, killed twice and then left to finish."""
  record = tmp_path / 'points'
  program = _PROGRAM.format(root=str(_ROOT), tests=str(pathlib.Path(__file__).parent))

  def run(stop_at):
    return subprocess.run(
      [sys.executable, '-c', program, record, str(stop_at)],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
    )

  for turn, stop_at in enumerate((5, 4), 1):
    assert run(stop_at).returncode == -signal.SIGKILL
    done = len(record.read_bytes().splitlines()) - 1
    assert done == (3, 5)[turn - 1]
  finished = run(0)
  assert finished.returncode == 0
  assert bytes.fromhex(finished.stdout) == expected.tobytes()
