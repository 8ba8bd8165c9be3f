"""Batch sharpness and the noise kernel norm tracked during training."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from jax.flatten_util import ravel_pytree

import measurements
import training
from input_pipelines import ArraySplit
from measurements import batch_sharpness, noise
from sam_jax import edges as library
from training import (
  TrainingDiverged,
  UsageError,
  checkpoints,
  loop,
  metrics,
  scores,
  sharing,
  step,
)
from training import problem as problem_lib

PLAIN = training.Config(
  optimizer='sgd',
  base_optimizer='sgd',
  epochs=8,
  batch_size=4,
  learning_rate=0.2,
  schedule='constant',
)
MOMENTUM = dataclasses.replace(
  PLAIN, optimizer='momentum', base_optimizer='momentum', momentum=0.5
)
SAM = dataclasses.replace(PLAIN, optimizer='sam', rho=0.3, m_sharpness=4)
USAM = dataclasses.replace(SAM, optimizer='usam')


class Network(nn.Module):
  """Dense, tanh, dense."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    return nn.Dense(1)(nn.tanh(nn.Dense(3)(x)))


class Scaled(nn.Module):
  """The same with a parameter that belongs to no dense layer."""

  @nn.compact
  def __call__(self, x, *, train=False):
    return Network()(x * self.param('scale', nn.initializers.ones, ()))


def _problem(model, example_losses=scores.squared_error, dtype=np.float32):
  rng = np.random.default_rng(0)

  def split(n):
    inputs = rng.normal(size=(n, 2)).astype(dtype)
    return ArraySplit(inputs, np.sin(inputs[:, :1] * 2))

  return training.Problem(
    model=model,
    train=split(22),
    test=split(7),
    example_losses=example_losses,
    scores=scores.SquaredError(),
    example_inputs=np.zeros((1, 2), dtype),
  )


@pytest.fixture(scope='module')
def problem():
  return _problem(Network())


def _state(problem, config, dtype=jnp.float32):
  stepper = step.Stepper(problem, config, 6, sharing.of(config))
  state = jax.jit(stepper.init)(config.seed)
  wide = jax.tree.map(lambda x: jnp.asarray(x, dtype), state.params)
  return state._replace(params=wide)


@pytest.fixture(scope='module')
def dense(problem):
  """Hessian and gradient of a batch, compiled once."""

  def compute(params, batch):
    flat, unravel = ravel_pytree(params)
    loss = lambda w: problem_lib.loss(problem, unravel(w), {}, batch)[0]
    return jax.hessian(loss)(flat), jax.grad(loss)(flat)

  compiled = jax.jit(compute)
  return lambda *args: [np.asarray(x) for x in compiled(*args)]


def _quotients(dense, params, batches, rho, normalized):
  """The curvature of each batch along the gradient at the perturbed point."""
  flat, unravel = ravel_pytree(params)
  found = []
  for batch in batches:
    hessian, gradient = dense(params, batch)
    norm = np.linalg.norm(gradient) if normalized else 1.0
    direction = dense(unravel(flat + rho * gradient / norm), batch)[1]
    found.append(direction @ hessian @ direction / (direction @ direction))
  return np.array(found)


@pytest.mark.parametrize('config', [PLAIN, SAM, USAM], ids=lambda c: c.optimizer)
def test_batch_sharpness_is_what_dense_hessians_give(x64, problem, dense, config):
  tracker = measurements.tracker('batch_sharpness', problem, config)
  state = _state(problem, config, jnp.float64)
  line = tracker(state, 5)
  batches = list(tracker._drawn(5))
  assert line['num_batches'] == len(batches) == 5
  clean = _quotients(dense, state.params, batches, 0.0, True)
  assert line['batch_sharpness'] == pytest.approx(clean.mean(), rel=1e-6)
  error = clean.std(ddof=1) / np.sqrt(5)
  assert line['standard_error'] == pytest.approx(error, rel=1e-5)
  straight = library.batch_sharpness(
    lambda w, b: problem_lib.loss(problem, w, {}, b)[0], state.params, batches
  )
  assert line['batch_sharpness'] == pytest.approx(straight.value, rel=1e-12)
  assert line['small_batch_plateau'] == line['large_batch_plateau'] == pytest.approx(10)
  if config is PLAIN:
    assert 'batch_sharpness_of_sam' not in line and line['rho'] is None
  else:
    along = _quotients(dense, state.params, batches, 0.3, config is SAM)
    assert abs(along.mean() / clean.mean() - 1) > 1e-3
    assert line['batch_sharpness_of_sam'] == pytest.approx(along.mean(), rel=1e-6)
    assert line['rho'] == 0.3


def test_batches_are_drawn_by_seed_and_step(problem):
  rows = lambda tracker, number: [batch['inputs'] for batch in tracker._drawn(number)]
  trackers = [measurements.tracker('batch_sharpness', problem, PLAIN) for _ in range(2)]
  first, again = (np.stack(rows(tracker, 3)) for tracker in trackers)
  np.testing.assert_array_equal(first, again)
  assert first.shape == (5, 4, 2)  # The 2 of the 22 that fill no batch are left out.
  assert len(np.unique(first.reshape(-1, 2), axis=0)) == 20
  other = measurements.tracker(
    'batch_sharpness', problem, dataclasses.replace(PLAIN, seed=1)
  )
  for different in (rows(trackers[0], 4), rows(other, 3)):
    assert (np.stack(different) != first).any()
  trained = np.stack(
    [b['inputs'] for b in problem.train.batches(4, seed=0).epoch(3)][:5]
  )
  assert (trained != first).any()


def test_no_more_than_32_batches(problem):
  config = dataclasses.replace(PLAIN, batch_size=1)
  tracker = measurements.tracker('batch_sharpness', problem, config)
  assert len(list(tracker._drawn(0))) == 22
  large = problem._replace(train=ArraySplit(np.zeros((50, 2)), np.zeros((50, 1))))
  tracker = measurements.tracker('batch_sharpness', large, config)
  assert len(list(tracker._drawn(0))) == batch_sharpness.NUM_BATCHES == 32


def test_plateaus_of_momentum_and_where_none_is_known(problem):
  for config, wanted in (
    (MOMENTUM, (5.0, 15.0)),
    (dataclasses.replace(SAM, base_optimizer='momentum', momentum=0.5), (5.0, 15.0)),
    (dataclasses.replace(SAM, base_optimizer='adam'), None),
  ):
    tracker = measurements.tracker('batch_sharpness', problem, config)
    found = tuple(tracker._plateaus(0.2).values())
    assert found == (pytest.approx(wanted) if wanted else (None, None))


def test_a_radius_that_changes_compiles_nothing_anew(problem):
  traced = []

  def losses(outputs, batch):
    traced.append(0)
    return scores.squared_error(outputs, batch)

  config = dataclasses.replace(SAM, perturb_every=2)
  tracker = measurements.tracker(
    'batch_sharpness', problem._replace(example_losses=losses), config
  )
  state = _state(problem, config)
  lines = [tracker(state, 0)]
  count = len(traced)
  lines += [tracker(state, number) for number in (1, 2)]
  assert count == len(traced) > 0
  assert [line['rho'] for line in lines] == [0.3, 0.0, 0.3]
  # Without a radius SAM's step is along the gradient.
  assert lines[1]['batch_sharpness_of_sam'] == pytest.approx(
    lines[1]['batch_sharpness'], rel=1e-6
  )


def _eigenvalues(problem, params):
  """Those of the tangent kernel over the number of examples, by the Jacobian."""
  flat, unravel = ravel_pytree(params)

  @jax.jit
  def jacobian(w):
    inputs = problem.train.arrays['inputs']
    call = lambda w: problem.model.apply({'params': unravel(w)}, inputs)[:, 0]
    return jax.jacrev(call)(w)

  found = np.asarray(jacobian(flat), np.float64)
  return np.linalg.eigvalsh(found @ found.T) / 22


@pytest.mark.parametrize('config', [PLAIN, MOMENTUM], ids=lambda c: c.optimizer)
def test_the_norm_is_that_of_the_dense_jacobian(x64, problem, config):
  state = _state(problem, config, jnp.float64)
  line = measurements.tracker('noise', problem, config)(state, 5)
  values = _eigenvalues(problem, state.params)
  b = 0.5 if config is MOMENTUM else 0.0
  summands = 0.2 * values / (2 * (1 + b) - 0.2 * values) * (1 + b) / (1 - b)
  wanted = (1 / 4 - 1 / 22) * summands.sum()
  # The second derivative of the loss is told in float32.
  assert line['noise_kernel_norm'] == pytest.approx(wanted, rel=1e-6)
  assert line['exact'] and line['standard_error'] == 0 and not line['infinite']
  straight = library.noise_kernel_norm(
    lambda w, batch: problem.model.apply({'params': w}, batch['inputs']),
    lambda f, batch: 0.5 * jnp.mean((f - batch['labels']) ** 2),
    state.params,
    list(problem.train.batches(10).epoch(0)),
    learning_rate=0.2,
    batch_size=4,
    momentum=b,
    weight=problem_lib.num_examples,
  )
  assert line['noise_kernel_norm'] == pytest.approx(straight.value, rel=1e-6)


def test_other_networks_are_measured_by_products(problem):
  """A scale of 1 before the first layer adds one column to the Jacobian."""
  scaled = _problem(Scaled())
  state = _state(scaled, PLAIN)
  tracker = measurements.tracker('noise', scaled, PLAIN)
  line = tracker(state, 1)
  assert not line['exact'] and line['num_matvecs'] > 0
  assert line == tracker(state, 1)
  values = _eigenvalues(scaled, state.params)
  wanted = (1 / 4 - 1 / 22) * np.sum(0.2 * values / (2 - 0.2 * values))
  assert line['noise_kernel_norm'] == pytest.approx(wanted, rel=1e-4)


def test_a_kernel_of_more_examples_than_products_take_at_once(problem, monkeypatch):
  """What is diagonalised is of all examples, however many products would take."""
  state = _state(problem, PLAIN)
  line = measurements.tracker('noise', problem, PLAIN)(state, 0)
  monkeypatch.setattr(noise, '_TOGETHER', 10)
  assert measurements.tracker('noise', problem, PLAIN)(state, 0) == line
  assert line['exact']


def test_a_norm_that_is_infinite_is_null(problem):
  config = dataclasses.replace(PLAIN, learning_rate=1e3)
  line = measurements.tracker('noise', problem, config)(_state(problem, config), 0)
  assert line['infinite'] and line['noise_kernel_norm'] is None
  json.dumps(line, allow_nan=False)
  found = noise.summarize([{**line, 'step': 0}], 0)
  assert found['share_infinite'] == 1 and found['text'] == ''


def test_steps_of_no_length_have_no_part_in_the_mean_of_the_norm():
  """A schedule that ends at 0 does not pull it down."""
  line = {'noise_kernel_norm': 0.5, 'infinite': False, 'learning_rate': 0.1}
  still = {'noise_kernel_norm': 0.0, 'infinite': False, 'learning_rate': 0.0}
  found = noise.summarize([{**line, 'step': 9}, {**still, 'step': 10}], 10)
  assert found['mean_noise_kernel_norm'] == 0.5 and found['measured'] == 2


@pytest.mark.parametrize('how', ['kernel', 'matrix', 'products'])
def test_a_norm_that_is_not_finite_tells_of_divergence(how, monkeypatch):
  problem = _problem(Network() if how == 'kernel' else Scaled())
  if how == 'products':
    monkeypatch.setitem(noise._ESTIMATE, 'exact_up_to', 0)
  state = _state(problem, PLAIN)
  state = state._replace(params=jax.tree.map(lambda x: np.inf * x, state.params))
  tracker = measurements.tracker('noise', problem, PLAIN)
  with pytest.raises(TrainingDiverged, match='kernel is not finite after step 3:'):
    tracker(state, 3)


class _Killed(Exception):
  """Stands for a kill."""


def _run(problem, workdir):
  config = dataclasses.replace(PLAIN, checkpoint_every=5)
  hooks = [
    measurements.tracker(name, problem, config, 3) for name in measurements.trackers()
  ]
  return loop.train(config, problem, workdir, num_devices=1, timing=False, hooks=hooks)


def test_a_killed_run_with_three_trackers_writes_the_same_lines(
  problem, tmp_path, monkeypatch
):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  _run(problem, whole)
  with monkeypatch.context() as patch:
    call = noise.Noise.__call__

    def kill(self, state, number):
      if number >= 12:
        raise _Killed
      return call(self, state, number)

    patch.setattr(noise.Noise, '__call__', kill)
    with pytest.raises(_Killed):
      _run(problem, killed)
  assert checkpoints.steps(killed)
  _run(problem, killed)
  texts = [(folder / 'metrics.jsonl').read_text() for folder in (whole, killed)]
  assert texts[0] == texts[1]
  lines = metrics.read(whole)
  for name in measurements.trackers():
    steps = [line['step'] for line in lines if line['split'] == name]
    assert steps == list(range(0, 49, 3))
    with PIL.Image.open(whole / f'{name}.png') as image:
      assert image.size[0] > 300
  found = json.loads((whole / 'summary.json').read_text())['during_training']
  last = [x for x in lines if x['split'] == 'noise' and x['step'] >= 32]
  mean = np.mean([line['noise_kernel_norm'] for line in last])
  assert found['noise']['mean_noise_kernel_norm'] == pytest.approx(mean)
  assert found['noise']['mean_noise_kernel_norm_interval'] is None  # six lines
  last = [x for x in lines if x['split'] == 'batch_sharpness' and x['step'] >= 32]
  ratio = np.mean([x['batch_sharpness'] / x['small_batch_plateau'] for x in last])
  assert found['batch_sharpness'][
    'mean_batch_sharpness_over_small_batch_plateau'
  ] == pytest.approx(ratio)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('batch_sharpness', {'optimizer': 'esam', 'rho': 0.1}, 'examples that it chooses'),
    (
      'batch_sharpness',
      {'optimizer': 'msam', 'rho': 0.1, 'base_optimizer': 'momentum'},
      'no gradient at w',
    ),
    ('batch_sharpness', {'optimizer': 'sam', 'rho': 0.1, 'm_sharpness': 2}, 'group'),
    ('batch_sharpness', {'optimizer': 'sam'}, 'optimizer=sam has no value of --rho'),
    ('noise', {'optimizer': 'sam', 'rho': 0.1}, 'not of sam'),
    ('noise', {'optimizer': 'adam', 'base_optimizer': 'adam'}, 'not of adam'),
    ('noise', {'optimizer': 'nesterov', 'base_optimizer': 'nesterov'}, 'of nesterov'),
  ],
)
def test_what_is_not_defined_is_refused(problem, name, changes, message):
  config = dataclasses.replace(PLAIN, **changes)
  with pytest.raises(UsageError, match=f'track={name}: .*{message}'):
    measurements.tracker(name, problem, config)
  with pytest.raises(UsageError, match='track_every=-1'):
    measurements.tracker(name, problem, PLAIN, -1)


def test_a_norm_of_other_losses_is_refused():
  fourth = lambda outputs, batch: jnp.sum((outputs - batch['labels']) ** 4, 1)
  problem = _problem(Network(), fourth)
  config = dataclasses.replace(PLAIN, task='mine')
  with pytest.raises(UsageError, match='track=noise: the loss of --task=mine is not'):
    measurements.tracker('noise', problem, config)


def test_several_ascent_steps_have_no_step_of_one(problem):
  """Batch sharpness along SAM's step is that of one ascent step, or is not told."""
  config = dataclasses.replace(
    SAM, m_sharpness=None, hyperparameters={'num_ascent_steps': 3}
  )
  tracker = measurements.tracker('batch_sharpness', problem, config)
  line = tracker(_state(problem, config), 0)
  assert 'batch_sharpness_of_sam' not in line and line['batch_sharpness'] is not None
