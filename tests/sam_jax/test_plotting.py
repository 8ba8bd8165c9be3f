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
