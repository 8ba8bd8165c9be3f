"""Damaged and odd data on the command line: one sentence, exit 2, nothing lost."""

import io
import pathlib
import re

import numpy as np
import PIL.Image
import pytest

import train
from input_pipelines import DataError
from training import cli

wfdb = pytest.importorskip('wfdb')
# Of its own use of pandas, when it writes the records.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:wfdb')

_RECORDS = 'mit-bih-arrhythmia-database-1.0.0'


def _run(folder, *flags):
  """Runs train.py on the data in a folder; returns its exit code."""
  command = ['train.py', '--nocache', '--devices=1', f'--workdir={folder / "run"}']
  command += [f'--manual_dir={folder}', f'--data_dir={folder / "prepared"}', *flags]
  return cli.run(train.main, command, errors=(DataError,))


def _image(path: pathlib.Path, shade=0):
  file = io.BytesIO()
  PIL.Image.new('RGB', (32, 32), (shade, 100, 0)).save(file, 'PNG')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(file.getvalue())


def _pets(folder):
  for part in ('train', 'test'):
    for name in ('cat', 'dog'):
      for index in range(3):
        _image(folder / 'pets' / part / name / f'{index}.png', index)
  return folder / 'pets'


def _corrupt_image(folder):
  path = _pets(folder) / 'train' / 'cat' / '1.png'
  path.write_bytes(path.read_bytes()[:60])


def _no_image(folder):
  (_pets(folder) / 'train' / 'cat' / 'notes.txt').write_text('hello')


def _empty_class(folder):
  (_pets(folder) / 'train' / 'eel').mkdir()


def _unknown_class(folder):
  _image(_pets(folder) / 'test' / 'eel' / '0.png')


def _unknown_cifar_class(folder):
  for part in ('train', 'test'):
    for name in ('cat', 'lynx'):
      _image(folder / 'cifar10' / part / name / '0.png')


def _tables(folder, change):
  rows = [['0.5'] * 187 + [f'{label}.0'] for label in range(5)]
  for name in ('train', 'test'):
    lines = [','.join(row) for row in rows]
    if name == 'train':
      lines[2] = ','.join(change(rows[2]))
    (folder / f'mitbih_{name}.csv').write_text('\n'.join(lines) + '\n')


def _record(folder, leads=('MLII', 'V1')):
  (folder / _RECORDS).mkdir()
  peaks = np.arange(100, 1400, 200)
  signal = np.zeros((1500, len(leads)))
  signal[peaks] = 1
  where = str(folder / _RECORDS)
  wfdb.wrsamp(
    '100', 360, ['mV'] * 2, list(leads), signal, fmt=['16'] * 2, write_dir=where
  )
  wfdb.wrann('100', 'atr', peaks, symbol=['N'] * len(peaks), write_dir=where)
  return folder / _RECORDS / '100.dat'


def _corrupt_record(folder):
  path = _record(folder)
  content = bytearray(path.read_bytes())
  content[500] ^= 8
  path.write_bytes(content)


_PETS, _ECG = ('--task=cifar10_wrn', '--dataset=pets'), ('--task=mitbih_attention',)
BAD = {
  'corrupt image': (_PETS, _corrupt_image, 'train/cat/1.png in .*pets cannot be read'),
  'no image': (_PETS, _no_image, 'cat/notes.txt in .*pets is not an image'),
  'empty class': (_PETS, _empty_class, 'has no images in the class folder eel'),
  'unknown class': (_PETS, _unknown_class, 'class folder eel, which is none of the 2'),
  'unknown class of CIFAR-10': (
    ('--task=cifar10_wrn',),
    _unknown_cifar_class,
    'class folder lynx, which is none of the 10',
  ),
  'no such folder': (_PETS, lambda folder: None, 'pets.zip is not in .*--manual_dir'),
  'wrong width': (
    _ECG,
    lambda folder: _tables(folder, lambda row: row[1:]),
    'mitbih_train.csv: line 3 has 187 fields',
  ),
  'not a number': (
    _ECG,
    lambda folder: _tables(folder, lambda row: ['nan', *row[1:]]),
    'mitbih_train.csv: line 3 has a value that is not finite',
  ),
  'missing lead': (
    _ECG,
    lambda folder: _record(folder, ('V1', 'V2')),
    'record 100 in .* has the leads V1, V2 but neither MLII nor V5',
  ),
  'corrupt record': (_ECG, _corrupt_record, 'record 100 in .* does not match'),
}


@pytest.mark.parametrize(('flags', 'make', 'message'), BAD.values(), ids=BAD.keys())
def test_bad_data_are_one_sentence_and_exit_code_2(
  tmp_path, capsys, flags, make, message
):
  make(tmp_path)
  before = sorted(tmp_path.rglob('*'))
  assert _run(tmp_path, *flags) == 2
  out, error = capsys.readouterr()
  assert error.startswith('train.py: ') and error.count('\n') == 1 and not out
  assert re.search(message, error)
  assert sorted(tmp_path.rglob('*')) == before


def test_a_damaged_prepared_set_and_a_batch_that_is_too_large(tmp_path, capsys):
  _pets(tmp_path)
  assert _run(tmp_path, *_PETS, '--batch_size=7') == 2
  assert '--batch_size=7: the training split has 6 examples' in capsys.readouterr().err
  (records,) = (tmp_path / 'prepared').rglob('*train.array_record*')
  records.write_bytes(records.read_bytes()[:100])
  assert _run(tmp_path, *_PETS, '--batch_size=6') == 2
  error = capsys.readouterr().err
  assert 'the prepared set in ' in error and 'delete that folder' in error
  assert error.count('\n') == 1 and not (tmp_path / 'run').exists()
