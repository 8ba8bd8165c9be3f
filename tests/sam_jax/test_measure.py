"""A network measured in one call, against a known spectrum and eval_hessian.py."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval_hessian
import measurements
import sam_jax
import tasks
import train
from sam_jax import curvature, landscape
from sam_jax.measuring import entries
from sam_jax.measuring.parts import PARTS
from training import cli
from training import config as config_lib

_SPECTRUM = np.array([9.0, 4.0, 2.5, 1.0, 0.5, 0.2, -0.3, -2.0])


def _loss(params, batch):
  """A quadratic whose Hessian over all batches has the eigenvalues of `_SPECTRUM`."""
  flat = params['kernel'].reshape(-1)
  return 0.5 * jnp.mean(batch @ flat**2)


@pytest.fixture(scope='module')
def quadratic():
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(24, 8))
  rows = _SPECTRUM + 0.3 * (noise - noise.mean(0))
  batches = [jnp.asarray(part, jnp.float32) for part in np.split(rows, [10, 18])]
  params = {'kernel': jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
  return params, batches


@pytest.fixture(scope='module')
def measured(quadratic, tmp_path_factory):
  folder = tmp_path_factory.mktemp('own') / 'results'
  lines = []
  found = sam_jax.measure(
    _loss,
    *quadratic,
    folder,
    name='a quadratic',
    k=2,
    num_matvecs=4,
    num_probes=2,
    trace_matvecs=8,
    landscape_points=3,
    progress=lines.append,
  )
  return folder, found, lines


def test_a_known_spectrum_is_found(measured):
  _, found, _ = measured
  top = [entry['eigenvalue'] for entry in found['top']]
  bottom = [entry['eigenvalue'] for entry in found['bottom']]
  np.testing.assert_allclose(top, [9, 4], rtol=1e-4)
  np.testing.assert_allclose(bottom, [-0.3, -2], rtol=1e-3)
  assert found['all_converged'] and found['no_copies_missed']
  assert found['lambda_max_residual'] <= 1e-4 * 9
  error = found['trace_standard_error']
  assert error > 0 and abs(found['trace'] - _SPECTRUM.sum()) < 4 * error
  assert found['num_examples'] == 24 and found['num_parameters'] == 8


def test_standard_errors_are_over_batches(quadratic, measured):
  params, batches = quadratic
  _, found, _ = measured
  weights = np.array([10, 8, 6]) / 24
  tops = np.array([float(batch[:, 0].mean()) for batch in batches])
  expected = np.sqrt((weights**2 * (tops - 9) ** 2).sum())
  assert found['lambda_max_standard_error'] == pytest.approx(expected, rel=0.5)
  values = np.array([float(_loss(params, batch)) for batch in batches])
  mean = weights @ values
  evaluation = found['evaluation']
  assert evaluation['train_loss'] == pytest.approx(mean, rel=1e-6)
  expected = np.sqrt(1.5 * (weights**2 * (values - mean) ** 2).sum())
  assert evaluation['train_loss_standard_error'] == pytest.approx(expected, rel=1e-4)


def _losses(params, batch):
  return 0.5 * batch @ params['kernel'].reshape(-1) ** 2


def test_standard_errors_over_examples(quadratic, tmp_path):
  """However the examples are cut into batches, and for a single one."""
  params, batches = quadratic
  rows = np.concatenate(batches).astype(np.float64)
  losses = 0.5 * rows @ np.ravel(params['kernel']).astype(np.float64) ** 2
  few = {'parts': ['evaluation', 'eigenvalues'], 'k': 2, 'example_losses_fn': _losses}
  for number, data in enumerate((batches, [jnp.concatenate(batches)])):
    folder = tmp_path / str(number)
    found = sam_jax.measure(_loss, params, data, folder, **few)
    evaluation = found['evaluation']
    assert evaluation['train_loss'] == pytest.approx(losses.mean(), rel=1e-6)
    expected = losses.std(ddof=1) / np.sqrt(24)
    assert evaluation['train_loss_standard_error'] == pytest.approx(expected, rel=1e-4)
    # Of the resamples there are 200: their spread is known within 5 %.
    for name, column in (('lambda_max', 0), ('lambda_min', 7)):
      expected = rows[:, column].std() / np.sqrt(24)
      error = found[f'{name}_standard_error']
      assert error == pytest.approx(expected, rel=0.2), name
    assert 'over examples' in found['notes']['lambda_max_standard_error']
    assert 'of eigenvalues are over examples, ' in (folder / 'report.html').read_text()


@pytest.mark.parametrize(
  ('losses', 'words'),
  [
    (_loss, r'an array of shape \(\): give one loss for each'),
    (lambda params, batch: 2 * _losses(params, batch), 'the losses of which loss_fn'),
  ],
)
def test_losses_of_other_examples_are_refused(losses, words, quadratic, tmp_path):
  folder = tmp_path / 'new'
  with pytest.raises(ValueError, match=f'example_losses_fn .*{words}'):
    sam_jax.measure(_loss, *quadratic, folder, example_losses_fn=losses)
  assert not folder.exists()


def test_files_hold_what_the_summary_says(measured, quadratic):
  folder, found, lines = measured
  assert {path.name for path in folder.iterdir()} == {
    'summary.json',
    'spectrum.npz',
    'spectral_density.png',
    'landscape.npz',
    'landscape.png',
    'report.html',
  }
  assert json.loads((folder / 'summary.json').read_text()) == found
  surface = landscape.load(folder / 'landscape.npz')
  flat = np.ravel(quadratic[0]['kernel'])
  loss = float(np.mean(np.concatenate(quadratic[1]) @ flat**2) / 2)
  assert surface.loss[1, 1] == pytest.approx(loss, rel=1e-5)
  page = (folder / 'report.html').read_text()
  assert page.count('data:image/png;base64,') == 2 and 'a quadratic' in page
  assert f'{found["lambda_max"]:.6g}' in page
  assert 'evaluation, part 1 of 8' in lines


def test_strangers_files_stay(quadratic, tmp_path):
  kept = tmp_path / 'thesis.tex'
  kept.write_text('mine')
  few = {'parts': ['evaluation'], 'figures': False}
  with pytest.raises(ValueError, match=r'not those of sam_jax\.measure \(as thesis'):
    sam_jax.measure(_loss, *quadratic, tmp_path, **few)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']
  # The results of a training run are a stranger's too.
  run = tmp_path / 'run'
  run.mkdir()
  text = json.dumps({'fingerprint': '1', 'optimizer': 'sgd'})
  (run / 'summary.json').write_text(text)
  with pytest.raises(ValueError, match='as summary.json'):
    sam_jax.measure(_loss, *quadratic, run, **few)
  assert (run / 'summary.json').read_text() == text


def test_an_earlier_call_is_replaced_only_if_it_may_be(quadratic, tmp_path):
  few = {'parts': ['trace'], 'k': 1, 'trace_matvecs': 4, 'figures': False}
  first = sam_jax.measure(_loss, *quadratic, tmp_path, **few)
  assert first['measurements'] == ['eigenvalues', 'trace']
  (tmp_path / 'landscape.png').touch()
  with pytest.raises(ValueError, match='overwrite=True'):
    sam_jax.measure(_loss, *quadratic, tmp_path, **few, overwrite=False)
  assert (tmp_path / 'landscape.png').exists()
  again = sam_jax.measure(_loss, *quadratic, tmp_path, **few)
  assert again['trace'] == first['trace']
  assert [path.name for path in tmp_path.iterdir()] == ['summary.json']


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'parts': ['sharpness']}, "parts names 'sharpness': choose of evaluation"),
    ({'parts': []}, 'parts is empty'),
    ({'k': 9}, 'k=9: give at least 1 and at most the size, 8'),
    ({'tol': 2.0}, 'tol=2.0'),
    ({'landscape_points': 1}, 'landscape_points=1: give at least 2'),
    ({'worst_case_rho': float('nan')}, 'worst_case_rho=nan'),
  ],
)
def test_bad_arguments_are_refused_first(arguments, words, quadratic, tmp_path):
  with pytest.raises(ValueError, match=words):
    sam_jax.measure(_loss, *quadratic, tmp_path / 'new', **arguments)
  assert not (tmp_path / 'new').exists()


def test_one_batch_in_place_of_several_is_refused(quadratic, tmp_path):
  params, (batch, *_) = quadratic
  with pytest.raises(TypeError, match=r'batches is a dict, .* such as \[batch\]'):
    sam_jax.measure(_loss, params, {'x': batch}, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
  ('loss', 'words'),
  [
    (lambda w, batch: batch @ w['kernel'].reshape(-1), r'array of shape \(10,\)'),
    (lambda w, batch: (_loss(w, batch), batch), 'returns a tuple'),
  ],
)
def test_a_loss_that_is_no_scalar_is_refused_first(loss, words, quadratic, tmp_path):
  with pytest.raises(ValueError, match=f'loss_fn .*{words}'):
    sam_jax.measure(loss, *quadratic, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_a_sum_over_the_batch_is_refused_first(tmp_path):
  network = jnp.ones(2), [jnp.ones((4, 2)), jnp.ones((3, 2))]
  with pytest.raises(ValueError, match='loss_fn is a sum over the batch'):
    sam_jax.measure(lambda w, x: jnp.sum((x @ w) ** 2), *network, tmp_path / 'new', k=1)
  assert not (tmp_path / 'new').exists()


def test_a_network_of_one_parameter_has_all_but_a_landscape(tmp_path):
  """0.5 mean(x) w^2 has the curvature mean(x)."""
  loss = lambda w, x: 0.5 * jnp.mean(x) * w**2
  network = jnp.float32(2.0), [jnp.array([1.0, 2.0]), jnp.array([6.0])]
  with pytest.raises(ValueError, match=r"parts: 'landscape' .* has one parameter"):
    sam_jax.measure(loss, *network, tmp_path, k=1)
  parts = [part for part in PARTS if part != 'landscape']
  options = {'k': 1, 'num_matvecs': 1, 'figures': False}
  found = sam_jax.measure(loss, *network, tmp_path, parts=parts, **options)
  np.testing.assert_allclose(found['lambda_max'], 3.0, rtol=1e-5)
  np.testing.assert_allclose(found['trace'], 3.0, rtol=1e-5)


def test_a_matrix_of_one_entry_moves_with_the_biases(tmp_path):
  params = {'kernel': jnp.ones((1, 1)), 'bias': jnp.array([0.5])}
  loss = lambda w, x: jnp.mean((x * w['kernel'][0] + w['bias'] - 1) ** 2)
  options = {'parts': ['landscape'], 'k': 1, 'landscape_points': 3, 'figures': False}
  found = sam_jax.measure(loss, params, [jnp.array([1.0, 2.0])], tmp_path, **options)
  low, high = found['landscape']['loss_range']
  assert 0 <= low < high < np.inf


def test_figures_without_matplotlib_are_refused(quadratic, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(ImportError, match='figures=False'):
    sam_jax.measure(_loss, *quadratic, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_a_measurement_that_stops_leaves_what_it_did(quadratic, tmp_path):
  def broken(params, batch):
    return jnp.exp(1000 * params['kernel'].sum()) * batch.sum()

  params = {'kernel': jnp.ones((4, 2))}
  few = {'figures': False, 'k': 1}
  with pytest.raises(curvature.NonFiniteError):
    sam_jax.measure(broken, params, quadratic[1], tmp_path, **few)
  left = json.loads((tmp_path / 'summary.json').read_text())
  assert left['measurements'] == ['evaluation'] and 'lambda_max' not in left
  # The next call measures what it is asked for, and nothing of this one stays.
  again = sam_jax.measure(_loss, *quadratic, tmp_path, parts=['trace'], **few)
  assert again['measurements'] == ['eigenvalues', 'trace']
  assert 'evaluation' not in again


def test_numbers_are_those_of_eval_hessian(tmp_path):
  flags = ['--nocache', f'--workdir={tmp_path}']
  trained = ['--devices=1', '--epochs=1']
  assert cli.run(train.main, ['train.py', *flags, *trained]) == 0
  chosen = ['--num_examples=128', '--batch_size=64', '--worst_case_group=64']
  chosen += ['--top_k=2', '--num_matvecs=8', '--num_probes=2', '--trace_matvecs=8']
  chosen += ['--landscape_points=3', '--one_batch_repeats=0']
  assert cli.run(eval_hessian.main, ['eval_hessian.py', *flags, *chosen]) == 0
  theirs = json.loads((tmp_path / 'hessian/summary.json').read_text())

  config = config_lib.load(tmp_path)
  problem = tasks.build(config)
  network = measurements.restore(tmp_path, config, problem)
  drawn = problem.train.batches(64, seed=0).epoch(0)
  batches = [
    {name: batch[name] for name in ('inputs', 'labels')}
    for batch in (next(drawn), next(drawn))
  ]

  def loss(params, batch):
    outputs = problem.model.apply({'params': params}, batch['inputs'], train=False)
    smooth, hot = config.label_smoothing, jax.nn.one_hot(batch['labels'], 10)
    targets = (1 - smooth) * hot + smooth / 9 * (1 - hot)
    entropy = jnp.sum(targets * jnp.log(jnp.maximum(targets, 1e-30)), -1)
    cross = jnp.sum(targets * jax.nn.log_softmax(outputs), -1)
    return jnp.mean(entropy - cross)

  ours = sam_jax.measure(
    loss,
    network.params,
    batches,
    tmp_path / 'own',
    k=2,
    num_matvecs=8,
    num_probes=2,
    trace_matvecs=8,
    landscape_points=3,
    figures=False,
  )
  # Only what a training run and its options add is not there.
  assert set(theirs) - set(ours) == {'layers', 'one_batch'}
  assert not set(ours) - set(theirs)
  assert ours['num_parameters'] == theirs['num_parameters']
  assert ours['all_converged'] and theirs['all_converged']
  scale = theirs['lambda_max']
  for name in (
    'lambda_max',
    'lambda_min',
    'adaptive_sharpness',
    'trace',
    'squared_frobenius_norm',
    'worst_case_sharpness',
    'average_case_sharpness',
  ):
    assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4 * scale), name
    error = f'{name}_standard_error'
    if name not in ('lambda_max', 'lambda_min', 'adaptive_sharpness'):
      assert ours[error] == pytest.approx(theirs[error], rel=1e-2, abs=1e-6), name
  surfaces = [
    landscape.load(folder / 'landscape.npz')
    for folder in (tmp_path / 'own', tmp_path / 'hessian')
  ]
  np.testing.assert_allclose(surfaces[0].loss, surfaces[1].loss, rtol=1e-4)


def test_a_smallest_eigenvalue_of_zero_leaves_its_ratio_without_an_error():
  """Of two batches one adds nothing: a quarter of the resamples have a mean of 0."""
  found = entries.extremes_errors(np.array([[5.0, 9.0], [4.0, 0.0]]), None, 0)
  assert not np.isfinite(found['lambda_max_over_abs_lambda_min_standard_error'])
  assert found['lambda_max_standard_error'] == pytest.approx(2**0.5, rel=0.05)
