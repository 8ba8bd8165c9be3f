"""TFDS builder for any set of labelled arrays; works without TensorFlow."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from input_pipelines import prepared
from input_pipelines.labelled_arrays import LabelledArrays
from input_pipelines.prepared import digest as digest

# Examples in a record: single ones would take minutes to read.
_BLOCK = 1000


class LabelledArraysConfig(tfds.core.BuilderConfig):
  """One set: its name, and its validated arrays."""

  def __init__(self, name: str, data: LabelledArrays, sha256: str):
    """Takes the set's name, its arrays and the SHA-256 of what they come from."""
    super().__init__(name=name, description=f'labelled arrays of {name}')
    self.data = data
    self.sha256 = sha256


class LabelledArraysSet(tfds.core.GeneratorBasedBuilder):
  """Parts of a set, such as train and test; a record holds up to 1,000 examples.

  Every feature of a record is one array with an axis of examples in front, stored as
  bytes. The metadata holds the classes and the SHA-256 of the set's files.
  """

  name = 'labelled_arrays'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    part = next(iter(config.data.parts.values()))
    features = {
      name: tfds.features.Tensor(
        shape=(None, *array.shape[1:]), dtype=array.dtype, encoding='bytes'
      )
      for name, array in part.items()
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=config.description,
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(
        sha256=config.sha256, classes=list(config.data.classes)
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    del dl_manager  # The files have been read and validated already.
    parts = self.builder_config.data.parts
    return {name: self._generate_examples(part) for name, part in parts.items()}

  def _generate_examples(
    self, part: Mapping[str, np.ndarray]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for start in range(0, len(part['labels']), _BLOCK):
      yield start, {name: x[start : start + _BLOCK] for name, x in part.items()}


def prepare(
  data_dir: pathlib.Path, name: str, data: LabelledArrays, sha256: str
) -> pathlib.Path:
  """Writes a set as array_record files and returns its folder.

  Args:
    data_dir: TFDS root folder.
    name: name of the set.
    data: its validated arrays; no part is empty.
    sha256: digest of the files they come from.
  """
  config = LabelledArraysConfig(name, data, sha256)
  return prepared.write(LabelledArraysSet, data_dir, config)


def read(folder: pathlib.Path) -> LabelledArrays:
  """Reads a prepared set back.

  Args:
    folder: the folder of the set's version, as `prepare` returned it.
  """
  builder = tfds.builder_from_directory(folder)
  parts = {}
  for name in builder.info.splits:
    records = list(builder.as_data_source(split=name))
    parts[name] = {
      feature: np.concatenate([record[feature] for record in records])
      for feature in records[0]
    }
  return LabelledArrays(parts, tuple(builder.info.metadata['classes']))
