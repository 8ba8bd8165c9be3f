"""MNIST from the publisher's files."""

import gzip
import http.server
import threading

import numpy as np
import pytest

from input_pipelines import DataError, mnist, sources


def _idx(array):
  """An array of bytes in the idx format."""
  header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes()
  return header + array.tobytes()


@pytest.fixture(scope='module')
def arrays():
  generator = np.random.default_rng(0)
  return {
    name: (
      generator.integers(0, 256, (size, 28, 28)).astype(np.uint8),
      generator.permutation(size).astype(np.uint8) % 10,
    )
    for name, size in (('train', 30), ('t10k', 12))
  }


def _write(folder, arrays, *, zipped=True):
  folder.mkdir(exist_ok=True)
  for name, (images, labels) in arrays.items():
    for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
      content = _idx(array)
      file = folder / f'{name}-{kind}-ubyte{".gz" if zipped else ""}'
      file.write_bytes(gzip.compress(content) if zipped else content)


def _assert_is(split, expected):
  images, labels = expected
  np.testing.assert_array_equal(split.arrays['inputs'], images)
  np.testing.assert_array_equal(split.arrays['labels'], labels)


@pytest.mark.parametrize('zipped', [True, False])
def test_the_files_are_read_and_prepared(arrays, tmp_path, zipped):
  manual = tmp_path / 'manual'
  _write(manual, arrays, zipped=zipped)
  folders = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(manual)}
  for _ in range(2):  # from the files, and from what was prepared of them
    for split, name in zip(mnist.load(**folders), ('train', 't10k'), strict=True):
      _assert_is(split, arrays[name])
    _assert_is(mnist.load_test(**folders), arrays['t10k'])
    for file in manual.iterdir():
      file.unlink()


def test_the_test_images_alone_suffice_for_themselves(arrays, tmp_path):
  manual = tmp_path / 'manual'
  _write(manual, {'t10k': arrays['t10k']})
  folders = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(manual)}
  _assert_is(mnist.load_test(**folders), arrays['t10k'])
  with pytest.raises(DataError, match=r'train-images-idx3-ubyte\.gz is missing beside'):
    mnist.load(**folders)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda x: x[:20], 'cannot be read'),
    (lambda x: gzip.compress(gzip.decompress(x)[:-1]), 'do not make an array'),
    (lambda x: gzip.compress(b'\0\0\x0d' + gzip.decompress(x)[3:]), 'no idx file'),
    (lambda x: gzip.compress(_idx(np.zeros((12, 5, 5), np.uint8))), 'have the shape'),
    (lambda x: gzip.compress(_idx(np.zeros((3, 28, 28), np.uint8))), '12 labels for 3'),
  ],
)
def test_damage_is_named(arrays, tmp_path, change, message):
  _write(tmp_path, {'t10k': arrays['t10k']})
  images = tmp_path / 't10k-images-idx3-ubyte.gz'
  images.write_bytes(change(images.read_bytes()))
  with pytest.raises(DataError, match=message):
    mnist.read(images, tmp_path / 't10k-labels-idx1-ubyte.gz')


def test_all_files_are_downloaded(arrays, tmp_path, monkeypatch):
  _write(tmp_path / 'site', {'t10k': arrays['t10k']})

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments):
      super().__init__(*arguments, directory=tmp_path / 'site')

    def log_message(self, *arguments):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(mnist, '_PUBLISHER', address)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    folders = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(tmp_path / 'none')}
    _assert_is(mnist.load_test(**folders), arrays['t10k'])
    with pytest.raises(DataError, match=r'no .*/train-images.*gz \(HTTP 404\)'):
      mnist.load(**folders)
    server.shutdown()
    thread.join()
  monkeypatch.setattr(sources, '_answers', lambda url: False)
  with pytest.raises(DataError, match=r'train-images.* and .*t10k-labels.* to .*none/'):
    mnist.load(**folders)


def test_the_real_test_images(data_dir, tmp_path):
  split = mnist.load_test(data_dir=str(tmp_path), manual_dir=str(data_dir))
  assert split.num_examples == 10_000
  counts = np.bincount(split.arrays['labels']).tolist()
  assert counts == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
