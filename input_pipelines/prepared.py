"""Writing and recognising prepared TFDS sets, without TensorFlow."""

import contextlib
import io
import json
import pathlib
from collections.abc import Iterator

import array_record  # noqa: F401  TFDS imports it only when it writes or reads.
import tensorflow_datasets as tfds
from absl import logging


def write(
  builder: type[tfds.core.DatasetBuilder],
  data_dir: pathlib.Path,
  config: tfds.core.BuilderConfig,
) -> pathlib.Path:
  """Writes a set as array_record files and returns its folder.

  Args:
    builder: the class of its builder.
    data_dir: TFDS root folder.
    config: the set.
  """
  tfds.disable_progress_bar()
  with _quiet():
    set_builder = builder(data_dir=data_dir, config=config, file_format='array_record')
    set_builder.download_and_prepare()
  return pathlib.Path(set_builder.data_dir)


def digest(folder: pathlib.Path) -> str:
  """Returns the SHA-256 in a set's metadata, that of what it was made from."""
  return json.loads((folder / 'metadata.json').read_text())['sha256']


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS from reporting a download of unknown size and a custom config."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)
