"""TUDatasets: parsing, the three sources, and every kind of damage."""

import functools
import http.server
import pathlib
import shutil
import socket
import threading
import time
import zipfile

import jax
import numpy as np
import pytest

from input_pipelines import DataError, sources, tudataset, tudataset_archive

# Three graphs: a triangle of nodes 1 to 3, a single node 4, nodes 5 and 6 joined one
# way. Labels are negative, have gaps, and a class comes second that is the smaller.
TOY = {
  'A': '1, 2\n2, 1\n2, 3\n3, 2\n1, 3\n3, 1\n5, 6\n',
  'graph_indicator': '1\n1\n1\n2\n3\n3\n',
  'graph_labels': '7\n-1\n7\n',
  'node_labels': '-3\n5\n5\n9\n-3\n9\n',
  'edge_labels': '2\n2\n2\n2\n0\n0\n4\n',
  'node_attributes': '.5, 1\n-2e1, 0\n0, 0\n1, 1\n3, 4\n5, 6\n',
}


def _write(folder: pathlib.Path, files=None, name='TOY', **changes) -> pathlib.Path:
  """Writes an archive; a change to None leaves the file out."""
  folder.mkdir(exist_ok=True)
  path = folder / f'{name}.zip'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for file, text in {**(files or TOY), **changes}.items():
      if text is not None:
        archive.writestr(f'{name}/{name}_{file}.txt', text)
  return path


@pytest.fixture
def load(tmp_path, monkeypatch):
  """`load` from and into folders of the test, with the publisher out of reach."""
  monkeypatch.setattr(sources, '_answers', lambda url: False)
  return functools.partial(
    tudataset.load,
    'TOY',
    data_dir=str(tmp_path / 'data'),
    manual_dir=str(tmp_path / 'manual'),
  )


def _graphs(*splits) -> list[dict]:
  """Every graph of the splits, by label and size, without padding."""
  batches = [batch for split in splits for batch in split.batches(1).epoch(0)]
  graphs = []
  for batch in batches:
    inputs = batch['inputs']
    nodes, edges = inputs.n_node[0], inputs.n_edge[0]
    graphs.append(
      {
        'label': int(batch['labels'][0]),
        'nodes': inputs.nodes[:nodes].tolist(),
        'ends': list(
          zip(
            inputs.senders[:edges].tolist(),
            inputs.receivers[:edges].tolist(),
            strict=True,
          )
        ),
        'edges': None if inputs.edges is None else inputs.edges[:edges].tolist(),
      }
    )
  return sorted(graphs, key=lambda graph: -len(graph['nodes']))


def test_features_labels_and_edges(load, tmp_path):
  _write(tmp_path / 'manual')
  train, test, num_classes, num_features = load()
  assert (train.num_examples, test.num_examples) == (2, 1)
  assert (num_classes, num_features) == (2, 5)
  triangle, pair, single = _graphs(train, test)
  # Node labels -3, 5, 9 one-hot, then the two attributes.
  assert triangle == {
    'label': 1,
    'nodes': [[1, 0, 0, 0.5, 1], [0, 1, 0, -20, 0], [0, 1, 0, 0, 0]],
    'ends': [(1, 0), (2, 0), (0, 1), (2, 1), (1, 2), (0, 2)],
    'edges': [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]],
  }
  assert pair == {
    'label': 1,
    'nodes': [[1, 0, 0, 3, 4], [0, 0, 1, 5, 6]],
    'ends': [(0, 1)],
    'edges': [[0, 0, 1]],
  }
  assert single == {'label': 0, 'nodes': [[0, 0, 1, 1, 1]], 'ends': [], 'edges': []}


def test_nodes_need_not_be_grouped_by_graph(load, tmp_path):
  _write(
    tmp_path / 'manual',
    A='1, 3\n4, 2\n',
    graph_indicator='2\n1\n2\n1\n3\n3\n',
    edge_labels='0\n1\n',
    node_attributes=None,
  )
  train, test, _, _ = load()
  shapes = {
    (tuple(map(tuple, graph['nodes'])), tuple(graph['ends']))
    for graph in _graphs(train, test)
  }
  assert shapes == {
    (((0, 1, 0), (0, 0, 1)), ((1, 0),)),
    (((1, 0, 0), (0, 1, 0)), ((0, 1),)),
    (((1, 0, 0), (0, 0, 1)), ()),
  }


def test_unlabelled_nodes_get_their_degree_or_a_constant(load, tmp_path):
  bare = {'node_labels': None, 'node_attributes': None, 'edge_labels': None}
  _write(tmp_path / 'manual', **bare)
  train, test, _, num_features = load()
  assert num_features == 3
  assert [graph['nodes'] for graph in _graphs(train, test)] == [
    [[0, 0, 1]] * 3,
    [[1, 0, 0], [0, 1, 0]],
    [[1, 0, 0]],
  ]
  assert all(graph['edges'] is None for graph in _graphs(train, test))
  star = ''.join(f'{node}, 1\n' for node in range(2, 600))
  _write(
    tmp_path / 'manual',
    **bare,
    A=star,
    graph_indicator='1\n' * 599 + '2\n',
    graph_labels='0\n1\n',
  )
  train, _, _, num_features = load()
  assert num_features == 1
  assert set(np.unique(next(train.batches(1).epoch(0))['inputs'].nodes)) == {0, 1}


def test_a_set_without_edges_and_a_graph_without_nodes(load, tmp_path):
  _write(
    tmp_path / 'manual',
    A='',
    graph_labels='0\n1\n2\n1\n',
    edge_labels=None,
    node_attributes=None,
  )
  train, test, num_classes, _ = load()
  assert num_classes == 3
  sizes = [len(graph['nodes']) for graph in _graphs(train, test)]
  assert sizes == [3, 2, 1, 0]


def test_prepared_sets_need_no_archive_and_follow_a_new_one(load, tmp_path):
  archive = _write(tmp_path / 'manual')
  first = load()
  archive.unlink()
  again = load()
  assert _graphs(*first[:2]) == _graphs(*again[:2])
  _write(tmp_path / 'manual', node_attributes=None)
  assert load()[3] == 3
  archive.unlink()
  assert load()[3] == 3
  folder = tmp_path / 'data' / 'tudataset' / 'TOY'
  assert [entry.name for entry in folder.iterdir()] == ['1.0.0']


def test_a_bad_archive_leaves_the_prepared_set_alone(load, tmp_path):
  archive = _write(tmp_path / 'manual')
  load()
  prepared = tmp_path / 'data'
  before = {path: path.read_bytes() for path in prepared.rglob('*') if path.is_file()}
  archive.write_bytes(archive.read_bytes()[:200])
  with pytest.raises(DataError, match=r'TOY\.zip is not a complete zip archive'):
    load()
  after = {path: path.read_bytes() for path in prepared.rglob('*') if path.is_file()}
  assert before == after


def test_a_damaged_prepared_set_is_named_and_mended(load, tmp_path):
  archive = _write(tmp_path / 'manual')
  load()
  folder = tmp_path / 'data' / 'tudataset' / 'TOY' / '1.0.0'
  kept = archive.read_bytes()
  archive.unlink()
  (folder / 'features.json').write_text('{')
  with pytest.raises(DataError, match=r'1\.0\.0 cannot be read .* delete that folder'):
    load()
  (folder / 'metadata.json').write_text('{')
  archive.write_bytes(kept)
  assert load()[3] == 5


BAD_FILES = {
  'sender out of range': (
    {'A': '1, 2\n9, 1\n'},
    r'TOY_A\.txt in .*: line 2 has 9, outside the 6 nodes 1 to 6',
  ),
  'receiver zero': ({'A': '1, 0\n'}, r'TOY_A\.txt .*line 1 has 0'),
  'indicator out of range': (
    {'graph_indicator': '1\n1\n1\n2\n3\n4\n'},
    r'graph_indicator\.txt .*line 6 has 4, outside the 3 graphs 1 to 3',
  ),
  'indicator negative': (
    {'graph_indicator': '1\n-1\n1\n2\n3\n3\n'},
    r'graph_indicator\.txt .*line 2 has -1',
  ),
  'edge between graphs': (
    {'A': '1, 2\n3, 4\n'},
    r'TOY_A\.txt .*line 2 joins nodes 3 and 4 of different graphs',
  ),
  'words': ({'A': '1, 2\n1, two\n'}, r"TOY_A\.txt .*line 2 has 'two', not a number"),
  'fractions': (
    {'node_labels': '1\n1\n1\n2.5\n3\n3\n'},
    r'node_labels\.txt .*line 4 has 2\.5, not a whole number',
  ),
  'not finite': (
    {'node_attributes': '1\n1\nnan\n2\n3\n3\n'},
    r'node_attributes\.txt .*line 3 has nan',
  ),
  'not text': ({'graph_labels': b'1\n\xff\xfe\n2\n'}, r'graph_labels\.txt .*line 2'),
  'three columns': ({'A': '1, 2, 3\n'}, r'line 1 has 3 numbers where 2 are needed'),
  'ragged': ({'A': '1, 2\n1\n'}, r'line 2 has 1 numbers where 2 are needed'),
  'too few node labels': (
    {'node_labels': '1\n2\n'},
    r'node_labels\.txt .*2 lines where 6 are needed',
  ),
  'too many edge labels': (
    {'edge_labels': '1\n' * 8},
    r'edge_labels\.txt .*8 lines where 7 are needed',
  ),
  'one class': ({'graph_labels': '1\n1\n1\n'}, r'distinct labels: 1, needed are two'),
  'no graphs': ({'graph_labels': ''}, r'distinct labels: 0, needed are two'),
  'no edge file': ({'A': None}, r'TOY\.zip has no TOY/TOY_A\.txt'),
  'no graph labels': (
    {'graph_labels': None},
    r'TOY\.zip has no TOY/TOY_graph_labels\.txt',
  ),
}


@pytest.mark.parametrize(
  ('changes', 'message'), BAD_FILES.values(), ids=BAD_FILES.keys()
)
def test_bad_files_are_named_in_one_sentence(load, tmp_path, changes, message):
  _write(tmp_path / 'manual', **changes)
  with pytest.raises(DataError, match=message) as caught:
    load()
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize(
  'member', ['../TOY_A.txt', 'TOY/../../x', '/etc/x', 'C:/x', '..\\x', '\\x']
)
def test_paths_that_climb_out_are_refused(load, tmp_path, member):
  with zipfile.ZipFile(_write(tmp_path / 'manual'), 'a') as archive:
    archive.writestr(zipfile.ZipInfo(member), 'x')
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(DataError, match='leads out of the archive'):
    load()
  assert sorted(tmp_path.rglob('*')) == before


def test_a_flipped_byte_in_the_archive_is_found(load, tmp_path):
  archive = _write(tmp_path / 'manual')
  content = bytearray(archive.read_bytes())
  content[60] ^= 0xFF
  archive.write_bytes(content)
  with pytest.raises(DataError, match='not a complete zip archive'):
    load()


@pytest.mark.parametrize('name', ['', '..', '../x', 'a/b', 'https://x'])
def test_names_that_are_no_file_names_are_refused(name):
  with pytest.raises(DataError, match='is not the name of a TUDataset'):
    tudataset.load(name)


def test_without_a_source_one_sentence_in_under_a_second(tmp_path, monkeypatch):
  # A resolver that hangs is what a machine without a network often has.
  def hang(*arguments, **keywords):
    time.sleep(2)
    raise TimeoutError

  monkeypatch.setattr(socket, 'create_connection', hang)
  start = time.perf_counter()
  with pytest.raises(DataError) as caught:
    tudataset.load('TOY', data_dir=str(tmp_path), manual_dir=str(tmp_path / 'manual'))
  assert time.perf_counter() - start < 1
  for part in (
    'TOY.zip',
    'https://www.chrsmrrs.com/graphkerneldatasets/TOY.zip',
    str(tmp_path / 'manual'),
    '--manual_dir',
  ):
    assert part in str(caught.value)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
  """Serves files and reports nothing."""

  def log_message(self, *arguments):
    """Says nothing."""


@pytest.fixture
def publisher(tmp_path, monkeypatch):
  """A publisher on this machine; returns the folder it serves."""
  folder = tmp_path / 'published'
  folder.mkdir()
  handler = functools.partial(_QuietHandler, directory=str(folder))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(tudataset, '_PUBLISHER', address)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    yield folder
    server.shutdown()
    thread.join()


def test_the_publisher_is_the_last_source(publisher, tmp_path):
  _write(publisher)
  arguments = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(tmp_path)}
  assert tudataset.load('TOY', **arguments)[3] == 5
  (publisher / 'TOY.zip').unlink()
  assert tudataset.load('TOY', **arguments)[3] == 5
  with pytest.raises(DataError, match=r'no .*/MISSING\.zip \(HTTP 404\)'):
    tudataset.load('MISSING', **arguments)


@pytest.mark.parametrize('package', ['tensorflow_datasets', 'array_record'])
def test_without_tfds_an_archive_is_read_as_it_would_be_prepared(
  load, tmp_path, hide, package
):
  _write(tmp_path / 'manual')
  prepared = load()
  shutil.rmtree(tmp_path / 'data')
  hide(package)
  direct = load()
  assert not (tmp_path / 'data').exists()
  assert direct[2:] == prepared[2:]
  for read, expected in zip(direct[:2], prepared[:2], strict=True):
    assert _graphs(read) == _graphs(expected)


def test_without_tfds_a_download_is_kept(publisher, tmp_path, hide):
  _write(publisher)
  hide('tensorflow_datasets', 'tqdm')
  manual = tmp_path / 'manual'
  arguments = {'data_dir': str(tmp_path / 'data'), 'manual_dir': str(manual)}
  assert tudataset.load('TOY', **arguments)[3] == 5
  assert (manual / 'TOY.zip').read_bytes() == (publisher / 'TOY.zip').read_bytes()
  (publisher / 'TOY.zip').unlink()
  assert tudataset.load('TOY', **arguments)[3] == 5
  (publisher / 'BAD.zip').write_bytes(b'')
  with pytest.raises(DataError):
    tudataset.load('BAD', **arguments)
  (tmp_path / 'file').touch()
  with pytest.raises(DataError, match='file cannot be written .* --manual_dir'):
    _write(publisher)
    tudataset.load('TOY', **{**arguments, 'manual_dir': str(tmp_path / 'file')})
  assert [path.name for path in manual.iterdir()] == ['TOY.zip']


def test_packages_that_are_needed_are_named(load, tmp_path, hide):
  archive = _write(tmp_path / 'manual')
  load()
  archive.unlink()
  hide('tensorflow_datasets')
  with pytest.raises(DataError, match='package tensorflow_datasets: .* --manual_dir'):
    load()
  _write(tmp_path / 'manual')
  hide('jraph')
  with pytest.raises(DataError, match='package jraph: install'):
    load()


def test_folders_default_to_those_of_tfds(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  monkeypatch.setattr(sources, '_answers', lambda url: False)
  _write(tmp_path / 'manual').rename(tmp_path / 'TOY.zip')
  (tmp_path / 'downloads' / 'manual').mkdir(parents=True)
  (tmp_path / 'TOY.zip').rename(tmp_path / 'downloads' / 'manual' / 'TOY.zip')
  assert tudataset.load('TOY')[3] == 5
  assert (tmp_path / 'tudataset' / 'TOY' / '1.0.0').is_dir()


def test_a_folder_that_cannot_be_written_is_named(load, tmp_path):
  _write(tmp_path / 'manual')
  (tmp_path / 'data').write_text('a file')
  with pytest.raises(DataError, match='cannot be written .* --data_dir'):
    load()


def test_mutagenicity_is_what_its_publisher_says(data_dir, tmp_path):
  archive = data_dir / 'Mutagenicity.zip'
  graphs = tudataset_archive.read(archive, 'Mutagenicity')
  assert np.bincount(graphs.labels).tolist() == [2401, 1936]
  assert graphs.n_node.sum() == 131_488
  assert graphs.n_node.max() == 417
  assert len(graphs.senders) == graphs.n_edge.sum() == 266_894
  train, test, num_classes, num_features = tudataset.load(
    'Mutagenicity', data_dir=str(tmp_path), manual_dir=str(data_dir)
  )
  assert (train.num_examples, test.num_examples) == (3035, 1302)
  assert (num_classes, num_features) == (2, 14)
  batches = [b for split in (train, test) for b in split.batches(64).epoch(0)]
  inputs = [batch['inputs'] for batch in batches]
  assert inputs[0].edges.shape[1] == 3
  assert sum(graphs.n_node[:-1].sum() for graphs in inputs) == 131_488
  assert sum(graphs.n_edge[:-1].sum() for graphs in inputs) == 266_894
  assert sum(graphs.nodes.sum() for graphs in inputs) == 131_488
  assert sum(batch['labels'].sum() for batch in batches) == 1936
  assert all(leaf.dtype != np.float64 for leaf in jax.tree.leaves(batches[0]))
