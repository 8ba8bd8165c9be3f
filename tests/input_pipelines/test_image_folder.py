"""Trees of images: their forms, and every way to get one wrong."""

import io
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest

from input_pipelines import DataError, image_folder


def _image(colour, size=(4, 4), form='PNG', mode='RGB') -> bytes:
  file = io.BytesIO()
  PIL.Image.new(mode, size, colour).save(file, form)
  return file.getvalue()


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SPLIT = {
  'train/cat/1.png': _image(RED),
  'train/cat/2.png': _image(GREEN),
  'train/dog/1.png': _image(BLUE),
  'val/cat/1.png': _image(BLUE),
  'val/dog/1.png': _image(GREEN),
}
UNSPLIT = {
  f'{name}/{index}.png': _image(colour)
  for name, colour in (('cat', RED), ('dog', BLUE))
  for index in range(5)
}


def _write(path: pathlib.Path, files: dict[str, bytes | None]) -> pathlib.Path:
  """Writes a tree into a folder, tar or zip, as the path's name says."""
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in files.items():
        archive.writestr(name + ('' if content is not None else '/'), content or b'')
  elif '.tar' in path.suffixes or path.suffix == '.tgz':
    with tarfile.open(path, 'w:gz' if path.suffix != '.tar' else 'w') as archive:
      for name, content in files.items():
        member = tarfile.TarInfo(f'./{name}')
        member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
        member.size = len(content or b'')
        archive.addfile(member, io.BytesIO(content or b''))
  else:
    for name, content in files.items():
      place = path / name
      (place if content is None else place.parent).mkdir(parents=True, exist_ok=True)
      if content is not None:
        place.write_bytes(content)
  return path


def test_without_tfds_images_are_read_as_they_would_be_prepared(tmp_path, hide):
  _write(tmp_path / 'pets.tar.gz', SPLIT)
  folders = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(tmp_path)}
  prepared = image_folder.load('pets', **folders)
  shutil.rmtree(tmp_path / 'data')
  hide('tensorflow_datasets', 'array_record', 'tqdm')
  direct = image_folder.load('pets', **folders)
  assert not (tmp_path / 'data').exists()
  assert direct[2] == prepared[2] == ('cat', 'dog')
  for read, expected in zip(direct[:2], prepared[:2], strict=True):
    for name, array in expected.arrays.items():
      assert read.arrays[name].dtype == array.dtype
      np.testing.assert_array_equal(read.arrays[name], array)


@pytest.mark.parametrize('form', ['pets', 'pets.zip', 'my pets!.tar'])
def test_a_tree_is_found_by_its_path(tmp_path, form):
  files = dict(SPLIT)
  arguments = {'data_dir': str(tmp_path / 'data'), 'size': 4}
  for folder in ('mine', 'yours'):  # Two of one name are two sets.
    (tmp_path / folder).mkdir()
    path = _write(tmp_path / folder / form, files)
    for _ in ('read', 'prepared'):
      train, test, classes = image_folder.load(str(path), **arguments)
      assert (train.num_examples, test.num_examples) == (len(files) - 2, 2)
      assert classes == ('cat', 'dog')
    files['train/dog/3.png'] = _image(RED)
  assert len(list((tmp_path / 'data' / 'labelled_arrays').iterdir())) == 2


def test_a_path_that_is_not_there(tmp_path):
  with pytest.raises(DataError, match='dataset=.*/pets: there is no such folder'):
    image_folder.load(str(tmp_path / 'pets'), data_dir=str(tmp_path))


def _rows(part):
  colours = part['inputs'].mean(axis=(1, 2)).astype(int).tolist()
  return sorted((tuple(c), y) for c, y in zip(colours, part['labels'], strict=True))


@pytest.mark.parametrize('form', ['pets', 'pets.tar', 'pets.tar.gz', 'pets.zip'])
@pytest.mark.parametrize('outer', ['', 'a/b/'])
def test_every_form_is_read(tmp_path, form, outer):
  files = {outer + name: content for name, content in SPLIT.items()}
  files[f'{outer}train/cat/.DS_Store'] = b'x'
  files[f'{outer}Thumbs.db'] = b'x'
  data = image_folder.read(_write(tmp_path / form, files), size=4)
  assert data.classes == ('cat', 'dog')
  assert data.parts['train']['inputs'].shape == (3, 4, 4, 3)
  assert data.parts['train']['inputs'].dtype == np.uint8
  assert _rows(data.parts['train']) == [(BLUE, 1), (GREEN, 0), (RED, 0)]
  assert _rows(data.parts['test']) == [(BLUE, 0), (GREEN, 1)]


def test_trees_without_parts_are_split_at_random(tmp_path):
  _write(tmp_path / 'manual' / 'pets', UNSPLIT)
  arguments = {
    'data_dir': str(tmp_path / 'data'),
    'manual_dir': str(tmp_path / 'manual'),
    'size': 4,
  }
  train, test, classes = image_folder.load('pets', **arguments)
  assert (train.num_examples, test.num_examples) == (7, 3)
  assert classes == ('cat', 'dog')
  labels = lambda split: next(split.batches(10).epoch(0))['labels'].tolist()
  assert sum(labels(train) + labels(test)) == 5
  others = {tuple(labels(image_folder.load('pets', **arguments, seed=s)[0]))
            for s in range(6)}  # fmt: skip
  assert len(others) > 1
  again = image_folder.load('pets', **arguments)[0]
  np.testing.assert_array_equal(labels(train), labels(again))


def test_any_mode_and_size_of_image(tmp_path):
  files = {
    **UNSPLIT,
    'cat/grey.jpg': _image(128, (9, 5), 'JPEG', 'L'),
    'cat/tall.png': _image(GREEN, (3, 30)),
    'dog/clear.png': _image((0, 0, 255, 10), mode='RGBA'),
    'dog/animated.gif': _image(3, (2, 2), 'GIF', 'P'),
  }
  data = image_folder.read(_write(tmp_path / 'pets', files), size=6)
  assert data.parts['images']['inputs'].shape == (14, 6, 6, 3)
  assert ((128, 128, 128), 0) in _rows(data.parts['images'])
  assert (GREEN, 0) in _rows(data.parts['images'])


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
  """Medical and microscope images; Pillow cuts them off at 255."""
  grey = {f'cat/{form}.{form}': _image(51 * 257, (4, 4), form, 'I;16')
          for form in ('PNG', 'TIFF')}  # fmt: skip
  data = image_folder.read(_write(tmp_path / 'pets', {**UNSPLIT, **grey}), size=4)
  assert _rows(data.parts['images']).count(((51, 51, 51), 0)) == 2


def test_links_to_nothing_are_named(tmp_path):
  path = _write(tmp_path / 'pets', UNSPLIT)
  (path / 'cat' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
  with pytest.raises(DataError, match=r'gone\.png cannot be read \(No such file'):
    image_folder.read(path)
  with pytest.raises(DataError, match=r'gone\.png cannot be read \(No such file'):
    image_folder.load('pets', data_dir=str(tmp_path / 'd'), manual_dir=str(tmp_path))


BAD = {
  'corrupt image': (
    {'train/cat/1.png': _image(RED, (40, 40))[:60]},
    r'train/cat/1\.png in .*pets cannot be read as an image',
  ),
  'not an image': (
    {'train/dog/notes.txt': b'hello'},
    r'train/dog/notes\.txt in .* is not an image that can be read',
  ),
  'empty file': ({'train/dog/1.png': b''}, r'dog/1\.png in .* is not an image'),
  'unknown class': (
    {'val/bird/1.png': _image(RED)},
    r'in test has the class folder bird, which is none of the 2 classes \(cat, dog\)',
  ),
  'empty class': (
    {'val/dog/1.png': None, 'val/dog': None},
    r'in test has no images in the class folder dog',
  ),
  'empty class of both': ({'train/bird': None}, r'in train has no images in .* bird'),
  'empty part': (
    {'val/dog/1.png': None, 'val/cat/1.png': None, 'val': None},
    r'pets has no images in test: put its class folders there',
  ),
  'other empty part': (
    {**dict.fromkeys(SPLIT), 'train': None, 'val/cat/1.png': _image(RED)},
    r'pets has no images in train: put its class folders there',
  ),
  '32 bits': (
    {'train/cat/1.png': _image(70_000, form='TIFF', mode='I')},
    r'train/cat/1\.png in .* cannot be read as an image \(32 bits a pixel',
  ),
  'file beside the classes': (
    {'train/1.png': _image(RED)},
    r'the file train/1\.png lies at another depth',
  ),
  'third part': (
    {'extra/cat/1.png': _image(RED)},
    r'has the folders extra, train, val where train and test',
  ),
}


@pytest.mark.parametrize(('changes', 'message'), BAD.values(), ids=BAD.keys())
def test_bad_trees_are_named_in_one_sentence(tmp_path, changes, message):
  files = {**SPLIT, **changes}
  # None is a folder, but an image that is left out.
  files = {k: v for k, v in files.items() if v is not None or not k.endswith('.png')}
  _write(tmp_path / 'pets', files)
  with pytest.raises(DataError, match=message) as caught:
    image_folder.load('pets', data_dir=str(tmp_path / 'data'), manual_dir=str(tmp_path))
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'.hidden': b''}, 'holds no files'),
    ({'cat/1.png': _image(RED)}, 'has the one class folder cat'),
    ({'cat/1.png': _image(RED), 'dog': None}, 'no images in the class folder dog'),
    ({'1.png': _image(RED)}, 'lies at another depth'),
  ],
)
def test_trees_that_are_no_set_are_refused(tmp_path, files, message):
  with pytest.raises(DataError, match=message):
    image_folder.read(_write(tmp_path / 'pets', files))


@pytest.mark.parametrize('form', ['pets.zip', 'pets.tar'])
def test_what_is_no_archive_is_refused_briefly(tmp_path, form):
  path = tmp_path / form
  path.write_bytes(b'<html>')
  with pytest.raises(
    DataError, match=r'not a complete archive \([^-]*\): get'
  ) as caught:
    image_folder.read(path)
  assert len(str(caught.value).replace(str(path), '')) < 100


@pytest.mark.parametrize('form', ['pets.zip', 'pets.tar.gz'])
def test_cut_archives_are_refused(tmp_path, form):
  path = _write(tmp_path / form, SPLIT)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(DataError, match=rf'{form} (is not a complete|cannot be read)'):
    image_folder.read(path)


def test_a_set_that_is_not_there_is_asked_for(tmp_path):
  with pytest.raises(DataError, match=r'pets or pets\.tar .* is not in .*--manual_dir'):
    image_folder.load('pets', data_dir=str(tmp_path), manual_dir=str(tmp_path))
  with pytest.raises(DataError, match="dataset='my pets': the name"):
    image_folder.load('my pets')
