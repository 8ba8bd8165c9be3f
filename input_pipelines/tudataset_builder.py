"""TFDS builder for any TUDataset; works without TensorFlow."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from input_pipelines import prepared, tudataset_archive
from input_pipelines.prepared import digest as digest

# Features that a set may have.
_OPTIONAL = {
  'node_labels': np.int64,
  'node_attributes': np.float32,
  'edge_labels': np.int64,
  'edge_attributes': np.float32,
}


class TUDatasetConfig(tfds.core.BuilderConfig):
  """One set: its name, and its validated archive."""

  def __init__(self, name: str, graphs: tudataset_archive.TUGraphs, sha256: str):
    """Takes the set's name, its graphs and the SHA-256 of their archive."""
    super().__init__(name=name, description=f'TUDataset {name}')
    self.graphs = graphs
    self.sha256 = sha256


class TUDataset(tfds.core.GeneratorBasedBuilder):
  """Graphs of a TUDataset (Morris et al. 2020, arXiv:2007.08663), all in one split.

  An example is one graph: `edges` `(E, 2)` (sender, receiver, from 0), `num_nodes`,
  `label` (0 to C-1), and `node_labels`, `node_attributes`, `edge_labels`,
  `edge_attributes` where the set has them. The metadata holds the SHA-256 of the
  archive.
  """

  name = 'tudataset'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    graphs = self.builder_config.graphs
    features = {
      'edges': tfds.features.Tensor(shape=(None, 2), dtype=np.int64),
      'num_nodes': tfds.features.Scalar(dtype=np.int64),
      'label': tfds.features.ClassLabel(names=[str(c) for c in graphs.classes]),
    }
    for feature, dtype in _OPTIONAL.items():
      values = getattr(graphs, feature)
      if values is not None:
        shape = (None, values.shape[1])
        features[feature] = tfds.features.Tensor(shape=shape, dtype=dtype)
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'TUDataset {self.builder_config.name}',
      homepage='https://chrsmrrs.github.io/datasets/',
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(sha256=self.builder_config.sha256),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    del dl_manager  # The archive has been read and validated already.
    return {'graphs': self._generate_examples(self.builder_config.graphs)}

  def _generate_examples(
    self, graphs: tudataset_archive.TUGraphs
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    last_node, last_edge = np.cumsum(graphs.n_node), np.cumsum(graphs.n_edge)
    for index, label in enumerate(graphs.labels):
      first_node = last_node[index] - graphs.n_node[index]
      nodes = slice(first_node, last_node[index])
      edges = slice(last_edge[index] - graphs.n_edge[index], last_edge[index])
      ends = np.stack([graphs.senders[edges], graphs.receivers[edges]], axis=1)
      example = {
        'edges': ends - first_node,
        'num_nodes': int(graphs.n_node[index]),
        'label': int(label),
      }
      for feature in _OPTIONAL:
        values = getattr(graphs, feature)
        if values is not None:
          rows = nodes if feature.startswith('node') else edges
          example[feature] = values[rows]
      yield index, example


def prepare(
  data_dir: pathlib.Path,
  name: str,
  graphs: tudataset_archive.TUGraphs,
  sha256: str,
) -> pathlib.Path:
  """Writes a set as array_record files and returns its folder.

  Args:
    data_dir: TFDS root folder.
    name: name of the set.
    graphs: its validated graphs.
    sha256: digest of the archive they come from.
  """
  return prepared.write(TUDataset, data_dir, TUDatasetConfig(name, graphs, sha256))


def read(folder: pathlib.Path) -> tudataset_archive.TUGraphs:
  """Reads a prepared set back.

  Args:
    folder: the folder of the set's version, as `prepare` returned it.
  """
  builder = tfds.builder_from_directory(folder)
  examples = list(builder.as_data_source(split='graphs'))
  n_node = np.array([example['num_nodes'] for example in examples])
  n_edge = np.array([len(example['edges']) for example in examples])
  ends = np.concatenate([example['edges'] for example in examples])
  ends += np.repeat(np.cumsum(n_node) - n_node, n_edge)[:, None]
  return tudataset_archive.TUGraphs(
    senders=ends[:, 0],
    receivers=ends[:, 1],
    n_node=n_node,
    n_edge=n_edge,
    labels=np.array([example['label'] for example in examples]),
    classes=tuple(int(c) for c in builder.info.features['label'].names),
    **{
      feature: np.concatenate([example[feature] for example in examples])
      for feature in _OPTIONAL
      if feature in builder.info.features
    },
  )
