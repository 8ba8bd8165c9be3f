"""Heartbeats: cutting by hand, the published counts, and damaged records and tables."""

import pathlib
import zipfile

import numpy as np
import pytest

from input_pipelines import DataError, mitbih, mitbih_records

wfdb = pytest.importorskip('wfdb')
# Of its own use of pandas, when it writes the records.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:wfdb')

FREQUENCY = 250
PEAKS = np.array([100, 300, 520, 700, 1100, 1300])
SYMBOLS = ['N', 'V', '+', 'A', '/', 'N']
NAME = 'mit-bih-arrhythmia-database-1.0.0'


def _record(
  folder: pathlib.Path, name='100', leads=('V1', 'MLII'), peaks=PEAKS, symbols=SYMBOLS
):
  """Writes a record whose lead MLII is a slow ramp with a unit pulse at each beat."""
  folder.mkdir(parents=True, exist_ok=True)
  ramp = np.linspace(-2, -1, 1500)
  ramp[peaks] = 1
  signal = np.stack([np.zeros_like(ramp), ramp], axis=1)[:, -len(leads) :]
  wfdb.wrsamp(
    name,
    fs=FREQUENCY,
    units=['mV'] * len(leads),
    sig_name=list(leads),
    p_signal=signal,
    fmt=['16'] * len(leads),
    write_dir=str(folder),
  )
  wfdb.wrann(name, 'atr', peaks, symbol=symbols, write_dir=str(folder))


@pytest.fixture
def records(tmp_path):
  folder = tmp_path / NAME
  _record(folder)
  return folder


def test_beats_are_cut_as_described(records):
  beats = mitbih_records.read(records)
  classes = [mitbih_records.CLASSES[label] for label in beats['labels']]
  # The rhythm change is no beat, and the last beat has no next one.
  assert classes == ['N', 'V', 'S', 'Q']
  assert beats['records'].tolist() == [100] * 4
  inputs = beats['inputs']
  assert inputs.shape == (4, 187) and inputs.dtype == np.float32
  assert inputs.min() == 0 and (inputs.max(axis=1) == 1).all()
  # All beats lie in one window of ten seconds: intervals 200, 400, 400, 200 samples.
  length = round(1.2 * 300 / 2)
  assert ((inputs != 0).sum(axis=1) >= length - 2).all()
  assert (inputs[:, length:] == 0).all()
  # A pulse at the start, and at the next beat where that is not too far.
  assert (inputs[:, 0] > 0.9).all()
  assert inputs[0, 100] > 0.9 and inputs[3, 100] > 0.9
  assert inputs[1, 100] < 0.5


def test_local_intervals_are_medians_over_ten_seconds():
  times = np.array([0, 1, 2, 3, 20, 20.5, 21, 40, 41])
  found = mitbih_records._local_intervals(times)
  np.testing.assert_allclose(found, [1, 1, 1, 1, 0.5, 0.5, 0.5, 1])


def test_resampling_keeps_slow_signals_and_removes_fast_ones():
  time = np.arange(3600) / 360
  slow, fast = np.sin(2 * np.pi * 5 * time), np.sin(2 * np.pi * 100 * time)
  found = mitbih_records._resample(slow + fast + 7, 360)
  expected = np.sin(2 * np.pi * 5 * np.arange(len(found)) / 125) + 7
  np.testing.assert_allclose(found[20:-20], expected[20:-20], atol=0.02)


def test_folder_and_zip_are_the_same_and_selections_are_made_of_them(records, tmp_path):
  folder = mitbih_records.read(records)
  path = tmp_path / 'records.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    for file in records.iterdir():
      archive.write(file, f'{NAME}/{file.name}')
  for name, array in mitbih_records.read(path).items():
    np.testing.assert_array_equal(array, folder[name])
  arguments = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(tmp_path)}
  train, test, classes = mitbih.load('full', **arguments)
  assert classes == ('N', 'S', 'V', 'F', 'Q')
  # Of one beat a class, the fifth that is for testing is rounded up.
  assert (train.num_examples, test.num_examples) == (0, 4)
  with pytest.raises(DataError, match='inter_patient needs record 101'):
    mitbih.load('inter_patient', **arguments)
  with pytest.raises(DataError, match="dataset='all' is no selection .* paper, full"):
    mitbih.load('all', **arguments)


def test_records_with_another_lead(tmp_path):
  _record(tmp_path / 'a', leads=('V2', 'V5'))
  assert len(mitbih_records.read(tmp_path / 'a')['labels']) == 4
  _record(tmp_path / 'b', leads=('V1', 'V2'))
  with pytest.raises(DataError, match='leads V1, V2 but neither MLII nor V5') as caught:
    mitbih_records.read(tmp_path / 'b')
  assert '\n' not in str(caught.value)


def _flip(content: bytes) -> bytes:
  return content[:502] + bytes([content[502] ^ 8]) + content[503:]


BAD_RECORDS = {
  'flipped bit': ('.dat', _flip, 'does not match its checksum'),
  'cut signal': ('.dat', lambda content: content[:1000], 'record 100 in .* is damaged'),
  'no signal': ('.dat', lambda content: None, r'has no 100\.dat'),
  'no annotations': ('.atr', lambda content: None, r'has no 100\.atr'),
  'empty annotations': ('.atr', lambda content: b'', 'record 100 in .* is damaged'),
  'no frequency': (
    '.hea',
    lambda content: content.replace(b'100 2 250 ', b'100 2 0 '),
    'record 100 in .* is damaged .its frequency is 0',
  ),
  'no header': ('.hea', lambda content: None, r'has no 100\.hea'),
  'damaged header': (
    '.hea',
    lambda content: b'\xff\x00',
    'record 100 in .* is damaged',
  ),
  'empty header': ('.hea', lambda content: b'', 'record 100 in .* is damaged'),
}


@pytest.mark.parametrize(
  ('ending', 'change', 'message'), BAD_RECORDS.values(), ids=BAD_RECORDS.keys()
)
def test_damaged_records_are_named_in_one_sentence(
  records, tmp_path, ending, change, message
):
  file = records / f'100{ending}'
  content = change(file.read_bytes())
  file.unlink() if content is None else file.write_bytes(content)
  with pytest.raises(DataError, match=message) as caught:
    mitbih.load(data_dir=str(tmp_path / 'data'), manual_dir=str(tmp_path))
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()


def test_beats_outside_the_signal_are_refused(tmp_path):
  _record(tmp_path / 'records', peaks=PEAKS)
  wfdb.wrann(
    '100', 'atr', PEAKS + 1000, symbol=SYMBOLS, write_dir=str(tmp_path / 'records')
  )
  with pytest.raises(DataError, match='its beats are not inside its signal'):
    mitbih_records.read(tmp_path / 'records')


def _tables(folder, train_labels=(0, 0, 1, 2, 3, 4), **changes):
  folder.mkdir(exist_ok=True)
  rows = np.random.default_rng(0).uniform(size=(len(train_labels), 187)).round(4)
  line = lambda row, label: ','.join(map(str, [*row, f'{label}.0']))
  lines = [line(row, label) for row, label in zip(rows, train_labels, strict=True)]
  (folder / 'mitbih_train.csv').write_text('\n'.join(lines) + '\n')
  (folder / 'mitbih_test.csv').write_text('\n'.join(lines[2:]) + '\n')
  return rows, lines


def test_tables_keep_their_split(tmp_path):
  rows, _ = _tables(tmp_path / 'manual', [0] * 700 + [1, 2])
  arguments = {
    'data_dir': str(tmp_path / 'data'),
    'manual_dir': str(tmp_path / 'manual'),
  }
  train, test, _ = mitbih.load('full', **arguments)
  assert (train.num_examples, test.num_examples) == (702, 700)
  batch = next(train.batches(702).epoch(0))
  np.testing.assert_allclose(batch['inputs'], rows, rtol=1e-6)
  train, test, _ = mitbih.load('paper', **arguments)
  assert (train.num_examples, test.num_examples) == (643, 163)
  with pytest.raises(DataError, match='which CSV files do not tell'):
    mitbih.load('inter_patient', **arguments)


@pytest.mark.parametrize('prefix', ['', 'mitbih_'])
def test_tables_of_ones_own_are_found_by_their_folder(tmp_path, prefix):
  rows, _ = _tables(tmp_path / 'my beats')
  for part in ('train', 'test'):
    path = tmp_path / 'my beats' / f'mitbih_{part}.csv'
    path.rename(path.with_name(f'{prefix}{part}.csv'))
  for _ in ('read', 'prepared'):
    train, test, _ = mitbih.load(str(tmp_path / 'my beats'), data_dir=str(tmp_path))
    assert (train.num_examples, test.num_examples) == (6, 4)
    inputs = next(train.batches(6).epoch(0))['inputs']
    np.testing.assert_allclose(inputs, rows, rtol=1e-6)
  path.with_name(f'{prefix}test.csv').unlink()
  with pytest.raises(DataError, match=f'{prefix}test.csv is missing beside'):
    mitbih.load(str(tmp_path / 'my beats'), data_dir=str(tmp_path))
  with pytest.raises(DataError, match='holds neither train.csv and test.csv nor'):
    mitbih.load(str(tmp_path), data_dir=str(tmp_path))


BAD_LINES = {
  'narrow': (lambda fields: fields[1:], 'line 2 has 187 fields'),
  'wide': (lambda fields: ['1', *fields], 'line 2 has 189 fields'),
  'nan': (lambda fields: ['nan', *fields[1:]], 'line 2 has a value that is not finite'),
  'infinite': (lambda fields: ['-inf', *fields[1:]], 'line 2 has a value that is not'),
  'word': (lambda fields: ['high', *fields[1:]], "line 2 has 'high', not a number"),
  'class': (lambda fields: [*fields[:-1], '5.0'], 'line 2 has the label 5'),
  'half a class': (lambda fields: [*fields[:-1], '.5'], 'line 2 has the label 0.5'),
}


@pytest.mark.parametrize(
  ('change', 'message'), BAD_LINES.values(), ids=BAD_LINES.keys()
)
def test_bad_tables_are_named_in_one_sentence(tmp_path, change, message):
  _, lines = _tables(tmp_path / 'manual')
  lines[1] = ','.join(change(lines[1].split(',')))
  (tmp_path / 'manual' / 'mitbih_train.csv').write_text('\n'.join(lines))
  with pytest.raises(DataError, match=message) as caught:
    mitbih.load(data_dir=str(tmp_path / 'data'), manual_dir=str(tmp_path / 'manual'))
  assert '\n' not in str(caught.value)
  assert 'mitbih_train.csv' in str(caught.value)
  assert not (tmp_path / 'data').exists()


def test_blank_lines_and_byte_order_marks_are_no_faults(tmp_path):
  _, lines = _tables(tmp_path)
  path = tmp_path / 'mitbih_train.csv'
  path.write_text('\r\n'.join(['', lines[0], '', *lines[1:], '']), 'utf-8-sig')
  found = mitbih.read_csv(path)
  assert found['labels'].tolist() == [0, 0, 1, 2, 3, 4]
  for change, message in BAD_LINES.values():
    bad = ','.join(change(lines[1].split(',')))
    path.write_text('\n'.join([lines[0], '', ' ', bad]))
    with pytest.raises(DataError, match=message.replace('line 2', 'line 4')):
      mitbih.read_csv(path)
  path.write_text('\n\n')
  with pytest.raises(DataError, match='there are no lines'):
    mitbih.read_csv(path)


def test_half_a_pair_and_an_empty_table_are_refused(tmp_path):
  _tables(tmp_path)
  (tmp_path / 'mitbih_test.csv').write_text('')
  arguments = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(tmp_path)}
  with pytest.raises(DataError, match=r'mitbih_test\.csv: there are no lines'):
    mitbih.load(**arguments)
  (tmp_path / 'mitbih_test.csv').unlink()
  with pytest.raises(
    DataError, match=r'mitbih_test\.csv is missing beside mitbih_train'
  ):
    mitbih.load(**arguments)


@pytest.mark.slow
def test_the_real_records(data_dir, tmp_path):
  arguments = {'data_dir': str(tmp_path), 'manual_dir': str(data_dir)}

  def counts(selection):
    splits = mitbih.load(selection, **arguments)[:2]
    return [
      np.bincount(next(split.batches(200_000).epoch(0))['labels']).tolist()
      for split in splits
    ]

  train, test = counts('full')
  assert train == [72_471, 2_223, 5_788, 641, 6_431]
  assert test == [18_118, 556, 1_448, 162, 1_608]
  assert sum(train) + sum(test) == 109_446
  train, test = counts('paper')
  assert train == [641, 2_223, 5_788, 641, 6_431] and sum(train) == 15_724
  assert test == [161, 556, 1_448, 162, 1_608] and sum(test) == 3_935
  # De Chazal et al. count 51,020 and 49,711, with the last beat of each record.
  train, test = counts('inter_patient')
  assert (sum(train), sum(test)) == (51_020 - 21, 49_711 - 21)
