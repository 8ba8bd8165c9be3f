"""The text of Tiny Shakespeare."""

import numpy as np
import pytest

from input_pipelines import DataError, shakespeare

TEXT = ''.join(chr(32 + i * i % 91) for i in range(20 * 64 + 40))


@pytest.mark.parametrize('name', ['tinyshakespeare.txt', 'input.txt'])
def test_sequences_follow_one_another(tmp_path, name):
  manual = tmp_path / 'manual'
  manual.mkdir()
  (manual / name).write_text(TEXT)
  folders = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(manual)}
  for _ in range(2):  # from the file, and from what was prepared of it
    train, test = shakespeare.load(**folders)
    assert (train.num_examples, test.num_examples) == (18, 2)
    inputs, labels = (
      np.concatenate([split.arrays[name] for split in (train, test)])
      for name in ('inputs', 'labels')
    )
    assert inputs.dtype == labels.dtype == np.int32
    assert ''.join(map(chr, inputs.ravel())) == TEXT[: 20 * 64]
    assert ''.join(map(chr, labels.ravel())) == TEXT[1 : 20 * 64 + 1]
    (manual / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (TEXT.encode() + 'é'.encode(), 'byte 1320 is 195, which is no ASCII'),
    (b'x' * 128, '128 characters do not make two'),
    (None, 'cannot be read'),
  ],
)
def test_damage_is_named(tmp_path, content, message):
  path = tmp_path / 'input.txt'
  if content is None:
    path.mkdir()
  else:
    path.write_bytes(content)
  with pytest.raises(DataError, match=message):
    shakespeare.read(path)


def test_the_real_text(data_dir, tmp_path):
  train, test = shakespeare.load(data_dir=str(tmp_path), manual_dir=str(data_dir))
  assert train.num_examples + test.num_examples == (1_115_394 - 1) // 64
  start = ''.join(map(chr, train.arrays['inputs'][0]))
  assert start.startswith('First Citizen:\nBefore we proceed')
