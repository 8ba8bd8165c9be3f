"""Descent against flow on quadratics, where both have closed forms; going on."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from studies import full_batch, gradient_flow

CURVATURES = np.array([4.0, 1.0, 0.25])
START = np.array([1.0, -2.0, 0.5])


def quadratic(params, curvatures):
  return 0.5 * jnp.sum(curvatures * jnp.concatenate([params['a'], params['b']]) ** 2)


def problem(dtype):
  start = START.astype(dtype)
  return types.SimpleNamespace(
    loss=quadratic,
    params={'a': start[:1], 'b': start[1:]},
    batch=CURVATURES.astype(dtype),
  )


@pytest.mark.parametrize('rate', [0.05, 0.52])
def test_lines_have_the_closed_forms(x64, rate):
  steps = [0, 1, 7, 20]
  found = gradient_flow.compare(problem('float64'), rate, steps, 0.05)
  for step, (line, _) in zip(steps, found, strict=True):
    descents = [(1 - rate * CURVATURES) ** t * START for t in range(step + 1)]
    flow = np.exp(-rate * CURVATURES * step) * START
    path = sum(
      np.linalg.norm(after - before)
      for before, after in zip(descents, descents[1:], strict=False)
    )
    assert line['step'] == step
    np.testing.assert_allclose(line['time'], rate * step)
    distance = np.linalg.norm(descents[-1] - flow)
    np.testing.assert_allclose(line['distance'], distance, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(line['path_length'], path, rtol=1e-9)
    if step:
      wanted = distance / path
      np.testing.assert_allclose(line['relative_distance'], wanted, rtol=1e-4)
    else:
      assert line['relative_distance'] is None
    np.testing.assert_allclose(line['sharpness'], 4, rtol=1e-5)
    np.testing.assert_allclose(line['flow_sharpness'], 4, rtol=1e-5)
    np.testing.assert_allclose(line['edge'], 2 / rate, rtol=1e-6)
    loss = lambda w: CURVATURES @ w**2 / 2
    np.testing.assert_allclose(line['loss'], loss(descents[-1]), rtol=1e-9)
    np.testing.assert_allclose(line['flow_loss'], loss(flow), rtol=1e-4)


def test_a_study_that_was_killed_writes_the_same_lines(tmp_path):
  full, steps, facts = problem('float32'), [0, 3, 8, 20, 21], {'name': 'test'}
  whole = [line for line, _ in gradient_flow.compare(full, 0.3, steps)]
  for number in range(len(steps) + 1):  # Each start writes one line, and is killed.
    journal = full_batch.Journal(tmp_path / 'out', facts)
    assert journal.lines == whole[:number]
    left = steps[number:]
    for line, state in gradient_flow.compare(full, 0.3, left, 0.5, journal.state):
      journal.add(line, state)
      break
    journal.close()
    with (tmp_path / 'out' / full_batch.LINES).open('a') as file:
      # A line whose state was not written any more, and half of another.
      file.write(json.dumps({'step': 99}) + '\n{"step": 1')
  journal = full_batch.Journal(tmp_path / 'out', facts)
  journal.close()
  text = (tmp_path / 'out' / full_batch.LINES).read_text()
  assert text == ''.join(json.dumps(line) + '\n' for line in whole)


def line(step, distance, path, sharpness, flow):
  return {
    'step': step,
    'edge': 2.0,
    'distance': distance,
    'path_length': path,
    'relative_distance': distance / path if path else None,
    'sharpness': sharpness,
    'flow_sharpness': flow,
  }


LINES = [
  line(0, 0.0, 0.0, 1.0, 1.0),
  line(10, 0.02, 1.0, 1.2, 1.2),
  line(20, 0.01, 2.0, 1.6, 1.7),
  line(30, 0.02, 2.5, 1.9, 2.1),
  line(40, 0.024, 3.0, 2.1, 2.4),
  line(50, 0.4, 4.0, 1.9, 2.8),
  line(60, 0.35, 7.0, 2.0, 3.0),
]


def test_the_summary_finds_the_crossing_and_what_comes_before_and_after():
  found = gradient_flow.summarize(LINES)
  assert found['crossing_step'] == 40 and found['flow_crossing_step'] == 30
  assert found['largest_before'] == {'step': 10, 'relative_distance': 0.02}
  assert found['largest_before_half']['step'] == 10
  assert found['below_one_percent_from'] == 20
  assert found['largest_after'] == {'step': 50, 'relative_distance': 0.1}
  np.testing.assert_allclose(found['growth'], 0.1 / 0.008)
  np.testing.assert_allclose(found['distance_growth'], 0.4 / 0.024)
  np.testing.assert_allclose(found['at_end'], 0.05)
  np.testing.assert_allclose(found['largest_flow_sharpness_over_edge'], 1.5)
  assert 'at step 40' in found['text'] and '10.00 % at step 50 ' in found['text']


def test_without_a_crossing_nothing_is_said_of_one():
  found = gradient_flow.summarize(LINES[:4])
  assert found['crossing_step'] is None and found['growth'] is None
  assert found['text'].startswith('no crossing of 2 / eta = 2 in 30 steps')
  # What starts above the edge crosses it when it has been below.
  above = line(0, 0.0, 0.0, 2.5, 2.5)
  assert gradient_flow.summarize([above])['crossing_step'] is None
  assert gradient_flow.summarize([above, *LINES[1:]])['crossing_step'] == 40
  assert gradient_flow.summarize([above, LINES[0]])['largest_before'] is None


def test_the_figure_shows_both_panels_and_the_crossing():
  upper, lower = gradient_flow.draw(LINES, 'title').axes
  by_label = {x.get_label(): x for axes in (upper, lower) for x in axes.get_lines()}
  descent = by_label['gradient descent'].get_ydata().tolist()
  assert descent == [line['sharpness'] for line in LINES]
  assert by_label['2 / eta'].get_ydata()[0] == 2
  assert by_label['distance'].get_ydata()[1] == 0.02
  assert lower.get_yscale() == 'log'
  marks = [x.get_xdata()[0] for x in lower.get_lines() if len(x.get_xdata()) == 2]
  assert 40 in marks
  gradient_flow.draw(LINES[:1], 'the first line alone')


def test_the_start_of_the_descent_is_no_part_of_the_state():
  """Going on needs the state alone, not the parameters of the start."""
  full = problem('float32')
  (_, state), (whole, _) = gradient_flow.compare(full, 0.3, [2, 5])
  full.params = jax.tree.map(jnp.zeros_like, full.params)
  (rest,) = (line for line, _ in gradient_flow.compare(full, 0.3, [5], 0.5, state))
  assert rest == whole
