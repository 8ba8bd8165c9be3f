"""Every kind of operator, its blocks and its restarts, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import measurements
from sam_jax import curvature, landscape
from training import problem as problem_lib


@pytest.mark.parametrize(
  ('operator', 'regex'),
  [
    ('hessian', '^Dense_1/'),
    ('gauss_newton', ''),
    ('fisher', ''),
    pytest.param('hessian', '', marks=pytest.mark.slow),
    pytest.param('gauss_newton', '^Dense_1/', marks=pytest.mark.slow),
    pytest.param('fisher', '^Dense_1/', marks=pytest.mark.slow),
  ],
)
def test_operators_and_blocks_equal_dense_ones(
  network, matrices, fast, tmp_path, operator, regex
):
  options = fast.but(operator=operator, params_regex=regex)
  summary = measurements.measure(network, tmp_path, options, ['eigenvalues'])
  chosen = np.char.startswith(matrices['paths'], 'Dense_1/' if regex else '')
  each = matrices[operator][:, chosen][:, :, chosen]
  values, vectors = np.linalg.eigh(each.mean(0))
  scale = np.abs(values).max()
  assert summary['num_parameters'] == chosen.sum()
  assert summary['lambda_max'] == pytest.approx(values[-1], abs=1e-6 * scale)
  assert summary['lambda_min'] == pytest.approx(values[0], abs=1e-6 * scale)
  # The bootstrap spreads as the examples' own curvatures do.
  parts = np.einsum('i,nij,j->n', vectors[:, -1], each, vectors[:, -1])
  error = parts.std() / np.sqrt(len(parts))
  assert summary['lambda_max_standard_error'] == pytest.approx(error, rel=0.2)


def test_the_adaptive_preconditioner_scales_both_sides(
  network, matrices, fast, tmp_path
):
  options, only = fast.but(preconditioner='adaptive'), ['adaptive_sharpness']
  summary = measurements.measure(network, tmp_path, options, [*only, 'eigenvalues'])
  scale = np.abs(matrices['flat'])
  dense = matrices['hessian'].mean(0)
  values = np.linalg.eigvalsh(scale[:, None] * dense * scale)
  atol = 1e-6 * np.abs(values).max()
  assert summary['lambda_max'] == pytest.approx(values[-1], abs=atol)
  assert summary['adaptive_sharpness'] == pytest.approx(values[-1], abs=atol)
  assert summary['lambda_min'] == pytest.approx(values[0], abs=atol)


def test_layers_are_the_diagonal_blocks(network, matrices, fast, tmp_path):
  options = fast.but(per_layer=True, trace_matvecs=40)
  summary = measurements.measure(network, tmp_path, options, ['layers'])
  layers = {layer['layer']: layer for layer in summary['layers']}
  assert set(layers) == {'Dense_0', 'BatchNorm_0', 'Dense_1'}
  mean = matrices['hessian'].mean(0)
  for name, layer in layers.items():
    chosen = np.char.startswith(matrices['paths'], name)
    block = mean[np.ix_(chosen, chosen)]
    assert layer['num_parameters'] == chosen.sum()
    assert layer['lambda_max'] == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=1e-6)
    assert abs(layer['trace'] - np.trace(block)) < 4 * layer['trace_standard_error']


def test_the_landscape_lies_along_the_two_largest(network, matrices, fast, tmp_path):
  options = fast.but(
    landscape_points=3, landscape_extent=1e-3, landscape_directions='eigenvectors'
  )
  measurements.measure(network, tmp_path, options, ['landscape'])
  drawn = landscape.load(tmp_path / 'landscape.npz').loss
  values = np.linalg.eigvalsh(matrices['hessian'].mean(0))
  along = [drawn[1, 0] - 2 * drawn[1, 1] + drawn[1, 2]]
  along.append(drawn[0, 1] - 2 * drawn[1, 1] + drawn[2, 1])
  np.testing.assert_allclose(np.array(along) / 1e-6, values[:-3:-1], rtol=1e-3)


class _Killed(BaseException):
  """Stands for the end of the process."""


def _killed_after(monkeypatch, products):
  """Ends a measurement at a product; counts those that are really computed."""
  compute = curvature.HessianOperator._product
  counter = {'computed': 0, 'allowed': products}

  def product(self, vector):
    if counter['computed'] >= counter['allowed']:
      raise _Killed
    counter['computed'] += 1
    return compute(self, vector)

  monkeypatch.setattr(curvature.HessianOperator, '_product', product)
  return counter


@pytest.mark.slow
@pytest.mark.parametrize('products', [5, 45, 90])
def test_a_killed_measurement_repeats_no_product(
  network, fast, tmp_path, monkeypatch, products
):
  options = fast.but(per_layer=True, one_batch_repeats=1)
  whole = measurements.measure(network, tmp_path / 'whole', options)
  counter = _killed_after(monkeypatch, products)
  with pytest.raises(_Killed):
    measurements.measure(network, tmp_path / 'killed', options)
  counter['allowed'] = 10**6
  resumed = measurements.measure(network, tmp_path / 'killed', options)
  assert counter['computed'] == whole['num_matvecs']
  for clock in ('seconds', 'seconds_by_part'):
    del whole[clock], resumed[clock]
  assert resumed == whole
  names = [
    sorted(path.name for path in (tmp_path / folder).iterdir())
    for folder in ('whole', 'killed')
  ]
  assert names[0] == names[1] and 'partial' not in names[0]


@pytest.mark.slow
def test_a_killed_landscape_goes_on(network, fast, tmp_path, monkeypatch):
  options = fast.but(landscape_points=4, eigen_ratio_points=2)
  only = ['landscape', 'eigen_ratio']
  measurements.measure(network, tmp_path / 'whole', options, only)

  def stop(done, total):
    if done == 7:
      raise _Killed

  surface = landscape.surface
  with monkeypatch.context() as patch:
    patch.setattr(
      landscape, 'surface', lambda *a, **k: surface(*a, **{**k, 'progress': stop})
    )
    with pytest.raises(_Killed):
      measurements.measure(network, tmp_path / 'killed', options, only)
  seen = []
  with monkeypatch.context() as patch:
    patch.setattr(
      landscape,
      'surface',
      lambda *a, **k: surface(*a, **{**k, 'progress': lambda n, _: seen.append(n)}),
    )
    measurements.measure(network, tmp_path / 'killed', options, only)
  assert seen[0] >= 8
  for name in ('landscape.npz', 'eigen_ratio.npz'):
    first, second = (landscape.load(tmp_path / f / name) for f in ('whole', 'killed'))
    np.testing.assert_array_equal(first.loss, second.loss)


@pytest.mark.slow
def test_the_balls_are_those_of_the_library(network, fast, tmp_path, x64):
  options = fast.but(worst_case_rho=0.1, worst_case_group=11, average_case_sigma=0.05)
  only = ['worst_case', 'average_case', 'trace']
  summary = measurements.measure(network, tmp_path, options, only)
  # 22 examples in two groups of 11; the ascent ends above SAM's one step.
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.params)
  rises = []
  for batch in network.problem.train.batches(11).epoch(0):

    def loss(p, batch=batch):
      return problem_lib.loss(network.problem, p, network.batch_stats, batch)[0]

    grads = jax.grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g, n=norm: p + 0.1 * g / n, params, grads)
    rises.append(float(loss(moved) - loss(params)))
  assert summary['worst_case_sharpness'] >= np.mean(rises) - 1e-12
  assert summary['worst_case_sharpness'] == pytest.approx(np.mean(rises), rel=0.3)
  # The noise feels half the trace, to second order.
  assert summary['average_case_sharpness'] == pytest.approx(
    0.05**2 / 2 * summary['trace'], rel=0.5
  )
