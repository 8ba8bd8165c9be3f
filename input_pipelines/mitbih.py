"""Heartbeats of the MIT-BIH Arrhythmia Database in the five AAMI classes.

Moody and Mark, "The impact of the MIT-BIH Arrhythmia Database", 2001; cut into beats
as in Kachuee et al., "ECG Heartbeat Classification: A Deep Transferable
Representation", 2018, arXiv:1805.00794.
"""

import itertools
import math
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np

from input_pipelines import batching, labelled_arrays, mitbih_records, sources
from input_pipelines.errors import DataError
from input_pipelines.labelled_arrays import LabelledArrays
from input_pipelines.mitbih_records import CLASSES, NUM_SAMPLES

SELECTIONS = ('paper', 'full', 'inter_patient')
_NAME = 'mit-bih-arrhythmia-database-1.0.0'
_CSV = ('mitbih_train.csv', 'mitbih_test.csv')
_URL = f'https://physionet.org/static/published-projects/mitdb/{_NAME}.zip'

# Beats of each class in the published set, and those of them that are for testing.
_PUBLISHED = (90_589, 2_779, 7_236, 803, 8_039)
_PUBLISHED_TEST = (18_118, 556, 1_448, 162, 1_608)
# The paper keeps so many normal beats for training and testing, and all others.
_PAPER_NORMAL = {'train': 641, 'test': 161}

# De Chazal et al. 2004: no patient is in both; paced records are in neither.
_DS1 = (101, 106, 108, 109, 112, 114, 115, 116, 118, 119, 122, 124, 201, 203, 205, 207,
        208, 209, 215, 220, 223, 230)  # fmt: skip
_DS2 = (100, 103, 105, 111, 113, 117, 121, 123, 200, 202, 210, 212, 213, 214, 219, 221,
        222, 228, 231, 232, 233, 234)  # fmt: skip


def load(
  selection: str = 'paper', *, data_dir: str = '', manual_dir: str = '', seed: int = 0
) -> tuple[batching.ArraySplit, batching.ArraySplit, tuple[str, ...]]:
  """Loads heartbeats of 187 samples at 125 Hz.

  Args:
    selection: 'full' has all 109,446 beats, 80/20 with the published number of each
      class (from records at random by `seed`, from CSV files as they are); 'paper'
      has of these 641 normal beats for training and 161 for testing and all others,
      19,659; 'inter_patient' trains on the records DS1 and tests on DS2 of de Chazal
      et al., which have no patient in common. Or the path of a folder, with at least
      one `/`, that holds tables of one's own, `train.csv` and `test.csv` (or
      `mitbih_train.csv` and `mitbih_test.csv`), split as they are.
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder with the files; by default `downloads/manual` in `data_dir`.
    seed: seed of the split and of the selection.

  Returns:
    `(train, test, classes)`; inputs are float32 of shape `(187,)` in [0, 1].

  Raises:
    DataError: the selection, or there is no source, or the data are damaged.
  """
  if '/' in selection:
    data = _load_own(pathlib.Path(selection), data_dir)
    selection = 'full'
  elif selection in SELECTIONS:
    data = load_arrays(data_dir=data_dir, manual_dir=manual_dir)
  else:
    raise DataError(
      f'dataset={selection!r} is no selection of heartbeats: choose one of '
      f'{", ".join(SELECTIONS)}, or give a folder with train.csv and test.csv.'
    )
  train, test = _split(data, selection, np.random.SeedSequence(seed, spawn_key=(0,)))
  return batching.ArraySplit(*train), batching.ArraySplit(*test), data.classes


def _load_own(folder: pathlib.Path, data_dir: str) -> LabelledArrays:
  """The tables of a user's folder."""
  source = sources.own(folder, [('train.csv', 'test.csv'), _CSV], read)
  if not any(pathlib.Path(file).exists() for form in source.files for file in form):
    raise DataError(
      f'dataset={folder} holds neither train.csv and test.csv nor {_CSV[0]} and '
      f'{_CSV[1]}: put a pair there.'
    )
  return sources.load(source, data_dir=data_dir)


def load_arrays(*, data_dir: str = '', manual_dir: str = '') -> LabelledArrays:
  """Loads all heartbeats, as `read` returns them.

  `manual_dir` may hold PhysioNet's zip or the folder it unpacks to, the published pair
  `mitbih_train.csv` and `mitbih_test.csv`, or a `mitbih.npz` of `labelled_arrays.save`.
  Without any the zip is downloaded.
  """
  source = sources.Source(
    name='mitbih',
    files=[(f'{_NAME}.zip',), ('mitbih.npz',), (_NAME,), _CSV],
    url=_URL,
    parse=read,
    builder='input_pipelines.labelled_arrays_builder',
  )
  return sources.load(source, data_dir=data_dir, manual_dir=manual_dir)


def read(*paths: pathlib.Path) -> LabelledArrays:
  """Reads and validates records or an npz file (one path), or the pair of CSV files.

  Returns:
    The part `beats` with an array `records`, or the parts `train` and `test`.

  Raises:
    DataError: the data are damaged.
  """
  if paths[0].suffix == '.npz':
    samples = np.zeros(NUM_SAMPLES, np.float32)
    parts = [('beats',), ('test', 'train')]
    return labelled_arrays.load(paths[0], parts, CLASSES, like=samples)
  if len(paths) == 1:
    return LabelledArrays({'beats': mitbih_records.read(paths[0])}, CLASSES)
  parts = zip(('train', 'test'), paths, strict=True)
  return LabelledArrays({name: read_csv(path) for name, path in parts}, CLASSES)


def read_csv(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads heartbeats, 187 samples and a label a line.

  Returns:
    `inputs` float32 `(n, 187)` and int64 `labels`.

  Raises:
    DataError: names the first line that is not like that.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of an empty file, which is refused below.
      lines = (line for _, line in _lines(path))
      values = np.loadtxt(lines, np.float32, delimiter=',', comments=None, ndmin=2)
  except OSError as error:
    raise DataError(
      f'{path} cannot be read ({error.strerror}): make it a readable file.'
    ) from error
  except ValueError as error:
    raise _csv_error(path, _first_fault(path) or str(error)) from error
  if values.shape[1] != NUM_SAMPLES + 1 or not len(values):
    raise _csv_error(path, _first_fault(path) or 'there are no lines')
  wrong = ~np.isfinite(values).all(axis=1)
  if wrong.any():
    line = _line_number(path, wrong.argmax())
    raise _csv_error(path, f'line {line} has a value that is not finite')
  labels = values[:, -1]
  wrong = ~np.isin(labels, np.arange(len(CLASSES)))
  if wrong.any():
    first = wrong.argmax()
    line = _line_number(path, first)
    raise _csv_error(path, f'line {line} has the label {labels[first]:g}')
  return {'inputs': values[:, :-1].copy(), 'labels': labels.astype(np.int64)}


def _csv_error(path: pathlib.Path, problem: str) -> DataError:
  return DataError(
    f'{path}: {problem}; a line has {NUM_SAMPLES} finite samples and a label from 0 to '
    f'{len(CLASSES) - 1}: correct the file or get it again.'
  )


def _first_fault(path: pathlib.Path) -> str:
  """Says which line of a table is the first that is no row of numbers."""
  for number, line in _lines(path):
    fields = line.split(',')
    if len(fields) != NUM_SAMPLES + 1:
      return f'line {number} has {len(fields)} fields instead of {NUM_SAMPLES + 1}'
    for field in fields:
      try:
        float(field)
      except ValueError:
        return f'line {number} has {field.strip()[:40]!r}, not a number'
  return ''


def _line_number(path: pathlib.Path, row: int) -> int:
  """The number of the line that holds a row of the table."""
  return next(itertools.islice(_lines(path), int(row), None))[0]


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Lines with their numbers; blank ones are no rows."""
  with path.open(encoding='utf-8-sig', errors='replace') as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        yield number, line


def _split(data: LabelledArrays, selection: str, seed: np.random.SeedSequence):
  """Returns inputs and labels for training and for testing."""
  generator = np.random.default_rng(seed)
  if selection == 'inter_patient':
    return _by_patient(data)
  if 'beats' in data.parts:
    beats = data.parts['beats']
    chosen = _stratified(beats['labels'], generator)
    parts = {name: (beats, indices) for name, indices in chosen.items()}
  else:
    parts = {name: (part, np.arange(len(part['labels'])))
             for name, part in data.parts.items()}  # fmt: skip
  if selection == 'paper':
    parts = {
      name: (part, _fewer_normal(part['labels'], indices, name, generator))
      for name, (part, indices) in parts.items()
    }
  return [
    (part['inputs'][indices], part['labels'][indices])
    for part, indices in (parts['train'], parts['test'])
  ]


def _stratified(
  labels: np.ndarray, generator: np.random.Generator
) -> dict[str, np.ndarray]:
  """Splits each class at random, a fifth of it for testing."""
  counts = np.bincount(labels, minlength=len(CLASSES))
  num_test = [math.ceil(count / 5) for count in counts]
  if tuple(counts) == _PUBLISHED:
    num_test = _PUBLISHED_TEST
  train, test = [], []
  for label, number in enumerate(num_test):
    order = generator.permutation(np.flatnonzero(labels == label))
    test.append(order[:number])
    train.append(order[number:])
  return {'train': np.concatenate(train), 'test': np.concatenate(test)}


def _fewer_normal(
  labels: np.ndarray, indices: np.ndarray, part: str, generator: np.random.Generator
) -> np.ndarray:
  """Keeps of the normal beats, at random, as many as the paper does."""
  normal = labels[indices] == CLASSES.index('N')
  kept = generator.permutation(indices[normal])[: _PAPER_NORMAL[part]]
  return np.concatenate([kept, indices[~normal]])


def _by_patient(data: LabelledArrays):
  beats = data.parts.get('beats', {})
  if 'records' not in beats:
    raise DataError(
      'dataset=inter_patient needs to know the patients, which CSV files do not tell: '
      f'put {_NAME}.zip into --manual_dir.'
    )
  missing = sorted({*_DS1, *_DS2} - set(beats['records'].tolist()))
  if missing:
    raise DataError(
      f'dataset=inter_patient needs record {missing[0]}, which is not among the '
      f'records: get {_NAME}.zip whole.'
    )
  chosen = (np.isin(beats['records'], records) for records in (_DS1, _DS2))
  return [(beats['inputs'][rows], beats['labels'][rows]) for rows in chosen]
