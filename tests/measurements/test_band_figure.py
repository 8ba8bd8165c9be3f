"""The figure of a tracked quantity with its error and its edges."""

import numpy as np
import pytest

from measurements import band_figure

BAND = band_figure.Band('x', 'x_error', 'measured', 'C0')
EDGES = [
  band_figure.Edge('edge', 'small', 'k--'),
  band_figure.Edge('other', 'large', 'k:'),
]


def _lines(values):
  steps = range(0, 10 * len(values), 10)
  return [
    {'step': step, 'x': x, 'x_error': x and x / 10, 'edge': 2.0, 'other': 4.0}
    for step, x in zip(steps, values, strict=True)
  ]


def test_a_band_of_95_percent_and_lines_of_the_edges():
  figure = band_figure.draw(
    _lines([1.0, 3.0]), [BAND], EDGES, ylabel='x of a run', title='a run'
  )
  figure.draw_without_rendering()
  (axes,) = figure.axes
  assert figure.get_suptitle() == 'a run'
  assert (axes.get_xlabel(), axes.get_ylabel()) == ('step', 'x of a run')
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  assert labels == ['measured', 'small', 'large']
  curve, small, large = (line.get_ydata() for line in axes.lines)
  np.testing.assert_allclose([curve, small, large], [[1, 3], [2, 2], [4, 4]])
  (band,) = axes.collections
  (path,) = band.get_paths()
  low, high = path.get_extents().intervaly
  assert (low, high) == pytest.approx((1 - 0.196, 3 + 0.588), rel=1e-6)


@pytest.mark.parametrize('values', [[None, None], [1.0, None, -0.5, 2.0]])
def test_what_was_not_measured_leaves_a_gap(values):
  figure = band_figure.draw(_lines(values), [BAND], EDGES, ylabel='x', title='a run')
  figure.draw_without_rendering()
  found = figure.axes[0].lines[0].get_ydata()
  np.testing.assert_array_equal(found, np.array(values, float))


def test_a_picture_is_whole_or_not_there(tmp_path):
  path = tmp_path / 'x.png'
  band_figure.save(path, _lines([1.0]), [BAND], [], ylabel='x', title='a run')
  assert [file.name for file in tmp_path.iterdir()] == ['x.png']
  assert path.read_bytes().startswith(b'\x89PNG')
