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
  name = r'$|\lambda_{min} \,/\, \lambda_{max}|$'
  assert bar.get_ylabel() == f'{name} (clipped at {top:g})'
  low, high = first.collections[0].get_clim()
  assert (low, high) == second.collections[0].get_clim()
  assert low == 0
  assert high == pytest.approx(top)
  if kind == 'heatmap':
    shown = second.collections[0].get_array().reshape(unknown.loss.shape)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.isnan(unknown.loss))


def test_values_of_two_sorts_are_drawn_apart():
  with pytest.raises(ValueError, match=r"\['loss', '\|lambda_min/lambda_max\|'\]"):
    plotting.landscape({'a': _with_path(), 'b': _ratios(1.0)})


def _bowl(low, high, count=21):
  """A surface from one value to another, of which no quantile cuts anything off."""
  x = np.linspace(-1, 1, count)
  rise = np.maximum(abs(x), abs(x[:, None]))
  return landscape.Landscape(x, x, low + (high - low) * rise)


def _is_round(step):
  """Whether a number is 1, 2 or 5 times a power of ten."""
  mantissa = step / 10.0 ** np.floor(np.log10(step) + 1e-9)
  return np.isclose(mantissa, [1, 2, 5], rtol=1e-6).any()


@pytest.mark.parametrize('kind', ['contour', 'heatmap'])
@pytest.mark.parametrize(
  ('low', 'high'),
  [(2.3013, 2.3041), (0.31, 2.9), (-1.7, 4.2), (0.0, 1.3e-5), (731.0, 4210.0)],
)
def test_levels_of_a_narrow_loss_are_round_steps(low, high, kind):
  figure = plotting.landscape(_bowl(low, high), kind)
  levels = figure.axes[0].collections[0].norm.boundaries
  steps = np.diff(levels)
  np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
  assert _is_round(steps[0])
  assert 4 <= len(levels) <= 14
  np.testing.assert_allclose(levels / steps[0], np.round(levels / steps[0]), atol=1e-6)
  # They hold all of it, and no more than a step beside.
  assert levels[0] <= low < levels[1] and levels[-2] < high <= levels[-1]


@pytest.mark.parametrize(
  ('low', 'high', 'expected'),
  [
    (0.32, 28.0, [0.2, 0.5, 1, 2, 5, 10, 20, 50]),
    (0.25, 2.9, [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3]),
    (0.004, 5e4, [10.0**n for n in range(-3, 6)]),
  ],
)
def test_levels_of_a_wide_loss_grow_by_factors(low, high, expected):
  figure = plotting.landscape(_bowl(low, high))
  levels = figure.axes[0].collections[0].norm.boundaries
  np.testing.assert_allclose(levels, expected, rtol=1e-12)


@pytest.mark.parametrize(('low', 'high'), [(1e-30, 1e30), (1e-300, 3.0)])
def test_levels_stay_few(low, high, tmp_path):
  figure = plotting.landscape(_bowl(low, high))
  assert len(figure.axes[0].collections[0].norm.boundaries) <= 12
  figure.savefig(tmp_path / 'landscape.png')


@pytest.mark.parametrize('kind', ['contour', 'surface', 'heatmap'])
@pytest.mark.parametrize('peak', [None, 400.0, np.nan, np.inf])
def test_a_clipped_surface_says_so(kind, peak):
  item = _bowl(1.0, 5.0)
  if peak is not None:
    item.loss[3, 4] = peak
  figure = plotting.landscape({'whole': _bowl(1.0, 5.0), 'peak': item}, kind)
  bar = figure.axes[-1]
  assert bar.get_ylabel() == ('loss' if peak is None else 'loss (clipped at 5)')


@pytest.mark.parametrize(('low', 'high'), [(2.3013, 2.3041), (0.32, 28.0), (0.3, 2.9)])
def test_labels_of_contours_do_not_crowd(low, high):
  figure = plotting.landscape(_bowl(low, high, 41))
  ax = figure.axes[0]
  to_axes = ax.transData + ax.transAxes.inverted()
  places = to_axes.transform([text.get_position() for text in ax.texts])
  assert len(places) >= 3
  assert (places > 0.05).all() and (places < 0.95).all()
  distances = np.linalg.norm(places[:, None] - places, axis=2)
  assert distances[~np.eye(len(places), dtype=bool)].min() > 0.12
  # Each tells the loss that is there, in few digits.
  for text in ax.texts:
    x, y = text.get_position()
    loss = low + (high - low) * max(abs(x), abs(y))
    assert float(text.get_text()) == pytest.approx(loss, abs=0.03 * (high - low))
    assert len(text.get_text()) <= 6
