"""The figure of the edge of stability."""

import pytest

from measurements import edges_figure


@pytest.mark.parametrize('top', [3.0, 40.0, 4000.0])
def test_labels_of_logarithmic_axes_do_not_crowd(top):
  names = ('operator_norm', 'loss', 'gradient_norm')
  lines = [
    {'step': step, **dict.fromkeys(names, value), 'gradient_alignment': 0.5}
    for step, value in ((0, 1.1), (10, top))
  ]
  figure = edges_figure.draw(lines, 'a run')
  figure.draw_without_rendering()
  assert figure.get_suptitle() == 'a run'
  for ax in figure.axes[:2]:
    low, high = ax.get_ylim()
    labels = [
      label
      for label in ax.yaxis.get_ticklabels(which='both')
      if label.get_text() and low <= label.get_position()[1] <= high
    ]
    assert len(labels) >= 2
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda b: b.y0)
    assert all(a.y1 < b.y0 + 1 for a, b in zip(boxes, boxes[1:], strict=False))
    assert all('e' not in label.get_text() for label in labels)


@pytest.mark.parametrize('update, curves', [(0.5, 1), (0.7, 2)])
def test_one_curve_hides_no_other(update, curves):
  line = dict.fromkeys(('operator_norm', 'loss', 'gradient_norm'), 1.0)
  line |= {'step': 0, 'gradient_alignment': 0.5, 'update_alignment': update}
  figure = edges_figure.draw([line], 'a run')
  assert len(figure.axes[2].lines) == curves
