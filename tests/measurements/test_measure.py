"""What is measured of a network, against dense float64 matrices."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import training
from training import losses, sharpness

_CONFIG = training.Config(batch_size=8, label_smoothing=0.1)
_OPTIONS = sharpness.Options(
  dtype='float64',
  tol=1e-8,
  batch_size=10,
  num_matvecs=20,
  num_probes=3,
  landscape_points=3,
  one_batch_repeats=2,
)


@pytest.fixture(scope='module')
def network(small):
  """A network with batch normalization that has not been trained."""
  problem = small.problem()
  variables = problem.model.init(jax.random.key(0), problem.example_inputs)
  stats = jax.tree.map(lambda x: x + 0.3, variables['batch_stats'])
  return sharpness.Network(
    _CONFIG, problem, variables['params'], stats, 7, {}, pathlib.Path('run')
  )


@pytest.fixture(scope='module')
def measured(network, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'hessian'
  return folder, sharpness.measure(network, folder, _OPTIONS)


def _whole(network):
  batch = next(network.problem.train.batches(1000).epoch(0))
  return {**batch, 'inputs': jnp.asarray(batch['inputs'], jnp.float64)}


def _example_hessians(network):
  """(n, p, p): the Hessian of each example's loss, in evaluation mode."""
  batch = _whole(network)
  flat, unravel = ravel_pytree(
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.params)
  )

  def example_losses(w):
    logits, _ = losses.apply(
      network.problem.model, unravel(w), network.batch_stats, batch['inputs']
    )
    return losses.smoothed_kl(logits, batch['labels'], 0.1)

  return np.asarray(jax.hessian(example_losses)(flat)), np.asarray(flat)


def test_eigenvalues_equal_the_dense_ones(network, measured, x64):
  hessians, flat = _example_hessians(network)
  dense = hessians.mean(0)
  values = np.linalg.eigvalsh(dense)
  folder, summary = measured
  atol = 1e-6 * np.abs(values).max()
  top = [entry['eigenvalue'] for entry in summary['top']]
  bottom = [entry['eigenvalue'] for entry in summary['bottom']]
  np.testing.assert_allclose(top, values[::-1][:5], atol=atol)
  np.testing.assert_allclose(bottom, values[::-1][-5:], atol=atol)
  assert summary['all_converged'] and summary['no_copies_missed']
  assert summary['lambda_max'] == top[0] and summary['lambda_min'] == bottom[-1]
  assert summary['lambda_1_over_lambda_5'] == pytest.approx(top[0] / top[4])
  ratio = summary['lambda_max_over_abs_lambda_min']
  assert ratio == pytest.approx(values[-1] / abs(values[0]), rel=1e-5)
  scale = np.abs(flat)
  adaptive = np.linalg.eigvalsh(scale[:, None] * dense * scale)
  assert summary['adaptive_sharpness'] == pytest.approx(adaptive[-1], rel=1e-6)
  error = summary['trace_standard_error']
  assert abs(summary['trace'] - np.trace(dense)) < 4 * error
  assert json.loads((folder / 'summary.json').read_text()) == summary


def test_the_bootstrap_spreads_as_the_curvature_of_examples(network, measured, x64):
  hessians, _ = _example_hessians(network)
  values, vectors = np.linalg.eigh(hessians.mean(0))
  for name, vector in (('max', vectors[:, -1]), ('min', vectors[:, 0])):
    curvatures = np.einsum('i,nij,j->n', vector, hessians, vector)
    expected = curvatures.std() / np.sqrt(len(curvatures))
    error = measured[1][f'lambda_{name}_standard_error']
    assert error == pytest.approx(expected, rel=0.2)
  assert curvatures.mean() == pytest.approx(values[0])


@pytest.mark.slow
def test_a_ratio_to_what_may_be_zero_is_not_told(network, measured, tmp_path):
  told = measured[1]['one_batch']
  assert told['all_converged'] and told['lambda_min_residual'] < 1e-6
  assert told['ratio_range'][0] <= told['ratio_median'] <= told['ratio_range'][1]
  coarse = dataclasses.replace(_OPTIONS, tol=0.5, landscape_points=0)
  found = sharpness.measure(network, tmp_path, coarse)['one_batch']
  assert found['lambda_min_residual'] > abs(found['lambda_min'])
  assert found['ratio_median'] is None


def test_batch_statistics_can_be_those_of_the_batch(network, tmp_path, x64):
  options = dataclasses.replace(_OPTIONS, batch_norm='train', batch_size=22)
  summary = sharpness.measure(network, tmp_path, options)
  batch = _whole(network)
  flat, unravel = ravel_pytree(
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.params)
  )
  still = network.problem.model.clone(dropout_rate=0.0)

  def mean_loss(w):
    loss = losses.loss_fn(still, _CONFIG)
    stats = network.batch_stats
    return loss(unravel(w), stats, batch, train=True, key=jax.random.key(9))[0]

  values = np.linalg.eigvalsh(np.asarray(jax.hessian(mean_loss)(flat)))
  assert summary['lambda_max'] == pytest.approx(values[-1], rel=1e-6)
  assert summary['lambda_min'] == pytest.approx(values[0], rel=1e-5)
  assert summary['batch_norm'] == 'train'


def test_some_examples_are_drawn_by_the_seed(network, tmp_path):
  options = dataclasses.replace(_OPTIONS, num_examples=13, landscape_points=0)
  summary = sharpness.measure(network, tmp_path, options)
  assert summary['num_examples'] == 13
  with pytest.raises(training.UsageError, match='--num_examples=23: the train split'):
    sharpness.measure(network, tmp_path, dataclasses.replace(options, num_examples=23))


def test_evaluation_has_standard_errors(network, measured):
  evaluation = measured[1]['evaluation']
  test = next(network.problem.test.batches(1000).epoch(0))
  logits, _ = losses.apply(
    network.problem.model, network.params, network.batch_stats, test['inputs']
  )
  values = np.asarray(losses.smoothed_kl(logits, test['labels'], 0.1))
  assert evaluation['test_loss'] == pytest.approx(values.mean(), rel=1e-5)
  error = values.std(ddof=1) / np.sqrt(len(values))
  assert evaluation['test_loss_standard_error'] == pytest.approx(error, rel=1e-4)
  gap = evaluation['test_loss'] - evaluation['train_loss']
  assert evaluation['generalization_gap'] == pytest.approx(gap)


def test_files_are_whole_and_what_was_measured_is_read(network, measured):
  folder, summary = measured
  names = {path.name for path in folder.iterdir()}
  assert names == {
    'summary.json',
    'spectrum.npz',
    'spectral_density.png',
    'landscape.npz',
    'landscape.png',
  }
  before = (folder / 'spectrum.npz').stat().st_mtime_ns
  assert sharpness.measure(network, folder, _OPTIONS) == summary
  assert (folder / 'spectrum.npz').stat().st_mtime_ns == before
  density = sharpness.read_density(folder / 'spectrum.npz')
  assert density.size == summary['num_parameters'] == 91
  np.testing.assert_allclose(density.weights.sum(1), 1 - 10 / 91)


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('split', 'valid', '--split=valid: choose one of train, test'),
    ('batch_norm', 'on', '--batch_norm=on: choose one of eval, train'),
    ('dtype', 'bfloat16', '--dtype=bfloat16: choose one of'),
    ('top_k', 0, '--top_k=0: must be at least 1'),
    ('tol', 0.0, '--tol=0.0'),
    ('max_basis_gib', 0.0, '--max_basis_gib=0.0'),
  ],
)
def test_options_out_of_range_are_named(field, value, words):
  with pytest.raises(training.UsageError, match=words):
    dataclasses.replace(_OPTIONS, **{field: value}).validate()


def test_what_cannot_be_measured_is_one_sentence(network, tmp_path):
  poisoned = jax.tree.map(lambda x: x * np.nan, network.params)
  with pytest.raises(training.UsageError, match='is not finite'):
    sharpness.measure(network._replace(params=poisoned), tmp_path, _OPTIONS)
  for change, words in (({'top_k': 92}, 'k=92'), ({'max_basis_gib': 1e-6}, 'GiB')):
    with pytest.raises(training.UsageError, match=words):
      sharpness.measure(network, tmp_path, dataclasses.replace(_OPTIONS, **change))
  assert not (tmp_path / 'summary.json').exists()
