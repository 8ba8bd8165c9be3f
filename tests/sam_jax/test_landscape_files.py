"""Landscapes on disk: npz of every version, VTK by a strict reader of its own."""

import dataclasses
import itertools

import numpy as np
import pytest

from sam_jax import landscape

_X, _Y = np.array([-1.0, 0.1, 1.0, 2.0]), np.array([0.0, 1e-5, 3.0])
_LOSS = 0.25 + _X**2 + _Y[:, None] ** 3


def _read_vtk(path):
  """Points, point data, shape and lines of a legacy ASCII file, read to the letter."""
  lines = iter(path.read_text('ascii').splitlines())
  assert next(lines) == '# vtk DataFile Version 3.0'
  assert 0 < len(next(lines)) < 256
  assert next(lines) == 'ASCII'
  shape, cells = None, None
  dataset = next(lines)
  if dataset == 'DATASET STRUCTURED_GRID':
    word, *shape = next(lines).split(' ')
    assert word == 'DIMENSIONS'
    shape = tuple(map(int, shape))
  else:
    assert dataset == 'DATASET POLYDATA'
  word, count, kind = next(lines).split(' ')
  assert (word, kind) == ('POINTS', 'double')
  count = int(count)
  assert shape is None or np.prod(shape) == count
  rows = [next(lines).split(' ') for _ in range(count)]
  points = np.array(rows, np.float64)
  assert points.shape == (count, 3)
  if shape is None:
    assert next(lines) == f'LINES 1 {count + 1}'
    length, *cells = map(int, next(lines).split(' '))
    assert length == len(cells)
  assert next(lines) == f'POINT_DATA {count}'
  data = {}
  for line in lines:
    word, name, kind, components = line.split(' ')
    assert (word, kind, components) == ('SCALARS', 'double', '1')
    assert next(lines) == 'LOOKUP_TABLE default'
    values = list(itertools.islice(lines, count))
    data[name] = np.array(values, np.float64)
    assert len(values) == count
  assert np.isfinite(points).all()
  assert all(np.isfinite(values).all() for values in data.values())
  return points, data, shape, cells


def test_everything_comes_back(tmp_path):
  item = landscape.Landscape(
    _X,
    _Y,
    _LOSS,
    ('first', 'second'),
    value=landscape.EIGEN_RATIO,
    path=np.arange(6.0).reshape(3, 2),
    explained=(0.75, 0.125),
  )
  item.save(tmp_path / 'all.npz')
  again = landscape.load(tmp_path / 'all.npz')
  for field in dataclasses.fields(item):
    want, got = getattr(item, field.name), getattr(again, field.name)
    assert type(got) is type(want)
    np.testing.assert_array_equal(got, want)


def test_files_of_the_first_version_load(tmp_path):
  np.savez(tmp_path / 'old.npz', x=_X, loss=_X**2, labels=np.array(['direction 1']))
  item = landscape.load(tmp_path / 'old.npz')
  np.testing.assert_array_equal(item.loss, _X**2)
  assert (item.y, item.labels, item.value) == (None, ('direction 1',), 'loss')
  assert (item.path, item.explained) == (None, ())


def test_a_ratio_of_an_older_version_is_absolute_too(tmp_path):
  older = landscape.Landscape(_X, _Y, _LOSS, value='lambda_min/lambda_max')
  older.save(tmp_path / 'old.npz')
  item = landscape.load(tmp_path / 'old.npz')
  assert item.value == landscape.EIGEN_RATIO == '|lambda_min/lambda_max|'


def test_a_surface_as_vtk(tmp_path):
  landscape.Landscape(_X, _Y, _LOSS).save_vtk(tmp_path / 'surface.vtk')
  points, data, shape, _ = _read_vtk(tmp_path / 'surface.vtk')
  assert shape == (4, 3, 1)
  # x runs fastest, as the format has it.
  grid = points.reshape(3, 4, 3)
  np.testing.assert_array_equal(grid[:, :, 0], np.tile(_X, (3, 1)))
  np.testing.assert_array_equal(grid[:, :, 1].T, np.tile(_Y, (4, 1)))
  np.testing.assert_array_equal(grid[:, :, 2], _LOSS)
  np.testing.assert_array_equal(data['loss'], _LOSS.ravel())
  np.testing.assert_allclose(10 ** data['log_loss'], _LOSS.ravel())


def test_a_line_as_vtk(tmp_path):
  item = landscape.Landscape(_X, None, _X**2, ('von Ä\nnach B',))
  item.save_vtk(tmp_path / 'line.vtk')
  points, data, _, cells = _read_vtk(tmp_path / 'line.vtk')
  assert cells == [0, 1, 2, 3]
  np.testing.assert_array_equal(points, np.stack([_X, 0 * _X, _X**2], 1))


@pytest.mark.parametrize(
  ('loss', 'written', 'logarithm'),
  [
    ([1.0, np.nan, 100.0, np.inf], [1, 100, 100, 100], [0, 2, 2, 2]),
    ([0.0, -1.0, 0.1, -np.inf], [0, -1, 0.1, 0.1], [-1, -1, -1, -1]),
    ([np.nan, np.inf, np.nan, np.nan], [0, 0, 0, 0], None),
    ([0.0, -1.0, 0.0, -2.0], [0, -1, 0, -2], None),
  ],
)
def test_vtk_of_what_has_no_logarithm_or_is_not_finite(
  tmp_path, loss, written, logarithm
):
  landscape.Landscape(_X, None, np.array(loss)).save_vtk(tmp_path / 'line.vtk')
  points, data, _, _ = _read_vtk(tmp_path / 'line.vtk')
  np.testing.assert_array_equal(points[:, 2], written)
  np.testing.assert_array_equal(data['loss'], written)
  if logarithm is None:
    assert set(data) == {'loss'}
  else:
    np.testing.assert_allclose(data['log_loss'], logarithm, atol=1e-15)
