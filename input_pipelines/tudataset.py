"""Any graph-classification set of the TUDataset collection, by name.

Morris et al., "TUDataset: A collection of benchmark datasets for learning with
graphs", 2020, arXiv:2007.08663.
"""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import tempfile
import threading
import types
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import numpy as np

from input_pipelines import batching, tudataset_archive
from input_pipelines.errors import DataError

_PUBLISHER = 'https://www.chrsmrrs.com/graphkerneldatasets'
_VERSION = '1.0.0'

# Seconds for a first connection to the publisher, and for each answer after it.
_CONNECT_SECONDS = 0.8
_ANSWER_SECONDS = 30.0

# Above this largest degree the one-hot degree of an unlabelled set gets too wide.
_MAX_ONE_HOT_DEGREE = 511


def load(
  name: str, *, data_dir: str = '', manual_dir: str = '', seed: int = 0
) -> tuple[batching.GraphSplit, batching.GraphSplit, int, int]:
  """Loads a TUDataset, split at random 70/30 by `seed`.

  Sources, in order: the set prepared in `data_dir`; the publisher's `NAME.zip` in
  `manual_dir`; a download from the publisher. A `NAME.zip` in `manual_dir` that
  differs from the archive the prepared set was made from takes its place, once it
  has been found to be whole.

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
  graphs = _find(name, *_folders(data_dir, manual_dir))
  features = _node_features(graphs)
  train, test = batching.split_indices(len(graphs.labels), seed)
  every = _graphs_tuple(graphs, features)
  return (
    batching.GraphSplit(every, graphs.labels, indices=train),
    batching.GraphSplit(every, graphs.labels, indices=test),
    len(graphs.classes),
    features.shape[1],
  )


def _folders(data_dir: str, manual_dir: str) -> tuple[pathlib.Path, pathlib.Path]:
  """Applies TFDS's own defaults, without importing it."""
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  root = pathlib.Path(data_dir or default).expanduser()
  if manual_dir:
    return root, pathlib.Path(manual_dir).expanduser()
  return root, root / 'downloads' / 'manual'


def _find(
  name: str, data_dir: pathlib.Path, manual_dir: pathlib.Path
) -> tudataset_archive.TUGraphs:
  """Returns the graphs from the first source that has them."""
  prepared = data_dir / 'tudataset' / name / _VERSION
  archive = manual_dir / f'{name}.zip'
  if archive.exists():
    digest = tudataset_archive.sha256(archive)
    if _prepared_digest(prepared) != digest:
      return _prepare(name, archive, digest, prepared)
  elif not prepared.exists():
    with _download(name, data_dir, manual_dir) as archive:
      digest = tudataset_archive.sha256(archive)
      return _prepare(name, archive, digest, prepared)
  return _read(prepared)


def _builder() -> types.ModuleType:
  """Imports the TFDS builder; reading arguments and archives needs no TFDS."""
  try:
    from input_pipelines import tudataset_builder
  except ImportError as error:
    raise DataError(
      f'TUDatasets need the package {error.name}: install the requirements with '
      'pip install -r requirements.txt.'
    ) from error
  return tudataset_builder


def _prepared_digest(prepared: pathlib.Path) -> str | None:
  """Returns the digest a prepared set was made from, None if there is no set."""
  if not prepared.exists():
    return None
  try:
    return _builder().digest(prepared)
  except (OSError, ValueError, KeyError):
    return None  # Damaged; an archive at hand takes its place.


def _read(prepared: pathlib.Path) -> tudataset_archive.TUGraphs:
  """Reads a prepared set."""
  builder = _builder()
  try:
    return builder.read(prepared)
  # What TFDS and array_record raise on damaged files is not documented.
  except Exception as error:
    raise DataError(
      f'the prepared set in {prepared} cannot be read ({type(error).__name__}): '
      'delete that folder, and it is made again.'
    ) from error


def _prepare(
  name: str, archive: pathlib.Path, digest: str, prepared: pathlib.Path
) -> tudataset_archive.TUGraphs:
  """Validates an archive, prepares the set from it, and reads the set.

  The set is written to a folder beside its place and then renamed, so what is
  prepared already stays until the new one is complete.
  """
  graphs = tudataset_archive.read(archive, name)
  builder = _builder()
  try:
    prepared.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prepared.parent, prefix='.new-') as new:
      written = builder.prepare(pathlib.Path(new), name, graphs, digest)
      if prepared.exists():
        prepared.rename(pathlib.Path(new) / 'old')
      written.rename(prepared)
  except OSError as error:
    raise DataError(
      f'{prepared} cannot be written ({error.strerror}): give another folder with '
      '--data_dir.'
    ) from error
  return _read(prepared)


@contextlib.contextmanager
def _download(name: str, data_dir: pathlib.Path, manual_dir: pathlib.Path):
  """Downloads an archive from the publisher to a temporary file."""
  url = f'{_PUBLISHER}/{name}.zip'
  advice = f'download {url} to {manual_dir}/ or set --manual_dir to its folder.'
  if not _publisher_answers():
    raise DataError(
      f'{name}.zip is not in {manual_dir}, there is no prepared set in {data_dir}, '
      f'and its publisher cannot be reached: {advice}'
    )
  with tempfile.TemporaryDirectory() as folder:
    archive = pathlib.Path(folder) / f'{name}.zip'
    try:
      with (
        urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as response,
        archive.open('wb') as file,
      ):
        shutil.copyfileobj(response, file)
    except urllib.error.HTTPError as error:
      raise DataError(
        f'the publisher has no {url} (HTTP {error.code}): check the spelling of '
        f'{name!r}, or {advice}'
      ) from error
    except OSError as error:
      raise DataError(f'the download of {url} failed ({error}): {advice}') from error
    yield archive


def _publisher_answers() -> bool:
  """Tells in under a second whether the publisher, or the proxy, is there."""
  target = urllib.parse.urlsplit(_PUBLISHER)
  proxy = urllib.request.getproxies().get(target.scheme)
  if proxy and not urllib.request.proxy_bypass(target.hostname):
    target = urllib.parse.urlsplit(proxy if '//' in proxy else f'//{proxy}')
  answered = threading.Event()

  def connect() -> None:
    with contextlib.suppress(OSError):
      address = target.hostname, target.port or 443
      socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
      answered.set()

  # A thread, because looking up the host's name obeys no timeout.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(_CONNECT_SECONDS)
  return answered.is_set()


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
  import jraph  # Imports jax, which a refused data set need not wait for.

  return jraph.GraphsTuple(
    nodes=features,
    edges=_concatenate(graphs.edge_labels, graphs.edge_attributes),
    senders=graphs.senders,
    receivers=graphs.receivers,
    n_node=graphs.n_node,
    n_edge=graphs.n_edge,
    globals=None,
  )
