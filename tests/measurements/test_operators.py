"""Every kind of operator, its blocks and its restarts, against dense matrices."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import training
from sam_jax import curvature, landscape
from training import losses, sharpness

_CONFIG = training.Config(batch_size=8, label_smoothing=0.1)
_OPTIONS = sharpness.Options(
  dtype='float64',
  tol=1e-8,
  top_k=2,
  batch_size=10,
  num_matvecs=6,
  num_probes=2,
  trace_matvecs=10,
  landscape_points=0,
  one_batch_repeats=0,
  worst_case_rho=0.0,
  average_case_sigma=0.0,
)


@pytest.fixture(scope='module')
def network(small):
  problem = small.problem()
  variables = problem.model.init(jax.random.key(0), problem.example_inputs)
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
    variables['params'],
  )
  return sharpness.Network(
    _CONFIG, problem, params, variables['batch_stats'], 7, {}, pathlib.Path('run')
  )


@pytest.fixture(scope='module')
def dense(network):
  """The gradients (n, p), Hessians and Gauss-Newton matrices (n, p, p) of examples."""
  with jax.enable_x64(True):
    batch = next(network.problem.train.batches(1000).epoch(0))
    inputs = jnp.asarray(batch['inputs'], jnp.float64)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.params)
    flat, unravel = ravel_pytree(params)

    def logits(w):
      model = network.problem.model
      return losses.apply(model, unravel(w), network.batch_stats, inputs)[0]

    def of_logits(z):
      return losses.smoothed_kl(z, batch['labels'], 0.1)

    jacobian = jax.jit(jax.jacobian(logits))(flat)
    # The loss of an example depends on its own logits only.
    curved = jax.vmap(
      lambda z, label: jax.hessian(
        lambda row: losses.smoothed_kl(row[None], label[None], 0.1)[0]
      )(z)
    )(logits(flat), jnp.asarray(batch['labels']))
    gauss_newton = jnp.einsum('nci,ncd,ndj->nij', jacobian, curved, jacobian)
    gradients = jax.jit(jax.jacobian(lambda w: of_logits(logits(w))))(flat)
    hessians = jax.jit(jax.hessian(lambda w: of_logits(logits(w))))(flat)
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    names = np.concatenate(
      [
        np.full(leaf.size, jax.tree_util.keystr(path, simple=True, separator='/'))
        for path, leaf in paths
      ]
    )
    return {
      'flat': np.asarray(flat),
      'names': names,
      'hessian': np.asarray(hessians),
      'gauss_newton': np.asarray(gauss_newton),
      'fisher': np.asarray(jnp.einsum('ni,nj->nij', gradients, gradients)),
    }


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
  network, dense, tmp_path, operator, regex
):
  options = dataclasses.replace(_OPTIONS, operator=operator, params_regex=regex)
  summary = sharpness.measure(network, tmp_path, options)
  chosen = np.char.startswith(dense['names'], 'Dense_1/' if regex else '')
  each = dense[operator][:, chosen][:, :, chosen]
  values, vectors = np.linalg.eigh(each.mean(0))
  scale = np.abs(values).max()
  assert summary['num_parameters'] == chosen.sum()
  assert summary['lambda_max'] == pytest.approx(values[-1], abs=1e-6 * scale)
  assert summary['lambda_min'] == pytest.approx(values[0], abs=1e-6 * scale)
  # The bootstrap spreads as the examples' own curvatures do.
  parts = np.einsum('i,nij,j->n', vectors[:, -1], each, vectors[:, -1])
  error = parts.std() / np.sqrt(len(parts))
  assert summary['lambda_max_standard_error'] == pytest.approx(error, rel=0.2)


def test_the_adaptive_preconditioner_scales_both_sides(network, dense, tmp_path):
  options = dataclasses.replace(_OPTIONS, preconditioner='adaptive')
  summary = sharpness.measure(network, tmp_path, options)
  scale = np.abs(dense['flat'])
  values = np.linalg.eigvalsh(scale[:, None] * dense['hessian'].mean(0) * scale)
  atol = 1e-6 * np.abs(values).max()
  assert summary['lambda_max'] == pytest.approx(values[-1], abs=atol)
  assert summary['adaptive_sharpness'] == pytest.approx(values[-1], abs=atol)
  assert summary['lambda_min'] == pytest.approx(values[0], abs=atol)


def test_layers_are_the_diagonal_blocks(network, dense, tmp_path):
  options = dataclasses.replace(_OPTIONS, per_layer=True, trace_matvecs=40)
  summary = sharpness.measure(network, tmp_path, options)
  layers = {layer['layer']: layer for layer in summary['layers']}
  assert set(layers) == {'Dense_0', 'BatchNorm_0', 'Dense_1'}
  mean = dense['hessian'].mean(0)
  for name, layer in layers.items():
    chosen = np.char.startswith(dense['names'], name)
    block = mean[np.ix_(chosen, chosen)]
    assert layer['num_parameters'] == chosen.sum()
    assert layer['lambda_max'] == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=1e-6)
    assert abs(layer['trace'] - np.trace(block)) < 4 * layer['trace_standard_error']


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
  network, tmp_path, monkeypatch, products
):
  options = dataclasses.replace(_OPTIONS, per_layer=True, one_batch_repeats=1)
  whole = sharpness.measure(network, tmp_path / 'whole', options)
  counter = _killed_after(monkeypatch, products)
  with pytest.raises(_Killed):
    sharpness.measure(network, tmp_path / 'killed', options)
  counter['allowed'] = 10**6
  resumed = sharpness.measure(network, tmp_path / 'killed', options)
  assert counter['computed'] == whole['num_matvecs']
  for clock in ('seconds', 'seconds_by_part'):
    del whole[clock], resumed[clock]
  assert resumed == whole
  assert not (tmp_path / 'killed/partial').exists()


@pytest.mark.slow
def test_a_killed_landscape_goes_on(network, tmp_path, monkeypatch):
  options = dataclasses.replace(_OPTIONS, landscape_points=4, eigen_ratio_points=2)
  sharpness.measure(network, tmp_path / 'whole', options)

  def stop(done, total):
    if done == 7:
      raise _Killed

  surface = landscape.surface
  with monkeypatch.context() as patch:
    patch.setattr(
      landscape, 'surface', lambda *a, **k: surface(*a, **{**k, 'progress': stop})
    )
    with pytest.raises(_Killed):
      sharpness.measure(network, tmp_path / 'killed', options)
  seen = []
  with monkeypatch.context() as patch:
    patch.setattr(
      landscape,
      'surface',
      lambda *a, **k: surface(*a, **{**k, 'progress': lambda n, _: seen.append(n)}),
    )
    sharpness.measure(network, tmp_path / 'killed', options)
  assert seen[0] >= 8
  for name in ('landscape.npz', 'eigen_ratio.npz'):
    first, second = (landscape.load(tmp_path / f / name) for f in ('whole', 'killed'))
    np.testing.assert_array_equal(first.loss, second.loss)


@pytest.mark.slow
def test_the_balls_are_those_of_the_library(network, tmp_path, x64):
  options = dataclasses.replace(
    _OPTIONS, worst_case_rho=0.1, worst_case_group=11, average_case_sigma=0.05
  )
  summary = sharpness.measure(network, tmp_path, options)
  # 22 examples in two groups of 11; the ascent ends above SAM's one step.
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.params)
  rises = []
  for batch in network.problem.train.batches(11).epoch(0):
    loss = losses.mean_loss(network.problem.model, _CONFIG, network.batch_stats)
    grads = jax.grad(loss)(params, batch)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g, n=norm: p + 0.1 * g / n, params, grads)
    rises.append(float(loss(moved, batch) - loss(params, batch)))
  assert summary['worst_case_sharpness'] >= np.mean(rises) - 1e-12
  assert summary['worst_case_sharpness'] == pytest.approx(np.mean(rises), rel=0.3)
  # The noise feels half the trace, to second order.
  assert summary['average_case_sharpness'] == pytest.approx(
    0.05**2 / 2 * summary['trace'], rel=0.5
  )


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'operator': 'newton'}, '--operator=newton: choose one of hessian'),
    ({'preconditioner': 'sgd'}, '--preconditioner=sgd: choose one of'),
    ({'params_regex': '('}, '--params_regex=. is not a regular'),
    ({'landscape_directions': 'up'}, '--landscape_directions=up: choose one of'),
    ({'worst_case_rho': -1.0}, '--worst_case_rho=-1.0: must not be negative'),
    ({'worst_case_norm': 'l1'}, '--worst_case_norm=l1: choose one of'),
  ],
)
def test_options_out_of_range_are_named(change, words):
  with pytest.raises(training.UsageError, match=words):
    dataclasses.replace(_OPTIONS, **change).validate()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'params_regex': 'Conv'}, '--params_regex=Conv matches no parameters: there'),
    ({'params_regex': 'Dense_1/bias', 'top_k': 4}, '--top_k=4: only 3 parameters'),
    ({'preconditioner': 'adam'}, 'keeps no second moments'),
    ({'landscape_directions': 'trajectory', 'landscape_points': 3}, 'keep_checkpoints'),
    ({'landscape_towards': '/nowhere'}, 'landscape_towards=/nowhere'),
  ],
)
def test_what_does_not_fit_the_network_is_named(network, tmp_path, change, words):
  with pytest.raises(training.UsageError, match=words):
    sharpness.measure(network, tmp_path, dataclasses.replace(_OPTIONS, **change))
