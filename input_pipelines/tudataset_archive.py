"""The publisher's archive of a TUDataset, read in memory and validated.

`NAME.zip` holds `NAME/NAME_A.txt` (one edge a line: sender, receiver, counted from
1), `NAME_graph_indicator.txt` (the graph of each node, from 1) and
`NAME_graph_labels.txt`; optionally `NAME_node_labels.txt`,
`NAME_node_attributes.txt`, `NAME_edge_labels.txt` and `NAME_edge_attributes.txt`.
Nothing is ever extracted to disk.
"""

import io
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from input_pipelines.errors import DataError


class TUGraphs(NamedTuple):
  """The graphs of a TUDataset, one after the other.

  N nodes, E edges, G graphs; an optional file that a set does not have is None.

  Attributes:
    senders: int64 `(E,)`, node indices over all graphs; grouped by graph.
    receivers: int64 `(E,)`.
    n_node: int64 `(G,)`, nodes of each graph.
    n_edge: int64 `(G,)`, edges of each graph.
    labels: int64 `(G,)`, classes 0 to C-1.
    classes: the publisher's label of each class, ascending.
    node_labels: int64 `(N, k)`, any integers.
    node_attributes: float32 `(N, k)`.
    edge_labels: int64 `(E, k)`, any integers.
    edge_attributes: float32 `(E, k)`.
  """

  senders: np.ndarray
  receivers: np.ndarray
  n_node: np.ndarray
  n_edge: np.ndarray
  labels: np.ndarray
  classes: tuple[int, ...]
  node_labels: np.ndarray | None = None
  node_attributes: np.ndarray | None = None
  edge_labels: np.ndarray | None = None
  edge_attributes: np.ndarray | None = None


def read(path: pathlib.Path, name: str) -> TUGraphs:
  """Reads and validates the archive of the set `name`.

  Args:
    path: the zip file.
    name: the set's name, which is that of the archive's folder and files.

  Returns:
    The graphs, in the publisher's order.

  Raises:
    DataError: the archive is damaged, holds paths that climb out of its folder,
      lacks a file, or its files do not fit together.
  """
  return _assemble(_Archive(path, name))


class _Archive:
  """The text files of one archive as arrays."""

  def __init__(self, path: pathlib.Path, name: str):
    self._path = path
    self._name = name
    prefix = f'{name}/{name}_'
    try:
      with zipfile.ZipFile(path) as archive:
        self._refuse_climbing(archive.namelist())
        self._texts = {
          member.removeprefix(prefix): archive.read(member)
          for member in archive.namelist()
          if member.startswith(prefix) and member.endswith('.txt')
        }
    except OSError as error:
      raise DataError(
        f'{path} cannot be read ({error.strerror}): make it a readable file.'
      ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
      raise DataError(
        f'{path} is not a complete zip archive ({error}): download it again.'
      ) from error

  def _refuse_climbing(self, members: list[str]) -> None:
    for member in members:
      parts = member.replace('\\', '/').split('/')
      # A drive letter, as in 'C:/x', is absolute too.
      if '..' in parts or not parts[0] or ':' in parts[0]:
        raise DataError(
          f'{self._path} holds the path {member!r}, which leads out of the '
          "archive's folder: get the archive from its publisher again."
        )

  def error(self, file: str, problem: str) -> DataError:
    """Returns an error about one of the files."""
    return DataError(
      f'{self._name}_{file}.txt in {self._path}: {problem}; get the archive '
      'from its publisher again or correct the file.'
    )

  def integers(self, file: str, columns: int | None = None) -> np.ndarray:
    """Returns a required file of whole numbers, one row a line."""
    values = self._numbers(file, columns)
    if values is None:
      raise DataError(
        f'{self._path} has no {self._name}/{self._name}_{file}.txt: '
        'get the archive from its publisher again.'
      )
    wrong = np.argwhere(values != np.rint(values))
    if len(wrong):
      row, column = wrong[0]
      value = values[row, column]
      raise self.error(file, f'line {row + 1} has {value:g}, not a whole number')
    return values.astype(np.int64)

  def optional_integers(self, file: str, rows: int) -> np.ndarray | None:
    """Returns an optional file of whole numbers with `rows` lines."""
    if f'{file}.txt' not in self._texts:
      return None
    return self._counted(file, self.integers(file), rows)

  def optional_floats(self, file: str, rows: int) -> np.ndarray | None:
    """Returns an optional file of finite numbers with `rows` lines."""
    values = self._numbers(file, None)
    if values is None:
      return None
    return self._counted(file, values, rows).astype(np.float32)

  def _counted(self, file: str, values: np.ndarray, rows: int) -> np.ndarray:
    if len(values) != rows:
      raise self.error(file, f'{len(values)} lines where {rows} are needed')
    return values

  def _numbers(self, file: str, columns: int | None) -> np.ndarray | None:
    """Returns a file of numbers as a float64 table, None if there is no file."""
    if f'{file}.txt' not in self._texts:
      return None
    text = self._texts[f'{file}.txt'].decode('ascii', errors='replace')
    if not text.strip():
      return np.zeros((0, columns or 1))
    try:
      values = np.loadtxt(io.StringIO(text), delimiter=',', comments=None, ndmin=2)
    except ValueError as error:
      raise self.error(file, _first_fault(text)) from error
    if columns is not None and values.shape[1] != columns:
      raise self.error(
        file, f'line 1 has {values.shape[1]} numbers where {columns} are needed'
      )
    if not np.isfinite(values).all():
      row, column = np.argwhere(~np.isfinite(values))[0]
      raise self.error(file, f'line {row + 1} has {values[row, column]}')
    return values


def _first_fault(text: str) -> str:
  """Says which line of a table is the first that is not like the others."""
  width = None
  for number, line in enumerate(text.splitlines(), start=1):
    if not line.strip():
      continue
    fields = line.split(',')
    for field in fields:
      try:
        float(field)
      except ValueError:
        return f'line {number} has {field.strip()[:40]!r}, not a number'
    width = width or len(fields)
    if len(fields) != width:
      return f'line {number} has {len(fields)} numbers where {width} are needed'
  return 'the numbers cannot be read'


def _assemble(archive: _Archive) -> TUGraphs:
  """Puts the files together and checks that they fit."""
  original = archive.integers('graph_labels', 1)[:, 0]
  classes, labels = np.unique(original, return_inverse=True)
  if len(classes) < 2:
    raise archive.error(
      'graph_labels', f'distinct labels: {len(classes)}, needed are two or more'
    )
  indicator = archive.integers('graph_indicator', 1)[:, 0] - 1
  _check_range(archive, 'graph_indicator', indicator[:, None], len(labels), 'graphs')
  edges = archive.integers('A', 2) - 1
  _check_range(archive, 'A', edges, len(indicator), 'nodes')
  crossing = np.flatnonzero(indicator[edges[:, 0]] != indicator[edges[:, 1]])
  if len(crossing):
    sender, receiver = edges[crossing[0]] + 1
    raise archive.error(
      'A',
      f'line {crossing[0] + 1} joins nodes {sender} and {receiver} of different graphs',
    )
  # Published sets have their nodes grouped by graph already; then this is a no-op.
  node_order = np.argsort(indicator, kind='stable')
  new_index = np.argsort(node_order)
  edge_order = np.argsort(indicator[edges[:, 0]], kind='stable')
  senders, receivers = new_index[edges[edge_order]].T

  def ordered(values: np.ndarray | None, order: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[order]

  num_nodes, num_edges = len(indicator), len(edges)
  return TUGraphs(
    senders=senders,
    receivers=receivers,
    n_node=np.bincount(indicator, minlength=len(labels)),
    n_edge=np.bincount(indicator[edges[:, 0]], minlength=len(labels)),
    labels=labels,
    classes=tuple(classes.tolist()),
    node_labels=ordered(
      archive.optional_integers('node_labels', num_nodes), node_order
    ),
    node_attributes=ordered(
      archive.optional_floats('node_attributes', num_nodes), node_order
    ),
    edge_labels=ordered(
      archive.optional_integers('edge_labels', num_edges), edge_order
    ),
    edge_attributes=ordered(
      archive.optional_floats('edge_attributes', num_edges), edge_order
    ),
  )


def _check_range(
  archive: _Archive, file: str, indices: np.ndarray, count: int, things: str
) -> None:
  """Checks that indices from 0 are below `count`; the message counts from 1."""
  wrong = np.argwhere((indices < 0) | (indices >= count))
  if len(wrong):
    row, column = wrong[0]
    value = indices[row, column] + 1
    raise archive.error(
      file, f'line {row + 1} has {value}, outside the {count} {things} 1 to {count}'
    )
