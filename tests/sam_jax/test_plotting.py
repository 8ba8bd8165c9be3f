"""Figures: they draw, on shared axes, whatever the numbers are."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import curvature, landscape, plotting


def _density(top, num_probes):
  values = jnp.append(jnp.linspace(-1.0, 1.0, 99), top)
  operator = curvature.operator(lambda v: values * v, values)
  return curvature.spectral_density(operator, 12, num_probes)


def _surface(scale):
  x = np.linspace(-1, 1, 5)
  return landscape.Landscape(x, x, scale * (x[None] ** 2 + x[:, None] ** 2))


def test_densities_share_their_axes(tmp_path):
  figure = plotting.spectral_density(
    {'sgd': _density(20, 2), 'sam': _density(5, 1)}, title='two runs'
  )
  first, second = figure.axes
  assert first.get_xlim() == second.get_xlim()
  assert first.get_ylim() == second.get_ylim()
  assert [ax.get_title() for ax in figure.axes] == ['sgd', 'sam']
  figure.savefig(tmp_path / 'density.png')


@pytest.mark.parametrize('kind', ['contour', 'surface', 'heatmap'])
def test_landscapes_share_levels(kind, tmp_path):
  blown_up = _surface(1.0)
  blown_up.loss[0, 0], blown_up.loss[0, 1] = np.nan, np.inf
  figure = plotting.landscape({'sgd': blown_up, 'sam': _surface(0.1)}, kind)
  first, second, _ = figure.axes
  assert first.get_xlim() == second.get_xlim()
  assert first.collections[0].get_clim() == second.collections[0].get_clim()
  figure.savefig(tmp_path / 'landscape.png')


@pytest.mark.parametrize('loss', [np.full((5, 5), 2.0), np.full((5, 5), np.nan)])
@pytest.mark.parametrize('kind', ['contour', 'surface', 'heatmap'])
def test_flat_and_undefined_surfaces_are_drawn(loss, kind, tmp_path):
  x = np.linspace(-1, 1, 5)
  figure = plotting.landscape(landscape.Landscape(x, x, loss), kind)
  figure.savefig(tmp_path / 'landscape.png')


def test_lines_share_one_picture(tmp_path):
  x = np.linspace(-1, 1, 5)
  item = landscape.Landscape(x, None, x**2, ('interpolation',))
  figure = plotting.landscape({'a': item, 'b': item})
  assert len(figure.axes) == 1
  figure.savefig(tmp_path / 'lines.png')
  with pytest.raises(ValueError, match='mixes lines and surfaces'):
    plotting.landscape({'a': item, 'b': _surface(1.0)})
  with pytest.raises(ValueError, match="kind='cloud'"):
    plotting.landscape(item, 'cloud')


_X, _Y = np.linspace(-3, 3, 7), np.linspace(-1, 2, 5)
_PATH = np.array([[1.5, 1.5], [1.0, 1.0], [0.0, 0.0]])


def _with_path():
  loss = _X**2 + _Y[:, None] ** 2
  labels = ('component 1', 'component 2')
  return landscape.Landscape(
    _X, _Y, loss, labels, path=_PATH, explained=(0.8312, 0.1049)
  )


def _points(line):
  """The coordinates of a line in two or three dimensions, (t, 2 or 3)."""
  return np.stack(getattr(line, 'get_data_3d', line.get_data)(), 1)


@pytest.mark.parametrize('kind', ['contour', 'heatmap', 'surface'])
def test_a_trajectory_is_drawn_over_its_surface(kind, tmp_path):
  figure = plotting.landscape(_with_path(), kind, title='a run')
  figure.savefig(tmp_path / 'trajectory.png')
  ax, bar = figure.axes
  assert '83.1 %' in ax.get_xlabel() and '10.5 %' in ax.get_ylabel()
  assert bar.get_ylabel() == 'loss'
  assert figure.get_suptitle() == 'a run'
  whole = [_points(line) for line in ax.lines if len(_points(line)) == len(_PATH)]
  ends = {line.get_marker(): _points(line)[0] for line in ax.lines}
  for points in whole:
    np.testing.assert_array_equal(points[:, :2], _PATH)
  np.testing.assert_array_equal(ends['s'][:2], _PATH[0])
  np.testing.assert_array_equal(ends['*'][:2], _PATH[-1])
  if kind == 'surface':
    # Linear between x = 1 and 2 and between y = 1.25 and 2.
    height = (1 + 4) / 2 + (2 * 1.25**2 + 1 * 2**2) / 3
    np.testing.assert_allclose(ends['s'][2], height)
    assert ax.get_zlabel() == 'loss'
  else:
    np.testing.assert_allclose(ax.get_xlim(), [-3, 3], atol=0.5)


def _ratios(scale):
  loss = scale * (_X**2 + _Y[:, None] ** 2)
  return landscape.Landscape(_X, _Y, loss, value=landscape.EIGEN_RATIO)


@pytest.mark.parametrize(
  ('scale', 'top'), [(0.01, 0.14), (0.05, 0.7), (10.0, 1.0), (0.0, 1e-6)]
)
@pytest.mark.parametrize('kind', ['contour', 'heatmap', 'surface'])
def test_maps_of_ratios_run_from_0_to_at_most_1(kind, scale, top, tmp_path):
  unknown = _ratios(scale / 2)
  unknown.loss[1, 2], unknown.loss[0, 0] = np.nan, np.inf
  figure = plotting.landscape({'sgd': _ratios(scale), 'sam': unknown}, kind)
  figure.savefig(tmp_path / 'ratio.png')
  first, second, bar = figure.axes
  assert bar.get_ylabel() == r'$|\lambda_{min} \,/\, \lambda_{max}|$'
  low, high = first.collections[0].get_clim()
  assert (low, high) == second.collections[0].get_clim()
  assert low == 0
  assert high == pytest.approx(top)
  if kind == 'heatmap':
    shown = second.collections[0].get_array().reshape(unknown.loss.shape)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.isnan(unknown.loss))


def test_values_of_two_sorts_are_drawn_apart():
  with pytest.raises(ValueError, match=r"\['lambda_min/lambda_max', 'loss'\]"):
    plotting.landscape({'a': _with_path(), 'b': _ratios(1.0)})
