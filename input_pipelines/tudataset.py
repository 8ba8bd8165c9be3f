"""Any graph-classification set of the TUDataset collection, by name.

Morris et al., "TUDataset: A collection of benchmark datasets for learning with
graphs", 2020, arXiv:2007.08663.
"""

import re
from typing import Any

import numpy as np

from input_pipelines import batching, sources, tudataset_archive
from input_pipelines.errors import DataError

_PUBLISHER = 'https://www.chrsmrrs.com/graphkerneldatasets'

# Above this largest degree the one-hot degree of an unlabelled set gets too wide.
_MAX_ONE_HOT_DEGREE = 511


def load(
  name: str, *, data_dir: str = '', manual_dir: str = '', seed: int = 0
) -> tuple[batching.GraphSplit, batching.GraphSplit, int, int]:
  """Loads a TUDataset, split at random 70/30 by `seed`.

  Sources, in order: the set prepared in `data_dir`; the publisher's `NAME.zip` in
  `manual_dir`, when the prepared set was not made from it; a download from the
  publisher.

  Node features are the one-hot node labels and after them the node attributes; a
  set that has neither gets the one-hot degree, or the constant 1 where a node has
  more than 511 neighbours. Edge features, likewise, are the one-hot edge labels
  and the edge attributes. Graph labels become the classes 0 to C-1, in ascending
  order.

  Args:
    name: the publisher's name of the set, such as `'Mutagenicity'`.
    data_dir: TFDS folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    manual_dir: folder that holds `NAME.zip`; by default `downloads/manual` in
      `data_dir`.
    seed: seed of the split.

  Returns:
    `(train, test, num_classes, num_features)`.

  Raises:
    DataError: there is no source, or the data are damaged.
  """
  if not re.fullmatch(r'\w[\w.+-]*', name, flags=re.ASCII):
    raise DataError(
      f'dataset={name!r} is not the name of a TUDataset: give one of the names '
      'on https://chrsmrrs.github.io/datasets, such as Mutagenicity.'
    )
  source = sources.Source(
    name=name,
    files=[(f'{name}.zip',)],
    url=f'{_PUBLISHER}/{name}.zip',
    parse=lambda path: tudataset_archive.read(path, name),
    builder='input_pipelines.tudataset_builder',
  )
  graphs = sources.load(source, data_dir=data_dir, manual_dir=manual_dir)
  features = _node_features(graphs)
  train, test = batching.split_indices(len(graphs.labels), seed)
  every = _graphs_tuple(graphs, features)
  return (
    batching.GraphSplit(every, graphs.labels, indices=train),
    batching.GraphSplit(every, graphs.labels, indices=test),
    len(graphs.classes),
    features.shape[1],
  )


def _one_hot(labels: np.ndarray) -> np.ndarray:
  """Encodes each column of integers by its distinct values, ascending."""
  columns = [
    (column[:, None] == np.unique(column)).astype(np.float32) for column in labels.T
  ]
  return np.concatenate(columns, axis=1)


def _node_features(graphs: tudataset_archive.TUGraphs) -> np.ndarray:
  """Returns float32 node features of shape `(N, F)`."""
  labels, attributes = graphs.node_labels, graphs.node_attributes
  if labels is None and attributes is None:
    degrees = np.bincount(graphs.receivers, minlength=graphs.n_node.sum())
    if degrees.max(initial=0) > _MAX_ONE_HOT_DEGREE:
      return np.ones((len(degrees), 1), np.float32)
    labels = degrees[:, None]
  return _concatenate(labels, attributes)


def _concatenate(
  labels: np.ndarray | None, attributes: np.ndarray | None
) -> np.ndarray | None:
  """Puts one-hot labels and attributes side by side, None if there are none."""
  parts = [] if labels is None else [_one_hot(labels)]
  parts += [] if attributes is None else [attributes]
  return np.concatenate(parts, axis=1) if parts else None


def _graphs_tuple(graphs: tudataset_archive.TUGraphs, features: np.ndarray) -> Any:
  try:
    import jraph  # Imports jax, which a refused data set need not wait for.
  except ModuleNotFoundError as error:
    raise DataError(
      f'sets of graphs need the package {error.name}: install the requirements with '
      'pip install -r requirements.txt.'
    ) from error
  return jraph.GraphsTuple(
    nodes=features,
    edges=_concatenate(graphs.edge_labels, graphs.edge_attributes),
    senders=graphs.senders,
    receivers=graphs.receivers,
    n_node=graphs.n_node,
    n_edge=graphs.n_edge,
    globals=None,
  )
