"""Tiny Shakespeare: 1.1 million characters of plays, cut into sequences of tokens.

Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015, with
whose program char-rnn the one text file comes.
"""

import pathlib

import numpy as np

from input_pipelines import batching, sources
from input_pipelines.errors import DataError
from input_pipelines.labelled_arrays import LabelledArrays

VOCABULARY = 128  # ASCII: a token is the code of a character
LENGTH = 64

_FILE = 'tinyshakespeare.txt'
_PUBLISHER = (
  'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
  'input.txt'
)
_TRAIN_SHARE = 0.9


def load(
  *, data_dir: str = '', manual_dir: str = ''
) -> tuple[batching.ArraySplit, batching.ArraySplit]:
  """Loads the text as sequences that follow one another, the first 90 % for training.

  `manual_dir` may hold the publisher's file, as tinyshakespeare.txt or under its own
  name, input.txt. Without it the file is downloaded (1.1 MB).

  Args:
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder with the file; by default `downloads/manual` in `data_dir`.

  Returns:
    `(train, test)`; inputs are int32 tokens below 128 of shape `(64,)`, labels the
    tokens that follow each of them, of the same shape. What is left of the text after
    the last whole sequence is not used.

  Raises:
    DataError: there is no source, or the text is damaged.
  """
  source = sources.Source(
    name='tinyshakespeare',
    files=[(_FILE,), ('input.txt',)],
    url=_PUBLISHER,
    parse=read,
    builder='input_pipelines.labelled_arrays_builder',
  )
  data = sources.load(source, data_dir=data_dir, manual_dir=manual_dir)
  rows = data.parts['text']['inputs'].astype(np.int32)
  first = round(_TRAIN_SHARE * len(rows))
  return tuple(
    batching.ArraySplit(part[:, :-1], part[:, 1:])
    for part in (rows[:first], rows[first:])
  )


def read(path: pathlib.Path) -> LabelledArrays:
  """Reads and validates the text.

  Args:
    path: the file.

  Returns:
    One part, `text`: inputs are uint8 `(n, 65)`, each row a sequence and the character
    after it, with which the next row begins; labels are 0.

  Raises:
    DataError: the file cannot be read, is not ASCII, or is too short.
  """
  try:
    codes = np.frombuffer(path.read_bytes(), np.uint8)
  except OSError as error:
    raise _damaged(path, f'it cannot be read: {error.strerror}') from error
  foreign = np.flatnonzero(codes >= VOCABULARY)
  if len(foreign):
    raise _damaged(path, f'byte {foreign[0]} is {codes[foreign[0]]}, which is no ASCII')
  count = (len(codes) - 1) // LENGTH
  if count < 2:
    raise _damaged(path, f'{len(codes)} characters do not make two sequences')
  starts = LENGTH * np.arange(count)
  rows = codes[starts[:, None] + np.arange(LENGTH + 1)]
  labels = np.zeros(count, np.int64)
  return LabelledArrays({'text': {'inputs': rows, 'labels': labels}}, ('text',))


def _damaged(path: pathlib.Path, problem: str) -> DataError:
  return DataError(f'{path} is damaged ({problem}): get it from {_PUBLISHER} again.')
