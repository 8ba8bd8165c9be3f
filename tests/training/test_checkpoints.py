"""Checkpoints: exact, and robust against damage."""

import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import train
from training import TrainingDiverged, UsageError, checkpoints, cli
from training.step import TrainState


def _state(step):
  params = {
    'dense': {'kernel': jnp.full((3, 2), 1.0 / 3 + step), 'bias': jnp.arange(2.0)},
    'half': jnp.full((4,), 1 / 3 + step, jnp.bfloat16),
  }
  stats = {'mean': jnp.full((2,), float(step))}
  opt_state = (optax.adam(0.1).init(params), {'key': jax.random.key(step)})
  scalars = {'rho': jnp.float32(0.1)}
  return TrainState(
    jnp.int32(step), params, stats, opt_state, jax.random.key(7), scalars
  )


def _equal(a, b):
  a, b = checkpoints.to_arrays(a), checkpoints.to_arrays(b)
  return a.keys() == b.keys() and all(
    a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with the checkpoints of steps 1 and 2 (3 saved, 2 kept)."""
  workdir = tmp_path_factory.mktemp('saved')
  store = checkpoints.Checkpoints(workdir)
  for step in range(3):
    store.save(_state(step), {'step': step, 'means': {'loss': 0.1 + step}})
  store.close()
  return workdir


def _restore(workdir):
  store = checkpoints.Checkpoints(workdir)
  try:
    return store.restore_newest()
  finally:
    store.close()


def test_what_is_restored_is_what_was_saved(saved):
  assert sorted(p.name for p in (saved / 'checkpoints').iterdir()) == ['1', '2']
  for newest in (_restore(saved), checkpoints.load(saved)):
    restored = checkpoints.from_arrays(newest.arrays, _state(0), 'it')
    assert _equal(restored, _state(2))
    assert jax.random.key_data(restored.key).tolist() == [0, 7]
    assert newest.position == {'step': 2, 'means': {'loss': 0.1 + 2}}


def _files(workdir):
  """The content of every file of a run, but the lock of who writes it."""
  return {
    path.relative_to(workdir).as_posix(): path.read_bytes()
    for path in workdir.rglob('*')
    if path.is_file() and path.name != '.lock'
  }


def _damages(path):
  """Ways to damage one file, by name."""
  data = path.read_bytes()
  flipped = bytearray(data)
  if flipped:
    flipped[len(flipped) // 2] ^= 0x10
  return {
    'truncate': lambda: path.write_bytes(data[: len(data) // 2]),
    'empty': lambda: path.write_bytes(b''),
    'flip': lambda: path.write_bytes(bytes(flipped)),
    'remove': path.unlink,
  }


@pytest.mark.parametrize('damage', ['truncate', 'empty', 'flip', 'remove'])
def test_any_damage_to_the_newest_falls_back(saved, tmp_path, damage):
  newest = saved / 'checkpoints' / '2'
  for file in sorted(p for p in newest.rglob('*') if p.is_file()):
    workdir = tmp_path / 'copy'
    shutil.copytree(saved, workdir)
    _damages(workdir / file.relative_to(saved))[damage]()
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      found = _restore(workdir)
    # Only the list of digests itself can be lost without any other loss.
    step = 2 if (damage, file.name) == ('remove', 'digests.json') else 1
    assert found.position['step'] == step
    assert _equal(checkpoints.from_arrays(found.arrays, _state(0), 'it'), _state(step))
    assert [str(step + 1) in str(w.message) for w in caught] == [True] * (2 - step)
    shutil.rmtree(workdir)


def test_after_a_fall_back_the_number_is_free_and_the_damaged_files_are_kept(
  saved, tmp_path
):
  workdir = tmp_path / 'copy'
  shutil.copytree(saved, workdir)
  (workdir / 'checkpoints' / '2' / 'position' / 'metadata').write_bytes(b'{')
  store = checkpoints.Checkpoints(workdir)
  with pytest.warns(UserWarning, match=r'step 2 .*position/metadata is changed'):
    assert store.restore_newest().position['step'] == 1
  store.save(_state(2), {'step': 2})
  store.close()
  assert _restore(workdir).position == {'step': 2}
  assert (workdir / 'damaged_checkpoints' / '2' / 'position').exists()


def test_when_every_checkpoint_is_damaged_nothing_moves_and_the_sentence_says_so(
  saved, tmp_path
):
  workdir = tmp_path / 'copy'
  shutil.copytree(saved, workdir)
  for step in '12':
    (workdir / 'checkpoints' / step / 'state' / 'manifest.ocdbt').write_bytes(b'')
  before = _files(workdir)
  damages = 'step 2: state/manifest.ocdbt is changed; step 1: state/manifest'
  for read in (_restore, _restore, checkpoints.load):
    with pytest.raises(UsageError, match=f'every checkpoint .*{damages}'):
      read(workdir)
  with pytest.raises(UsageError, match='the checkpoint of step 1 in .* is damaged'):
    checkpoints.load(workdir, 1)
  assert _files(workdir) == before


def test_a_run_without_a_readable_checkpoint_stops_and_keeps_its_metrics(tmp_path):
  workdir = tmp_path / 'run'
  arguments = ['train.py', '--nocache', '--devices=1', f'--workdir={workdir}']
  arguments += ['--batch_size=1000', '--epochs=1']
  assert cli.run(train.main, arguments) == 0
  (workdir / 'summary.json').unlink()  # as if the run had been killed before its end
  for file in workdir.glob('checkpoints/*/position/metadata'):
    file.write_bytes(b'{')
  before = _files(workdir)
  assert before['metrics.jsonl'].count(b'\n') >= 2
  again = [sys.executable, train.__file__, *arguments[1:]]
  done = subprocess.run(again, capture_output=True, text=True)
  assert done.returncode == 2
  assert 'every checkpoint' in done.stderr and done.stderr.count('\n') == 1
  assert _files(workdir) == before


@pytest.mark.parametrize('error', [MemoryError('no room'), OSError(5, 'I/O error')])
def test_what_is_no_damage_is_raised_as_it_is_and_moves_nothing(
  saved, tmp_path, monkeypatch, error
):
  workdir = tmp_path / 'copy'
  shutil.copytree(saved, workdir)
  before = _files(workdir)

  def fail(*_, **__):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'restore', fail)
    for read in (_restore, checkpoints.load):
      with pytest.raises(type(error)) as caught:
        read(workdir)
      assert caught.value is error and not hasattr(error, '__notes__')
  # A disk that cannot be read is not a changed file either.
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.hashlib, 'file_digest', fail)
    for read in (_restore, checkpoints.load):
      with pytest.raises(type(error)):
        read(workdir)
  assert _files(workdir) == before
  assert _restore(workdir).position['step'] == 2


def test_an_unreadable_checkpoint_without_digests_shows_its_error_and_the_mend(
  saved, tmp_path
):
  """A power cut can leave one; nothing tells it from a disk that cannot be read."""
  workdir = tmp_path / 'copy'
  shutil.copytree(saved, workdir)
  newest = workdir / 'checkpoints' / '2'
  (newest / 'digests.json').unlink()
  (newest / 'position' / 'metadata').write_bytes(b'{')
  before = _files(workdir)
  for read in (_restore, checkpoints.load):
    with pytest.raises(ValueError) as caught:
      read(workdir)
    assert str(newest) in ''.join(caught.value.__notes__)
  assert _files(workdir) == before


def test_a_folder_without_checkpoints_needs_no_orbax(tmp_path):
  """Importing it takes longer than the first steps of a small run."""
  program = f"""
import pathlib, sys
from training import UsageError, checkpoints
workdir = pathlib.Path({str(tmp_path)!r})
store = checkpoints.Checkpoints(workdir)
print(store.restore_newest(), checkpoints.steps(workdir))
store.close()
try:
  checkpoints.load(workdir)
except UsageError as error:
  print(error)
print(sorted(name for name in sys.modules if name.startswith('orbax')))
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  lines = done.stdout.splitlines()
  assert lines[0] == 'None []' and 'no checkpoint yet' in lines[1]
  assert lines[2] == '[]'


def test_a_folder_without_checkpoints(tmp_path):
  with pytest.raises(UsageError, match='no checkpoint yet'):
    checkpoints.load(tmp_path)
  assert _restore(tmp_path) is None


def test_a_checkpoint_of_another_model_is_refused_by_name(saved):
  arrays = checkpoints.load(saved).arrays
  params = _state(0).params
  chosen = checkpoints.select(arrays, 'params')
  wider = {**params, 'dense': {**params['dense'], 'kernel': jnp.zeros((5, 2))}}
  with pytest.raises(UsageError, match=r'dense/kernel is float32\[3, 2\] there and fl'):
    checkpoints.from_arrays(chosen, wider, 'it')
  with pytest.raises(UsageError, match='it has no extra'):
    checkpoints.from_arrays(chosen, {**params, 'extra': jnp.zeros(2)}, 'it')
  with pytest.raises(UsageError, match='also has half'):
    checkpoints.from_arrays(chosen, {'dense': params['dense']}, 'it')


def test_parameters_that_are_not_finite_are_not_stored(saved, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(saved, workdir)
  store = checkpoints.Checkpoints(workdir)
  bad = _state(3)
  bad.params['dense']['bias'] = np.array([1.0, np.nan], np.float32)
  with pytest.raises(TrainingDiverged, match='dense/bias is not finite after step 3'):
    store.save(bad, {'step': 3})
  assert store.restore_newest().position['step'] == 2
  store.close()
