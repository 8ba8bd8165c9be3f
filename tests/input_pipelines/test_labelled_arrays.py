"""Sets in one npz file: read without preparing anything, and refused when wrong."""

import sys

import numpy as np
import pytest

from input_pipelines import DataError, cifar10, labelled_arrays, mitbih
from input_pipelines.labelled_arrays import LabelledArrays


def _part(num_examples, shape=(32, 32, 3), dtype=np.uint8):
  generator = np.random.default_rng(num_examples)
  return {
    'inputs': generator.integers(0, 200, (num_examples, *shape)).astype(dtype),
    'labels': np.arange(num_examples) % 10,
  }


def _save(folder, data):
  labelled_arrays.save(folder / 'cifar10.npz', data)


def test_what_is_written_is_read_without_tfds(tmp_path, monkeypatch):
  for module in ('tensorflow_datasets', 'array_record', 'wfdb', 'grain', 'jraph'):
    monkeypatch.setitem(sys.modules, module, None)
  parts = {'train': _part(20), 'test': _part(10)}
  _save(tmp_path, LabelledArrays(parts, cifar10.CLASSES))
  folders = {'manual_dir': str(tmp_path), 'data_dir': str(tmp_path / 'data')}
  train, test, classes = cifar10.load(**folders)
  assert classes == cifar10.CLASSES and test.num_examples == 10
  np.testing.assert_array_equal(train.arrays['inputs'], parts['train']['inputs'])
  np.testing.assert_array_equal(train.arrays['labels'], parts['train']['labels'])
  beats = _part(30, (187,), np.float32)
  beats = {**beats, 'labels': np.arange(30) % 5, 'records': np.full(30, 100)}
  data = LabelledArrays({'beats': beats}, mitbih.CLASSES)
  labelled_arrays.save(tmp_path / 'mitbih.npz', data)
  train, test, _ = mitbih.load('full', **folders)
  assert train.num_examples == 20 and test.num_examples == 10
  assert not (tmp_path / 'data').exists()
  with pytest.raises(DataError, match='inter_patient needs record 101'):
    mitbih.load('inter_patient', **folders)


def _with(part, **changes):
  return {'train': {**_part(20), **changes}, 'test': _part(10)} | part


BAD = {
  'one part': ({'train': _part(20)}, r'has the parts train, not test and train'),
  'no labels': (
    {'train': _part(20), 'test': {'inputs': _part(4)['inputs']}},
    'test has no inputs and labels',
  ),
  'other shape': (
    _with({}, inputs=np.zeros((20, 28, 28), np.uint8)),
    r'train/inputs is uint8\[20, 28, 28\], an example has to be uint8\[32, 32, 3\]',
  ),
  'other type': (_with({}, inputs=np.zeros((20, 32, 32, 3))), 'is float64'),
  'other length': (_with({}, labels=np.zeros(19, int)), 'differ in length'),
  'empty': ({'train': _part(0), 'test': _part(10)}, 'train are empty'),
  'label': (_with({}, labels=np.full(20, 10)), 'labels are not whole numbers below 10'),
  'column of labels': (
    _with({}, labels=np.zeros((20, 1), int)),
    r'train/labels has the shape \[20, 1\], not \[n\]',
  ),
  'one label': (_with({}, labels=np.array(1)), r'has the shape \[\], not \[n\]'),
  'number beside them': (_with({}, extra=np.array(1)), 'differ in length'),
  'half a label': (_with({}, labels=np.full(20, 0.5)), 'not whole numbers'),
}


@pytest.mark.parametrize(('parts', 'message'), BAD.values(), ids=BAD.keys())
def test_other_sets_are_refused_in_one_sentence(tmp_path, parts, message):
  _save(tmp_path, LabelledArrays(parts, cifar10.CLASSES))
  with pytest.raises(DataError, match=message) as caught:
    cifar10.load(manual_dir=str(tmp_path), data_dir=str(tmp_path))
  assert 'cifar10.npz' in str(caught.value) and '\n' not in str(caught.value)


def test_values_that_are_no_numbers_and_other_classes_are_refused(tmp_path):
  beats = _part(10, (187,), np.float32)
  beats['inputs'][3, 5] = np.nan
  path = tmp_path / 'mitbih.npz'
  labelled_arrays.save(path, LabelledArrays({'beats': beats}, mitbih.CLASSES))
  with pytest.raises(DataError, match='has a value that is not finite'):
    mitbih.read(path)
  labelled_arrays.save(path, LabelledArrays({'beats': beats}, ('a', 'b')))
  with pytest.raises(DataError, match='its classes are not N, S, V, F, Q'):
    mitbih.read(path)


def test_unsigned_labels_are_labels_and_one_name_is_no_class_list(tmp_path):
  part = _part(20) | {'labels': np.arange(20, dtype=np.uint8) % 10}
  _save(tmp_path, LabelledArrays({'train': part, 'test': part}, cifar10.CLASSES))
  found = cifar10.read(tmp_path / 'cifar10.npz').parts['train']['labels']
  assert found.dtype == np.int64 and found.tolist() == part['labels'].tolist()
  np.savez(tmp_path / 'cifar10.npz', classes=3)
  with pytest.raises(DataError, match='its classes are not airplane'):
    cifar10.read(tmp_path / 'cifar10.npz')


@pytest.mark.parametrize('at', [0.3, 0.5, 0.7])
def test_a_flipped_byte_inside_is_refused(tmp_path, at):
  random = np.random.default_rng(0).integers(0, 9, (200, 32, 32, 3)).astype(np.uint8)
  part = {'inputs': random, 'labels': np.zeros(200, int)}
  _save(tmp_path, LabelledArrays({'train': part, 'test': part}, cifar10.CLASSES))
  path = tmp_path / 'cifar10.npz'
  content = bytearray(path.read_bytes())
  content[int(at * len(content))] ^= 0xFF
  path.write_bytes(content)
  with pytest.raises(DataError, match='it is no complete npz file'):
    cifar10.read(path)


@pytest.mark.parametrize('keep', [0, 10, 200, 2000])
def test_half_a_file_is_refused(tmp_path, keep):
  parts = {'train': _part(20), 'test': _part(10)}
  _save(tmp_path, LabelledArrays(parts, cifar10.CLASSES))
  path = tmp_path / 'cifar10.npz'
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(DataError, match='it is no complete npz file'):
    cifar10.read(path)
