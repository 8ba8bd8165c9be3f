"""What is measured of a network, against dense float64 matrices."""

import json

import jax
import numpy as np
import pytest

import measurements
import training
from measurements import context, one_batch
from sam_jax import curvature
from sam_jax.measuring import entries, files
from training import problem as problem_lib


@pytest.fixture(scope='module')
def options(fast):
  return fast.but(
    top_k=5, num_matvecs=20, num_probes=3, trace_matvecs=30, landscape_points=3
  )


@pytest.fixture(scope='module')
def measured(network, options, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'hessian'
  return folder, measurements.measure(network, folder, options)


def test_eigenvalues_equal_the_dense_ones(matrices, measured):
  dense = matrices['hessian'].mean(0)
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
  scale = np.abs(matrices['flat'])
  adaptive = np.linalg.eigvalsh(scale[:, None] * dense * scale)
  assert summary['adaptive_sharpness'] == pytest.approx(adaptive[-1], rel=1e-6)
  error = summary['trace_standard_error']
  assert abs(summary['trace'] - np.trace(dense)) < 4 * error
  assert json.loads((folder / 'summary.json').read_text()) == summary


def test_the_bootstrap_spreads_as_the_curvature_of_examples(matrices, measured):
  hessians = matrices['hessian']
  values, vectors = np.linalg.eigh(hessians.mean(0))
  for name, vector in (('max', vectors[:, -1]), ('min', vectors[:, 0])):
    curvatures = np.einsum('i,nij,j->n', vector, hessians, vector)
    expected = curvatures.std() / np.sqrt(len(curvatures))
    error = measured[1][f'lambda_{name}_standard_error']
    assert error == pytest.approx(expected, rel=0.2)
  assert curvatures.mean() == pytest.approx(values[0])


def test_a_ratio_to_what_may_be_zero_is_not_told():
  def single(smallest, residual):
    pairs = curvature.Eigenpairs(
      eigenvalues=np.array([4.0, smallest]),
      eigenvectors=(),
      residuals=np.array([1e-6, residual]),
      bounds=np.zeros(2),
      converged=np.array([True, True]),
      scale=4.0,
      tol=1e-3,
      num_matvecs=3,
      verified=False,
    )
    return entries.extremes(pairs, 1, 10)

  def told(*found):
    return context.plain(one_batch._over_batches(list(found), 8))

  known, unknown = single(-2.0, 1e-3), single(-1e-4, 1e-3)
  assert known['lambda_max_over_abs_lambda_min'] == 2.0
  assert unknown['lambda_max_over_abs_lambda_min'] is None
  assert told(unknown)['ratio_median'] is None
  assert told(known, known, unknown)['ratio_range'] == [2.0, None]
  assert told(known, known, unknown)['ratio_median'] == 2.0


def test_batch_statistics_can_be_those_of_the_batch(
  network, matrices, fast, tmp_path, x64
):
  options = fast.but(batch_norm='train', batch_size=22)
  summary = measurements.measure(network, tmp_path, options, ['eigenvalues'])
  problem = network.problem
  still = problem._replace(model=problem.model.clone(dropout_rate=0.0))
  batch = next(problem.train.batches(1000).epoch(0))
  wide = {**batch, 'inputs': np.asarray(batch['inputs'], np.float64)}

  def mean_loss(w):
    params, key = matrices['unravel'](w), jax.random.key(9)
    stats = network.batch_stats
    return problem_lib.loss(still, params, stats, wide, train=True, key=key)[0]

  values = np.linalg.eigvalsh(jax.jit(jax.hessian(mean_loss))(matrices['flat']))
  assert summary['lambda_max'] == pytest.approx(values[-1], rel=1e-6)
  assert summary['lambda_min'] == pytest.approx(values[0], rel=1e-5)
  assert summary['batch_norm'] == 'train'


def test_evaluation_has_standard_errors_and_names_its_score(network, measured):
  evaluation = measured[1]['evaluation']
  test = next(network.problem.test.batches(1000).epoch(0))
  found = problem_lib.loss(network.problem, network.params, network.batch_stats, test)
  values = np.asarray(found[1].losses)
  assert evaluation['test_loss'] == pytest.approx(values.mean(), rel=1e-5)
  error = values.std(ddof=1) / np.sqrt(len(values))
  assert evaluation['test_loss_standard_error'] == pytest.approx(error, rel=1e-4)
  gap = evaluation['test_loss'] - evaluation['train_loss']
  assert evaluation['generalization_gap'] == pytest.approx(gap)
  right = np.argmax(found[1].outputs, axis=-1) == test['labels']
  assert evaluation['test_accuracy'] == pytest.approx(right.mean())
  assert evaluation['score']['name'] == 'accuracy'


def test_files_are_whole_and_what_was_measured_is_read(network, options, measured):
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
  assert measurements.measure(network, folder, options) == summary
  assert (folder / 'spectrum.npz').stat().st_mtime_ns == before
  density = files.read_density(folder / 'spectrum.npz')
  assert density.size == summary['num_parameters'] == 91
  np.testing.assert_allclose(density.weights.sum(1), 1 - 10 / 91)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'split': 'valid'}, '--split=valid: choose one of train, test'),
    ({'batch_norm': 'on'}, '--batch_norm=on: choose one of eval, train'),
    ({'dtype': 'bfloat16'}, '--dtype=bfloat16: choose one of'),
    ({'top_k': 0}, '--top_k=0: must be at least 1'),
    ({'tol': 0.0}, '--tol=0.0: must be above 0 and below 1'),
    ({'max_basis_gib': 0.0}, '--max_basis_gib=0.0: must be above 0'),
    ({'operator': 'newton'}, '--operator=newton: choose one of hessian'),
    ({'preconditioner': 'sgd'}, '--preconditioner=sgd: choose one of'),
    ({'params_regex': '('}, '--params_regex=.: is not a regular'),
    ({'landscape_directions': 'up'}, '--landscape_directions=up: choose one of'),
    ({'landscape_points': 1}, '--landscape_points=1: must be 0, or at least 2'),
    ({'eigen_ratio_points': 1}, '--eigen_ratio_points=1: must be 0, or at least 2'),
    ({'worst_case_rho': -1.0}, '--worst_case_rho=-1.0: must not be negative'),
    ({'worst_case_norm': 'l1'}, '--worst_case_norm=l1: choose one of'),
  ],
)
def test_options_out_of_range_are_named(fast, change, words):
  with pytest.raises(training.UsageError, match=words):
    fast.but(**change).validate()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'num_examples': 23}, '--num_examples=23: the train split has 22'),
    ({'top_k': 92}, '--top_k=92: only 91 parameters'),
    ({'max_num_matvecs': 4}, '--max_num_matvecs=4: 4 pairs need more'),
    ({'max_basis_gib': 1e-6}, '--max_basis_gib=1e-06: .* GiB; allow that'),
    ({'params_regex': 'Conv'}, '--params_regex=Conv matches no parameters: there'),
    ({'params_regex': 'Dense_1/bias', 'top_k': 4}, '--top_k=4: only 3 parameters'),
    ({'preconditioner': 'adam'}, 'keeps no second moments'),
    ({'landscape_directions': 'trajectory', 'landscape_points': 3}, 'keep_checkpoints'),
    ({'landscape_towards': '/nowhere'}, 'landscape_towards=/nowhere'),
    (
      {'landscape_directions': 'eigenvectors', 'landscape_points': 3, 'top_k': 1},
      '--landscape_directions=eigenvectors: .* --top_k=1',
    ),
  ],
)
def test_what_does_not_fit_the_network_is_named(network, fast, tmp_path, change, words):
  with pytest.raises(training.UsageError, match=words):
    measurements.measure(network, tmp_path, fast.but(**change))
  assert not (tmp_path / 'summary.json').exists()


def test_parameters_that_are_not_finite_are_told(network, fast, tmp_path):
  poisoned = jax.tree.map(lambda x: x * np.nan, network.params)
  with pytest.raises(training.UsageError, match='is not finite'):
    measurements.measure(
      network._replace(params=poisoned), tmp_path, fast.options, ['trace']
    )
