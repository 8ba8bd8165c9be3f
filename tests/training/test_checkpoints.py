"""Checkpoints: exact, and robust against damage."""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training import TrainingDiverged, UsageError, checkpoints
from training.step import TrainState


def _state(step):
  params = {
    'dense': {'kernel': jnp.full((3, 2), 1.0 / 3 + step), 'bias': jnp.arange(2.0)},
    'half': jnp.full((4,), 1 / 3 + step, jnp.bfloat16),
  }
  stats = {'mean': jnp.full((2,), float(step))}
  opt_state = (optax.adam(0.1).init(params), {'key': jax.random.key(step)})
  return TrainState(jnp.int32(step), params, stats, opt_state, jax.random.key(7))


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


def test_without_a_readable_checkpoint_a_run_starts_anew_and_a_reader_is_told(
  saved, tmp_path
):
  workdir = tmp_path / 'copy'
  shutil.copytree(saved, workdir)
  for step in '12':
    (workdir / 'checkpoints' / step / 'state' / 'manifest.ocdbt').write_bytes(b'')
  with (
    pytest.warns(UserWarning, match='is damaged'),
    pytest.raises(UsageError, match='every checkpoint'),
  ):
    checkpoints.load(workdir)
  with pytest.warns(UserWarning, match='is damaged'):
    assert _restore(workdir) is None


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
