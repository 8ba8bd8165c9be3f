"""The averages of descent in closed form; the flow's own numbers; going on."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax import edges
from studies import central_flow, full_batch


def quadratic(params, curvatures):
  return 0.5 * jnp.sum(curvatures * params['w'] ** 2)


def valley(params, _):
  w = params['w']
  return 0.25 * (w[0] * w[1] - 1) ** 2 + 0.1 * (w[2] - w[0]) ** 2


def test_a_window_averages_an_oscillation_away(x64):
  """Along the first direction each step turns the sign, along the second it shrinks."""
  rate, curvatures, start = 0.5, np.array([4.0, 1.0]), np.array([0.3, 2.0])
  full = types.SimpleNamespace(loss=quadratic, batch=jnp.array(curvatures))
  found = list(
    central_flow.averages(full, rate, [4, 9], 4, {'w': jnp.array(start)}),
  )
  weights = np.array([0.5, 1, 1, 1, 0.5]) / 4
  for average, middle in zip(found, [4, 9], strict=True):
    times = np.arange(middle - 2, middle + 3)
    path = start * (1 - rate * curvatures) ** times[:, None]
    assert average.step == middle
    np.testing.assert_allclose(average.params['w'], weights @ path, atol=1e-12)
    assert abs(average.params['w'][0]) < 1e-12
    losses = (curvatures * path**2).sum(1) / 2
    np.testing.assert_allclose(average.loss, weights @ losses, rtol=1e-12)
    steps = rate * np.linalg.norm(curvatures * path, axis=1)
    np.testing.assert_allclose(average.variance, weights @ (steps**2 / 4), rtol=1e-12)
    np.testing.assert_allclose(average.descent['w'], path[-1], rtol=1e-12)
  np.testing.assert_allclose(found[-1].variance, 0.3**2, rtol=0.02)


def problem():
  return types.SimpleNamespace(
    loss=valley, params={'w': np.array([1.7, 0.0, 2.1])}, batch=jnp.zeros(())
  )


SETTINGS = {'substeps': 2, 'num_eigenvalues': 2}


def test_lines_put_the_flow_beside_the_average(x64):
  full, rate, steps = problem(), 1.1, [6, 12]
  lines = [line for line, _ in central_flow.compare(full, rate, steps, 4, **SETTINGS)]
  flow = edges.central_flow(valley, full.params, full.batch, rate, steps, **SETTINGS)
  w, path = jnp.array(full.params['w']), []
  for _ in range(15):
    path.append(np.asarray(w))
    w = w - rate * jax.grad(valley)({'w': w}, 0)['w']
  weights = np.array([0.5, 1, 1, 1, 0.5]) / 4
  for line, state, middle in zip(lines, flow, steps, strict=True):
    average = weights @ np.array(path[middle - 2 : middle + 3])
    hessian = jax.hessian(lambda w: valley({'w': w}, 0))(average)
    wanted = np.linalg.eigvalsh(hessian)[-1]
    np.testing.assert_allclose(line['descent_sharpness'], wanted, rtol=2e-3)
    np.testing.assert_allclose(line['flow_sharpness'], state.eigenvalues[0])
    np.testing.assert_allclose(line['predicted_loss'], state.predicted_loss)
    np.testing.assert_allclose(line['flow_variance'], np.trace(state.covariance))
    distance = np.linalg.norm(average - state.params['w'])
    np.testing.assert_allclose(line['distance'], distance)
    moved = np.linalg.norm(average - full.params['w'])
    np.testing.assert_allclose(line['relative_distance'], distance / moved)


def test_a_study_that_was_killed_writes_the_same_lines(x64, tmp_path):
  full, steps, facts = problem(), [3, 6, 12], {'name': 'test'}
  whole = [line for line, _ in central_flow.compare(full, 1.1, steps, 2, **SETTINGS)]
  assert whole[-1]['at_edge'] == 1
  for number in range(len(steps)):
    journal = full_batch.Journal(tmp_path / 'out', facts)
    found = central_flow.compare(
      full, 1.1, steps[number:], 2, journal.state, **SETTINGS
    )
    journal.add(*next(found))
    journal.close()
  text = (tmp_path / 'out' / full_batch.LINES).read_text()
  assert text == ''.join(json.dumps(line) + '\n' for line in whole)


def line(step, at_edge, predicted):
  return {
    'step': step,
    'edge': 2.0,
    'descent_loss': 1.0,
    'predicted_loss': predicted,
    'flow_loss': 0.5,
    'descent_sharpness': 2.0,
    'flow_sharpness': 1.9,
    'descent_variance': 0.2,
    'flow_variance': 0.1 * at_edge,
    'at_edge': at_edge,
    'relative_distance': 0.01 * step,
  }


LINES = [line(1, 0, 9.0), line(2, 1, 1.1), line(3, 2, 0.8), line(4, 1, 1.3)]


def test_medians_are_of_the_lines_at_the_edge():
  found = central_flow.summarize(LINES)
  assert found['edge_step'] == 2 and found['compared'] == 3
  np.testing.assert_allclose(found['predicted_loss'], 0.2)
  np.testing.assert_allclose(found['flow_loss'], 0.5)
  np.testing.assert_allclose(found['sharpness'], 0.05)
  np.testing.assert_allclose(found['variance'], 0.5)
  np.testing.assert_allclose(found['relative_distance'], 0.03)
  # Of the means (1.1 + 0.8 + 1.3) / 3 is a fifteenth above 1.
  np.testing.assert_allclose(found['of_means']['predicted_loss'], 1 / 15)
  np.testing.assert_allclose(found['of_means']['flow_loss'], -0.5)
  np.testing.assert_allclose(found['of_means']['variance'], 0.4 / 0.6 - 1)
  assert 'predicted loss 20.00 %' in found['text']
  assert 'predicted loss +6.67 %' in found['text']
  below = central_flow.summarize(LINES[:1])
  assert below['edge_step'] is None and below['variance'] is None
  assert 'not at the edge in 1 steps' in below['text']


def test_the_figure_has_three_panels():
  panels = central_flow.draw(LINES, 'title').axes
  by_label = {x.get_label(): x for axes in panels for x in axes.get_lines()}
  predicted = by_label['predicted by the central flow'].get_ydata()
  assert by_label['at the average of gradient descent'].get_ydata().tolist() == [2] * 4
  assert np.asarray(predicted, float)[1:].tolist() == [0.1, 0.2, 0.1]
  assert len(panels) == 3
