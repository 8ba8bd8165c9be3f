"""CIFAR-10 from every form its images come in."""

import io
import pickle
import tarfile
import time

import numpy as np
import PIL.Image
import pytest

from input_pipelines import DataError, cifar10, sources

BATCHES = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']


@pytest.fixture(scope='module')
def batches():
  """Pixels `(n, 3, 32, 32)` and labels of each of the publisher's batches."""
  generator = np.random.default_rng(0)
  return {
    name: (
      generator.integers(0, 256, (10, 3, 32, 32)).astype(np.uint8),
      generator.permutation(10),
    )
    for name in BATCHES
  }


def _tar(path, files):
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def _binary(batches):
  return {
    f'cifar-10-batches-bin/{name}.bin': b''.join(
      bytes([label]) + image.tobytes() for image, label in zip(*batch, strict=True)
    )
    for name, batch in batches.items()
  }


def _pickled(batches):
  """As Python 2 wrote them: byte strings for keys."""
  files = {}
  for name, (pixels, labels) in batches.items():
    batch = {
      b'batch_label': name.encode(),
      b'labels': labels.tolist(),
      b'data': pixels.reshape(len(labels), -1),
    }
    files[f'cifar-10-batches-py/{name}'] = pickle.dumps(batch, protocol=2)
  return files


def _tree(batches):
  files = {}
  for name, batch in batches.items():
    part = 'test' if name == 'test_batch' else 'train'
    for index, (image, label) in enumerate(zip(*batch, strict=True)):
      file = io.BytesIO()
      PIL.Image.fromarray(image.transpose(1, 2, 0)).save(file, 'PNG')
      files[f'{part}/{cifar10.CLASSES[label]}/{name}_{index}.png'] = file.getvalue()
  return files


FORMS = {
  'cifar-10-binary.tar.gz': _binary,
  'cifar-10-python.tar.gz': _pickled,
  'cifar10_jpeg.tar.gz': _tree,
  'cifar10.tar.gz': _tree,
}


def _examples(split):
  batch = next(split.batches(1000).epoch(0))
  rows = zip(batch['inputs'], batch['labels'].tolist(), strict=True)
  return sorted((label, image.tobytes()) for image, label in rows)


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_images(tmp_path, batches, form):
  _tar(tmp_path / form, FORMS[form](batches))
  arguments = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(tmp_path)}
  train, test, classes = cifar10.load(**arguments)
  assert classes == cifar10.CLASSES
  expected = [
    [
      (int(label), image.transpose(1, 2, 0).tobytes())
      for name in names
      for image, label in zip(*batches[name], strict=True)
    ]
    for names in (BATCHES[:5], BATCHES[5:])
  ]
  assert [_examples(train), _examples(test)] == [sorted(part) for part in expected]
  (tmp_path / form).unlink()
  again = cifar10.load(**arguments)
  assert [_examples(split) for split in again[:2]] == [sorted(x) for x in expected]


def test_unpacked_batches_are_read(tmp_path, batches):
  for name, content in _binary(batches).items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
  data = cifar10.read(tmp_path / 'cifar-10-batches-bin')
  assert data.parts['train']['inputs'].shape == (50, 32, 32, 3)


class _Attack:
  def __reduce__(self):
    return print, ('run',)


BAD = {
  'short batch': (
    _binary,
    {'cifar-10-batches-bin/data_batch_2.bin': b'x' * 5000},
    r'data_batch_2\.bin in .* is damaged \(5000 bytes are no multiple of 3073\)',
  ),
  'label': (
    _binary,
    {'cifar-10-batches-bin/data_batch_1.bin': b'\x0b' + b'\0' * 3072},
    r'image 0 has the label 11',
  ),
  'missing batch': (
    _binary,
    {'cifar-10-batches-bin/data_batch_3.bin': None},
    r'has no data_batch_3\.bin: get it from https://www\.cs\.toronto\.edu/~kriz again',
  ),
  'no batches': (
    lambda batches: {'readme.html': b'x'},
    {},
    r'holds neither test_batch\.bin nor test_batch',
  ),
  'damaged pickle': (
    _pickled,
    {'cifar-10-batches-py/test_batch': b'\x80\x02}q'},
    r'test_batch in .* is damaged',
  ),
  'pickle that runs code': (
    _pickled,
    {'cifar-10-batches-py/test_batch': pickle.dumps({b'data': _Attack()})},
    r'builtins\.print has no place in a batch of images',
  ),
  'pickle without labels': (
    _pickled,
    {'cifar-10-batches-py/test_batch': pickle.dumps({b'data': 1})},
    r"test_batch in .* is damaged \(KeyError: b'labels'\)",
  ),
}


@pytest.mark.parametrize(('form', 'changes', 'message'), BAD.values(), ids=BAD.keys())
def test_bad_archives_are_named_in_one_sentence(
  tmp_path, capsys, batches, form, changes, message
):
  files = {**form(batches), **changes}
  path = tmp_path / 'cifar-10-binary.tar.gz'
  _tar(path, {name: x for name, x in files.items() if x is not None})
  with pytest.raises(DataError, match=message) as caught:
    cifar10.load(data_dir=str(tmp_path / 'data'), manual_dir=str(tmp_path))
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()
  assert not capsys.readouterr().out


def test_trees_of_other_classes_are_refused(tmp_path, batches):
  files = _tree(batches)
  _tar(
    tmp_path / 'cifar10.tar.gz',
    {name.replace('/cat/', '/tiger/'): content for name, content in files.items()},
  )
  with pytest.raises(DataError, match='class folder tiger, which is none of the 10'):
    cifar10.read(tmp_path / 'cifar10.tar.gz')


def test_without_a_source_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, '_answers', lambda url: False)
  with pytest.raises(DataError) as caught:
    cifar10.load(data_dir=str(tmp_path), manual_dir=str(tmp_path / 'manual'))
  for part in (
    'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
    str(tmp_path / 'manual'),
    'cifar10_jpeg.tar.gz',
  ):
    assert part in str(caught.value)


@pytest.mark.slow
def test_the_real_images(data_dir, tmp_path):
  arguments = {'data_dir': str(tmp_path), 'manual_dir': str(data_dir)}
  train, test, _ = cifar10.load(**arguments)
  start = time.perf_counter()
  train, test, _ = cifar10.load(**arguments)
  assert time.perf_counter() - start < 10
  for split, number in ((train, 50_000), (test, 10_000)):
    batch = next(split.batches(number).epoch(0))
    assert batch['inputs'].shape == (number, 32, 32, 3)
    assert np.bincount(batch['labels']).tolist() == [number // 10] * 10
    # The published statistics of the undamaged images, which JPEG hardly changes.
    mean = batch['inputs'].reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(mean, [125.3, 123.0, 113.9], atol=2)
