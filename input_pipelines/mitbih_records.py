"""Heartbeats cut out of annotated WFDB records."""

import pathlib
import tempfile
import warnings
from typing import Any

import numpy as np

from input_pipelines import bars, trees
from input_pipelines.errors import DataError

CLASSES = ('N', 'S', 'V', 'F', 'Q')
NUM_SAMPLES = 187

# Annotations that are beats, by class (AAMI EC57); all others are not beats.
_SYMBOLS = {'N': 'NLRej', 'S': 'AaJS', 'V': 'VE', 'F': 'F', 'Q': '/fQ'}
_LABELS = {
  symbol: CLASSES.index(name) for name, group in _SYMBOLS.items() for symbol in group
}
# The lead to take, else the next one: electrodes of three records are placed otherwise.
_LEADS = ('MLII', 'V5')
_ENDINGS = ('.hea', '.dat', '.atr')
_FREQUENCY = 125  # Hz
# Seconds over which the local median R-R interval is taken, and what is cut, of it.
_WINDOW = 10.0
_CUT = 1.2


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Cuts the beats out of all records of a tree.

  A beat begins at its R peak and lasts 1.2 times the median R-R interval of the ten
  seconds around it; it is resampled to 125 Hz, scaled to [0, 1], cut or padded with
  zeros to 187 samples. The last beat of a record, which has no next one, is left out.

  Args:
    path: a folder, zip or tar with `RECORD.hea`, `RECORD.dat` and `RECORD.atr` files.

  Returns:
    `inputs` float32 `(n, 187)`, int64 `labels` `(n,)` and int64 `records` `(n,)`, the
    number that is the record's name, or -1.

  Raises:
    DataError: a record is damaged, incomplete, or has none of the leads.
  """
  with tempfile.TemporaryDirectory() as folder:
    names = _copy(path, pathlib.Path(folder))
    beats = []
    with bars.counted(len(names), path.name, 'records') as done:
      for name in names:
        inputs, labels = _record_beats(path, pathlib.Path(folder) / name)
        number = int(name) if name.isdecimal() else -1
        beats.append((inputs, labels, np.full(len(labels), number)))
        done()
  inputs, labels, records = map(np.concatenate, zip(*beats, strict=True))
  return {'inputs': inputs, 'labels': labels, 'records': records}


def _copy(path: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """Copies the records' files, for wfdb reads from disk only; returns their names."""
  found = set()
  with trees.entries(path) as tree:
    for name, read_file in tree:
      file = pathlib.PurePosixPath(name)
      if read_file and file.suffix in _ENDINGS:
        (folder / file.name).write_bytes(read_file())
        found.add(file.name)
  names = sorted({pathlib.PurePosixPath(file).stem for file in found})
  if not names:
    raise DataError(f'{path} holds no WFDB records: get it from its publisher again.')
  for name in names:
    for ending in _ENDINGS:
      if name + ending not in found:
        raise DataError(
          f'{path} has no {name}{ending}: a record has {", ".join(_ENDINGS)}; get it '
          'from its publisher again, or remove the record.'
        )
  return names


def _record_beats(
  path: pathlib.Path, record: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
  """Returns beats and labels of one record."""
  signal, frequency, peaks, symbols = _read_record(path, record)
  labels = np.array([_LABELS.get(symbol, -1) for symbol in symbols], np.int64)
  peaks, labels = peaks[labels >= 0], labels[labels >= 0]
  if not len(peaks) or peaks[0] < 0 or peaks[-1] >= len(signal):
    raise _damaged(path, record.name, 'its beats are not inside its signal')
  lengths = _CUT * _local_intervals(peaks / frequency)
  resampled = _resample(signal, frequency)
  starts = np.rint(peaks / frequency * _FREQUENCY).astype(int)
  beats = np.zeros((len(peaks) - 1, NUM_SAMPLES), np.float32)
  for beat, start, length in zip(beats, starts[:-1], lengths, strict=True):
    size = min(round(length * _FREQUENCY), NUM_SAMPLES)
    cut = resampled[start : start + size]
    low, high = cut.min(), cut.max()
    beat[: len(cut)] = (cut - low) / max(high - low, 1e-9)
  return beats, labels[:-1]


def _read_record(path: pathlib.Path, record: pathlib.Path):
  """Returns a record's signal in digital units, its frequency, beats and symbols."""
  try:
    import wfdb
  except ImportError as error:
    raise DataError(
      f'WFDB records need the package {error.name}: install the requirements with '
      'pip install -r requirements.txt.'
    ) from error
  leads = _guarded(path, record, wfdb.rdheader).sig_name or []
  lead = next((lead for lead in _LEADS if lead in leads), None)
  if lead is None:
    raise DataError(
      f'record {record.name} in {path} has the leads {", ".join(leads) or "(none)"} '
      f'but neither {" nor ".join(_LEADS)}: remove the record.'
    )
  channels = [leads.index(lead)]
  data = _guarded(path, record, wfdb.rdrecord, channels=channels, physical=False)
  notes = _guarded(path, record, wfdb.rdann, extension='atr')
  if not data.fs > 0:
    raise _damaged(path, record.name, f'its frequency is {data.fs}')
  # Headers may give the 16 bits of the sum as a signed number.
  if (data.calc_checksum()[0] - data.checksum[0]) % 2**16:
    raise _damaged(path, record.name, 'its signal does not match its checksum')
  return data.d_signal[:, 0], float(data.fs), np.asarray(notes.sample), notes.symbol


def _guarded(path: pathlib.Path, record: pathlib.Path, read: Any, **arguments) -> Any:
  """Calls a function of wfdb, which documents neither its errors nor its warnings."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      return read(str(record), **arguments)
  except Exception as error:
    raise _damaged(path, record.name, error) from error


def _damaged(path: pathlib.Path, name: str, problem: object) -> DataError:
  return DataError(
    f'record {name} in {path} is damaged ({problem}): get it from its publisher again.'
  )


def _local_intervals(times: np.ndarray) -> np.ndarray:
  """Median interval between the beats around each beat but the last, in seconds."""
  intervals = np.diff(times)
  first = np.searchsorted(times, times - _WINDOW / 2)
  last = np.searchsorted(times, times + _WINDOW / 2, side='right') - 1
  medians = intervals.copy()  # Where a beat is alone, its own interval.
  for index in range(len(intervals)):
    if last[index] > first[index]:
      medians[index] = np.median(intervals[first[index] : last[index]])
  return medians


def _resample(signal: np.ndarray, frequency: float) -> np.ndarray:
  """Resamples to 125 Hz, without aliases."""
  from scipy import signal as filters

  up, down = _FREQUENCY, round(frequency)
  # The ends of the filter see the signal go on, not drop to zero.
  return filters.resample_poly(signal.astype(np.float64), up, down, padtype='line')
