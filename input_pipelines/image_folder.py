"""A user's own images: a tree of class folders, plain or in a tar or zip file.

Either `train/CLASS/IMAGE` and `test/CLASS/IMAGE` (or `val`, `valid`, `validation`
instead of `test`), or `CLASS/IMAGE` alone; further folders around it do not matter.
"""

import io
import pathlib
import re
import statistics
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from input_pipelines import bars, batching, sources, trees
from input_pipelines.errors import DataError
from input_pipelines.images import eight_bits
from input_pipelines.labelled_arrays import LabelledArrays

ARCHIVE_ENDINGS = ('.tar', '.tar.gz', '.tgz', '.zip')
# The one part of a tree without train and test folders.
_ONLY = 'images'
_TEST_NAMES = ('test', 'val', 'valid', 'validation')


def load(
  name: str, *, data_dir: str = '', manual_dir: str = '', seed: int = 0, size: int = 32
) -> tuple[batching.ArraySplit, batching.ArraySplit, tuple[str, ...]]:
  """Loads the images of the folder or archive `name` in `manual_dir`, or anywhere.

  Images are cut to their central square and scaled to `size` pixels. A tree without
  train and test folders is split at random 70/30 by `seed`.

  Args:
    name: name of the folder, or of the archive without `.tar`, `.tar.gz`, `.tgz` or
      `.zip`; or the path of either, with at least one `/`.
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder that holds it; by default `downloads/manual` in `data_dir`.
    seed: seed of the split.
    size: height and width in pixels.

  Returns:
    `(train, test, classes)`; inputs are uint8 of shape `(size, size, 3)`.

  Raises:
    DataError: it is not there, or something in it is not as described.
  """
  if '/' in name:
    path = pathlib.Path(name)
    source = sources.own(path, [('',)], lambda path: read(path, size=size))
    source = source._replace(name=f'{source.name}_{size}')
    data = sources.load(source, data_dir=data_dir)
    return *splits(data, seed), data.classes
  if not re.fullmatch(r'\w[\w.+-]*', name, flags=re.ASCII):
    raise DataError(
      f'dataset={name!r}: the name of a folder of images may have letters, digits, '
      '".", "+", "-" and "_": rename it.'
    )
  source = sources.Source(
    name=f'{name}_{size}',
    files=[(name,), *((name + ending,) for ending in ARCHIVE_ENDINGS)],
    url='',
    parse=lambda path: read(path, size=size),
    builder='input_pipelines.labelled_arrays_builder',
  )
  data = sources.load(source, data_dir=data_dir, manual_dir=manual_dir)
  return *splits(data, seed), data.classes


def splits(
  data: LabelledArrays, seed: int
) -> tuple[batching.ArraySplit, batching.ArraySplit]:
  """Returns the parts train and test, or a random 70/30 split of the only part."""
  if 'train' in data.parts:
    train, test = (
      batching.ArraySplit(data.parts[part]['inputs'], data.parts[part]['labels'])
      for part in ('train', 'test')
    )
    return train, test
  (part,) = data.parts.values()
  train, test = (
    batching.ArraySplit(part['inputs'][indices], part['labels'][indices])
    for indices in batching.split_indices(len(part['labels']), seed)
  )
  return train, test


def read(
  path: pathlib.Path, *, size: int = 32, classes: Sequence[str] | None = None
) -> LabelledArrays:
  """Reads and validates a tree of images.

  Args:
    path: a folder, or a tar or zip file.
    size: height and width to scale to, in pixels.
    classes: the class folders there have to be, in the order of their labels; by
      default those there are, in alphabetical order.

  Returns:
    Parts `train` and `test`, or `images`, with `inputs` uint8 `(n, size, size, 3)`.

  Raises:
    DataError: a file is no image or damaged, a class folder is empty, missing or
      unknown, or the tree has another shape.
  """
  with trees.entries(path) as tree:
    listing = [(name, read is not None) for name, read in tree]
  places = _places(path, listing, classes)
  images = {place: [] for place in places.values()}
  with (
    trees.entries(path) as tree,
    bars.counted(len(places), path.name, 'images') as done,
  ):
    for name, read in tree:
      if name in places:
        images[places[name]].append(_decode(path, name, read(), size))
        done()
  classes = tuple(classes or sorted({label for _, label in images}))
  parts = {}
  for part in sorted({part for part, _ in images}):
    counts = [len(images[part, label]) for label in classes]
    parts[part] = {
      'inputs': np.concatenate([images[part, label] for label in classes]),
      'labels': np.repeat(np.arange(len(classes)), counts),
    }
  return LabelledArrays(parts, classes)


def _places(
  path: pathlib.Path,
  entries: Sequence[tuple[str, bool]],
  classes: Sequence[str] | None,
) -> Mapping[str, tuple[str, str]]:
  """Returns part and class of every file, after checking that all are in place.

  Args:
    path: the tree.
    entries: name and whether it is a file, of everything in the tree.
    classes: the class folders there have to be, if that is known.
  """
  files = [name for name, is_file in entries if is_file]
  if not files:
    raise DataError(f'{path} holds no files: put one folder of images a class there.')
  outer = _num_outer_folders(entries)
  inside = {name: tuple(name.split('/')[outer:]) for name, _ in entries}
  depth = statistics.mode(len(inside[name]) for name in files)
  for name in files:
    if len(inside[name]) != depth or depth not in (2, 3):
      raise DataError(
        f'{path}: the file {name} lies at another depth than CLASS/IMAGE, or '
        'train/CLASS/IMAGE and test/CLASS/IMAGE: move or remove it.'
      )
  if depth == 2:
    part_names = (_ONLY,)
    inside = {name: (_ONLY, *parts) for name, parts in inside.items()}
  else:
    part_names = ('train', 'test')
    inside = _with_part_names(path, inside)
  folders = {parts[:2] for parts in inside.values() if len(parts) > 1}
  places = {name: inside[name][:2] for name in files}
  filled = {part for part, _ in places.values()}
  for part in part_names:
    if part not in filled:
      raise DataError(
        f'{path} has no images in {part}: put its class folders there, or remove it '
        'and the folder around the others.'
      )
  _check_classes(path, part_names, folders, set(places.values()), classes)
  return places


def _num_outer_folders(entries: Sequence[tuple[str, bool]]) -> int:
  """Counts the folders that lie around all of a tree, down to the class folders."""
  files = [name.split('/') for name, is_file in entries if is_file]
  folders = [name.split('/') for name, is_file in entries if not is_file]
  count = 0
  while count < min(map(len, files)) - 2:
    first = files[0][: count + 1]
    if any(parts[: count + 1] != first for parts in files):
      break
    # A folder beside the first one is empty, but has a place in the tree.
    if any(len(parts) > count and parts[: count + 1] != first for parts in folders):
      break
    count += 1
  return count


def _with_part_names(
  path: pathlib.Path, inside: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
  """Names the folder of test images `test`, whatever it is called."""
  names = {parts[0] for parts in inside.values() if parts}
  other = names - {'train'}
  if len(names) != 2 or len(other) != 1 or not other <= set(_TEST_NAMES):
    raise DataError(
      f'{path} has the folders {_some(names)} where train and test (or val) are '
      'needed: rename, move or remove folders.'
    )
  return {
    name: ('train' if parts[0] == 'train' else 'test', *parts[1:])
    for name, parts in inside.items()
    if parts
  }


def _check_classes(
  path: pathlib.Path,
  parts: Sequence[str],
  folders: Collection[tuple[str, str]],
  filled: Collection[tuple[str, str]],
  classes: Sequence[str] | None,
) -> None:
  """Checks that every part has the same classes, and images of each.

  Args:
    path: the tree.
    parts: those that are needed, the one whose classes count first.
    folders: part and class of every folder.
    filled: those that hold images.
    classes: the classes there have to be, if that is known.
  """
  known = set(classes or (name for part, name in folders if part == parts[0]))
  if len(known) < 2:
    raise DataError(
      f'{path} has the one class folder {_some(known)}: two or more are needed.'
    )
  for part in parts:
    where = str(path) if part == _ONLY else f'{path} in {part}'
    for name in sorted({name for other, name in folders if other == part} - known):
      raise DataError(
        f'{where} has the class folder {name}, which is none of the {len(known)} '
        f'classes ({_some(known)}): rename or remove it.'
      )
    for name in sorted(known):
      if (part, name) not in filled:
        raise DataError(
          f'{where} has no images in the class folder {name}: put some there, or '
          'remove the class everywhere.'
        )


def _some(names: Collection[str]) -> str:
  shown = sorted(names)
  return ', '.join(shown) if len(shown) <= 10 else f'{", ".join(shown[:9])}, ...'


def _decode(path: pathlib.Path, name: str, content: bytes, size: int) -> np.ndarray:
  """Returns an image as uint8 `(size, size, 3)`."""
  import PIL.Image
  import PIL.ImageOps

  try:
    with PIL.Image.open(io.BytesIO(content)) as image:
      upright = eight_bits(PIL.ImageOps.exif_transpose(image)).convert('RGB')
      if upright.size != (size, size):
        upright = PIL.ImageOps.fit(upright, (size, size))
      return np.asarray(upright)
  except PIL.UnidentifiedImageError as error:
    raise DataError(
      f'{name} in {path} is not an image that can be read: replace or remove it.'
    ) from error
  # Decoders raise whatever their format's faults lead them to.
  except Exception as error:
    raise DataError(
      f'{name} in {path} cannot be read as an image ({error}): replace or remove it.'
    ) from error
