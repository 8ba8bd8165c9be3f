"""Class folders and array_record shards, and every way to get them wrong."""

import io
import os
import pickle
import shutil

import numpy as np
import PIL.Image
import pytest

from input_pipelines import DataError, imagenet
from input_pipelines.image_files import ImageFiles
from input_pipelines.image_records import parse_example

CLASSES = ('n01', 'n02', 'n03')


def _jpeg(generator, label):
  height, width = generator.integers(40, 80, 2)
  pixels = generator.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
  pixels[..., label] //= 4
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).resize((width, height)).save(file, 'JPEG')
  return file.getvalue()


@pytest.fixture(scope='module')
def content():
  """The files of a small set by part and class: 9 for training and 4 for testing."""
  generator = np.random.default_rng(0)
  counts = {'train': (4, 3, 2), 'val': (2, 1, 1)}
  return {
    (part, name, f'{name}_{index}.JPEG'): _jpeg(generator, label)
    for part, numbers in counts.items()
    for label, (name, number) in enumerate(zip(CLASSES, numbers, strict=True))
    for index in range(number)
  }


@pytest.fixture(scope='module')
def whole(content, tmp_path_factory):
  root = tmp_path_factory.mktemp('tree')
  for place, file in content.items():
    path = root.joinpath(*place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file)
  return root


@pytest.fixture
def tree(whole, tmp_path):
  """A copy of the class folders that a test may damage."""
  return shutil.copytree(whole, tmp_path / 'tree')


def _example(file, label, **more):
  from tensorflow_datasets.proto import tf_example_pb2
  from tensorflow_datasets.proto import tf_feature_pb2 as proto

  features = {
    'image': proto.Feature(bytes_list=proto.BytesList(value=[file])),
    'label': proto.Feature(int64_list=proto.Int64List(value=[label])),
    'file_name': proto.Feature(bytes_list=proto.BytesList(value=[b'x.JPEG'])),
    'area': proto.Feature(float_list=proto.FloatList(value=[1.0, 2.0])),
    **more,
  }
  return tf_example_pb2.Example(
    features=proto.Features(feature=features)
  ).SerializeToString()


def _write_shards(folder, records, split, count):
  from array_record.python import array_record_module

  folder.mkdir(parents=True, exist_ok=True)
  for shard, part in enumerate(np.array_split(np.arange(len(records)), count)):
    path = folder / f'imagenet2012-{split}.array_record-{shard:05}-of-{count:05}'
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for index in part:
      writer.write(records[index])
    writer.close()


@pytest.fixture
def shards(content, tmp_path):
  """The same images as `tree`, as tensorflow-datasets would keep them."""
  folder = tmp_path / 'data' / 'imagenet2012' / '5.1.0'
  for part, split, count in (('train', 'train', 3), ('val', 'validation', 2)):
    records = [
      _example(file, CLASSES.index(name))
      for (where, name, _), file in content.items()
      if where == part
    ]
    _write_shards(folder, records, split, count)
  (folder / 'label.labels.txt').write_text('\n'.join(CLASSES) + '\n')
  return folder


def _batches(loaded, seed=3):
  train, test, classes = loaded
  assert classes == CLASSES
  assert (train.num_examples, test.num_examples) == (9, 4)
  found = [*train.batches(4, shards=(2,), seed=seed).epoch(1)]
  return found + [*train.batches(9).epoch(0), *test.batches(3).epoch(0)]


def _assert_same(ours, theirs):
  for one, other in zip(ours, theirs, strict=True):
    for name in other:
      np.testing.assert_array_equal(one[name], other[name])


def test_the_images_of_class_folders(whole, content):
  train, test, _ = imagenet.load(str(whole), size=40)
  (batch,) = train.batches(9).epoch(0)
  assert batch['labels'].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
  files = [file for (part, *_), file in content.items() if part == 'train']
  for found, file in zip(batch['inputs'], files, strict=True):
    image = PIL.Image.open(io.BytesIO(file))
    cut = 7 / 8 * min(image.size)
    box = [(side - cut) / 2 for side in image.size]
    box += [(side + cut) / 2 for side in image.size]
    expected = image.resize((40, 40), PIL.Image.Resampling.BILINEAR, box)
    np.testing.assert_array_equal(found, np.asarray(expected))
  (batch,) = test.batches(4).epoch(0)
  assert batch['labels'].tolist() == [0, 0, 1, 2]
  (first,) = train.batches(9, seed=0).epoch(0)
  (second,) = train.batches(9, seed=0).epoch(1)
  orders = [np.argsort(batch['labels'], kind='stable') for batch in (first, second)]
  assert (
    (first['inputs'][orders[0]] != second['inputs'][orders[1]]).any((1, 2, 3)).all()
  )


def test_shards_give_the_same_batches(whole, shards, tmp_path):
  theirs = _batches(imagenet.load(str(whole), size=16))
  _assert_same(_batches(imagenet.load(str(shards), size=16)), theirs)
  found = imagenet.load(data_dir=str(tmp_path / 'data'), size=16)
  _assert_same(_batches(found), theirs)


@pytest.mark.slow
def test_workers_give_the_same_batches(whole, shards):
  from absl import flags

  flags.FLAGS.mark_as_parsed()
  theirs = _batches(imagenet.load(str(whole), size=16))
  for folder, workers in ((whole, 1), (shards, 2)):
    found = imagenet.load(str(folder), size=16, num_workers=workers)
    _assert_same(_batches(found), theirs)


def test_the_folder_is_found_in_manual_dir(whole, tmp_path):
  os.symlink(whole, tmp_path / 'imagenet2012')
  folders = {'manual_dir': str(tmp_path), 'data_dir': str(tmp_path / 'none')}
  assert imagenet.load(**folders, size=16)[0].num_examples == 9


def test_memory_holds_names_alone(tmp_path):
  for label in ('a', 'b'):
    (tmp_path / label).mkdir()
    for index in range(500):
      (tmp_path / label / f'{label}_{index:05}.JPEG').touch()
  files = ImageFiles(tmp_path)
  assert files.name(731) == str(tmp_path / 'b' / 'b_00231.JPEG')
  assert len(pickle.dumps(files)) < 1000 * (len('a_00000.JPEG') + 9) + 500


def test_examples_are_parsed_as_protobuf_does():
  from tensorflow_datasets.proto import tf_feature_pb2 as proto

  numbers = [0, 1, 127, 128, -1, 2**62, -(2**63)]
  more = {
    'numbers': proto.Feature(int64_list=proto.Int64List(value=numbers)),
    'texts': proto.Feature(bytes_list=proto.BytesList(value=[b'', b'x' * 300])),
    'none': proto.Feature(),
  }
  found = parse_example(_example(b'\xff\xd8', 7, **more))
  assert found == {
    'image': [b'\xff\xd8'],
    'label': [7],
    'file_name': [b'x.JPEG'],
    'area': [],
    'numbers': numbers,
    'texts': [b'', b'x' * 300],
    'none': [],
  }


def _move(old, new):
  return lambda tree: (tree / old).rename(tree / new)


def _remove(name):
  return lambda tree: (
    shutil.rmtree(tree / name) if (tree / name).is_dir() else (tree / name).unlink()
  )


def _empty(name):
  def change(tree):
    shutil.rmtree(tree / name)
    (tree / name).mkdir()

  return change


def _put(name, content):
  def change(tree):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_bytes(content)

  return change


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (_remove('train'), 'has no folder train: put the class folders of the training'),
    (_remove('val'), 'has no folder validation or val or test: put the class folders'),
    (_empty('train'), 'train has 0 class folders: two or more are needed'),
    (_empty('train/n02'), 'train/n02 has no images: put some there, or remove the'),
    (_empty('val/n02'), 'val/n02 has no images: put some there'),
    (_remove('val/n03'), 'val has no class folder n03, which the training images have'),
    (
      _move('val/n03', 'val/n09'),
      'val has the class folder n09, which the training im',
    ),
    (_put('val/n04/a.JPEG', b''), 'val has the class folder n04, which .* have not'),
    (_put('train/a.JPEG', b''), 'train/a.JPEG lies beside the class folders: move it'),
    (lambda tree: (tree / 'train/n01/sub').mkdir(), 'train/n01/sub is no file: remove'),
    (lambda tree: os.mkfifo(tree / 'train/n01/pipe'), 'n01/pipe is no file: remove it'),
    (_put('train/n01/n01_0.JPEG', b'x'), 'n01/n01_0.JPEG is not an image that can be'),
    (_put('val/n01/empty.JPEG', b''), 'val/n01/empty.JPEG is not an image'),
  ],
)
def test_trees_that_are_wrong(tree, change, words):
  change(tree)
  with pytest.raises(DataError, match=words) as caught:
    _all(imagenet.load(str(tree), size=16))
  assert str(caught.value).count('\n') == 0


def _all(loaded):
  for split in loaded[:2]:
    list(split.batches(9).epoch(0))


def test_a_truncated_jpeg_is_named(tree, content):
  path = tree / 'train/n03/n03_1.JPEG'
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(DataError, match=f'{path} cannot be read as an image'):
    _all(imagenet.load(str(tree), size=16))


def test_a_file_that_disappears_is_named(tree):
  loaded = imagenet.load(str(tree), size=16)
  (tree / 'train/n01/n01_2.JPEG').unlink()
  with pytest.raises(DataError, match='n01_2.JPEG cannot be read .No such file'):
    _all(loaded)


def _shard(split, number, of):
  return f'imagenet2012-{split}.array_record-{number:05}-of-{of:05}'


def _truncate(name):
  def change(folder):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-70_000])

  return change


def _overwrite(folder):
  path = folder / _shard('train', 1, 3)
  bytes_ = bytearray(path.read_bytes())
  place = bytes_.index(b'\xff\xd8') - 20
  bytes_[place : place + 500] = b'x' * 500
  path.write_bytes(bytes_)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (
      _truncate(_shard('train', 2, 3)),
      '00002-of-00003 is truncated or damaged .*: get',
    ),
    (_put(_shard('train', 0, 3), b''), '00000-of-00003 is truncated or damaged'),
    (
      _remove(_shard('train', 1, 3)),
      'lacks 1 of the 3 shards of the split train, the ',
    ),
    (_remove('label.labels.txt'), 'label.labels.txt cannot be read .No such file'),
    (
      _put('label.labels.txt', b'n01\nn02'),
      'record 1 of .* has the label 2, and there',
    ),
    (_overwrite, 'record [012] of .*00001-of-00003 cannot be read .Corrupted'),
  ],
)
def test_shards_that_are_wrong(shards, change, words):
  change(shards)
  with pytest.raises(DataError, match=words) as caught:
    _all(imagenet.load(str(shards), size=16))
  assert str(caught.value).count('\n') == 0


def test_records_of_another_kind(shards):
  _write_shards(shards, [b'no example'] * 3, 'train', 1)
  for number in range(3):
    (shards / _shard('train', number, 3)).unlink()
  with pytest.raises(DataError, match='record 0 of .* is no tf.train.Example with the'):
    _all(imagenet.load(str(shards), size=16))
  for name in shards.glob('*validation*'):
    name.unlink()
  with pytest.raises(DataError, match='no shards of the split validation or val or te'):
    imagenet.load(str(shards), size=16)


def test_what_is_not_there(tmp_path, hide, shards):
  with pytest.raises(DataError, match='dataset=/nowhere/x: there is no such folder'):
    imagenet.load('/nowhere/x')
  folders = {'data_dir': str(tmp_path), 'manual_dir': str(tmp_path)}
  words = (
    'imagenet2012 is no folder .*get ImageNet from https://image-net.org, and name'
  )
  with pytest.raises(DataError, match=words):
    imagenet.load(**folders)
  hide('array_record', 'array_record.python')
  with pytest.raises(DataError, match='needs the package array_record'):
    imagenet.load(str(shards))
