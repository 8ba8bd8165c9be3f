"""The edge of stability tracked during training, against dense computations."""

import dataclasses
import json
import shutil

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
from measurements import edges, edges_program
from training import UsageError, checkpoints, loop, metrics, scores, sharing, step
from training import problem as problem_lib

CONFIG = training.Config(
  optimizer='sam',
  base_optimizer='sgd',
  rho=0.1,
  m_sharpness=8,
  epochs=4,
  batch_size=8,
  learning_rate=0.2,
  schedule='constant',
)
PLAIN = dataclasses.replace(CONFIG, optimizer='sgd', rho=None, m_sharpness=None)


class Network(nn.Module):
  """Dense, tanh, dense."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  split = lambda n: ArraySplit(
    rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, 3, n)
  )
  return training.Problem(
    model=Network(),
    train=split(22),
    test=split(7),
    example_losses=scores.one_hot_error(1 / 3),
    scores=scores.Classification(3),
    example_inputs=np.zeros((1, 5), np.float32),
  )


_states = {}


def _state(problem, config, number=0):
  """A state after some steps of training on its own batches, made once."""
  key = repr(config), number
  if key not in _states:
    _states[key] = _trained(problem, config, number)
  return _states[key]


def _trained(problem, config, number):
  stepper = step.Stepper(problem, config, 3, sharing.of(config))
  state = jax.jit(stepper.init)(config.seed)
  advance = jax.jit(stepper.train)
  batches = problem.train.batches(8, seed=config.seed)
  for index in range(number):
    state, _ = advance(state, next(iter(batches.epoch(*divmod(index, 3)))))
  return state


@pytest.fixture(scope='module')
def dense(problem):
  """The Hessian, the gradient and the loss of a batch of up to 22, compiled once."""

  @jax.jit
  def compute(params, batch):
    flat, unravel = ravel_pytree(params)
    loss = lambda w: problem_lib.loss(problem, unravel(w), {}, batch)[0]
    return jax.hessian(loss)(flat), jax.grad(loss)(flat), loss(flat)

  def call(params, batch):
    missing = 22 - len(batch['weights'])
    pad = lambda x: np.pad(np.asarray(x), [(0, missing)] + [(0, 0)] * (np.ndim(x) - 1))
    found = compute(params, jax.tree.map(pad, batch))
    return [np.asarray(x, np.float64) for x in found]

  return call


def _oracle(dense, params, batch, rho):
  """Eigenvalues, norm and alignments by a dense Hessian."""
  flat, unravel = ravel_pytree(params)
  hessian, gradient, loss = dense(params, batch)
  values, vectors = np.linalg.eigh(hessian)
  norm = np.linalg.norm(gradient)
  moved = flat + jnp.asarray(rho * gradient / norm, flat.dtype)
  perturbed = dense(unravel(moved), batch)[1]
  cosine = lambda x: abs(x @ vectors[:, -1]) / np.linalg.norm(x)
  by_size = values[np.argsort(-np.abs(values))]
  return by_size, norm, cosine(gradient), cosine(perturbed), float(loss)


@pytest.mark.parametrize(
  ('on', 'num'),
  [('batch', 1), ('train', 1), ('5', 1), ('17', 1), ('batch', 4), ('17', 2)],
)
def test_a_line_is_what_a_dense_computation_gives(problem, dense, on, num):
  config = dataclasses.replace(CONFIG, grad_accum_steps=num)
  state = _state(problem, CONFIG, 4)
  line = measurements.tracker('edges', problem, config, on=on)(state, 4)
  if on == 'batch':  # that of the fifth step, the second of the second epoch
    batch = list(problem.train.batches(8, seed=0).epoch(1))[1]
  elif on == 'train':
    batch = next(iter(problem.train.batches(22).epoch(0)))
  else:
    order = problem.train.batches(22, seed=0).indices(0)[0]
    if int(on) <= 8:  # an order of batches of 5
      order = np.concatenate(problem.train.batches(5, seed=0).indices(0))
    rows = {name: x[order[: int(on)]] for name, x in problem.train.arrays.items()}
    batch = {**rows, 'weights': np.ones(int(on), np.float32)}
  values, norm, clean, perturbed, loss = _oracle(dense, state.params, batch, 0.1)
  assert line['eigenvalue'] == pytest.approx(values[0], rel=1e-3)
  assert line['lambda_max'] == line['eigenvalue']
  assert line['operator_norm'] == pytest.approx(abs(values[0]), rel=1e-3)
  assert line['residual'] <= 0.005 * abs(values[0])
  assert line['gradient_norm'] == pytest.approx(norm, rel=1e-4)
  assert line['loss'] == pytest.approx(loss, rel=1e-5)
  assert line['gradient_alignment'] == pytest.approx(clean, abs=0.01)
  assert line['update_alignment'] == pytest.approx(perturbed, abs=0.01)
  assert (line['learning_rate'], line['rho']) == pytest.approx((0.2, 0.1))
  assert line['edge'] == pytest.approx(10)
  # Along the top eigenvector SAM multiplies by 1 - eta lambda (1 + rho lambda / |g|).
  edge = line['sam_edge']
  assert 0.2 * edge * (1 + 0.1 * edge / norm) == pytest.approx(2, rel=1e-4)


def test_a_batch_of_fewer_examples_than_microbatches(problem, dense):
  """The last of an epoch holds one: no microbatch of it is empty, whose mean is NaN."""
  batches = problem.train.batches(7, seed=0)
  config = dataclasses.replace(PLAIN, batch_size=7, grad_accum_steps=7)
  state = _state(problem, PLAIN, 1)
  line = measurements.tracker('edges', problem, config)(state, 3)
  batch = list(batches.epoch(0))[3]
  assert len(batch['weights']) == 1
  values, norm, _, _, loss = _oracle(dense, state.params, batch, 0.1)
  assert line['eigenvalue'] == pytest.approx(values[0], rel=1e-3)
  assert line['loss'] == pytest.approx(loss, rel=1e-5)
  assert line['gradient_norm'] == pytest.approx(norm, rel=1e-4)


def test_the_update_is_that_of_the_method(problem, dense):
  """A method that wraps its base, and plain descent."""
  for config in (
    PLAIN,
    dataclasses.replace(
      CONFIG, optimizer='decoupled_wsam', hyperparameters={'gamma': 0.5}
    ),
  ):
    state = _state(problem, config, 1)
    line = measurements.tracker('edges', problem, config, on='train')(state, 1)
    batch = next(iter(problem.train.batches(22).epoch(0)))
    _, _, clean, perturbed, _ = _oracle(dense, state.params, batch, 0.1)
    # With gamma 1/2 it is SAM over plain descent.
    wanted = clean if config is PLAIN else perturbed
    assert line['gradient_alignment'] == pytest.approx(clean, abs=0.01)
    assert line['update_alignment'] == pytest.approx(wanted, abs=0.01)
    assert line['sam_edge'] is None


def test_adam_is_measured_in_its_own_metric(problem, dense):
  config = dataclasses.replace(
    PLAIN, optimizer='adam', base_optimizer='adam', learning_rate=0.01
  )
  tracker = measurements.tracker('edges', problem, config, on='train')
  assert tracker(_state(problem, config), 0)['preconditioned_lambda_max'] is None
  state = _state(problem, config, 3)
  line = tracker(state, 3)
  batch = next(iter(problem.train.batches(22).epoch(0)))
  hessian = dense(state.params, batch)[0]
  (adam,) = (
    x
    for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, 'nu'))
    if hasattr(x, 'nu')
  )
  second = np.asarray(ravel_pytree(adam.nu)[0], np.float64) / (1 - 0.999**3)
  scale = (1 - 0.9**3) * (np.sqrt(second) + 1e-8)
  wanted = np.linalg.eigvals(hessian / scale[:, None]).real.max()
  assert line['preconditioned_lambda_max'] == pytest.approx(wanted, rel=1e-3)
  assert line['edge'] == pytest.approx(3800)
  assert line['lambda_max'] == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-3)


def test_edges_follow_the_base_optimizer(problem):
  """Over momentum b SAM's edge is that of the learning rate / (1 + b)."""
  found = {}
  for base in ('momentum', 'nesterov', 'adam'):
    config = dataclasses.replace(CONFIG, base_optimizer=base, momentum=0.5)
    arrays = [jnp.float32(x) for x in (0.3, 0.2, 0.1)]
    found[base] = [float(x) for x in edges_program.edges_of(config, *arrays)]
  assert found['momentum'][0] == pytest.approx(15)
  assert found['nesterov'][0] == pytest.approx(7.5)
  assert found['adam'][0] == pytest.approx(190)
  for base, rate in (('momentum', 0.2 / 1.5), ('nesterov', 0.2 / 0.75)):
    edge = found[base][1]
    assert rate * edge * (1 + 0.1 * edge / 0.3) == pytest.approx(2, rel=1e-5)
  assert np.isnan(found['adam'][1])
  config = dataclasses.replace(CONFIG, optimizer='usam')
  edge = float(edges_program.edges_of(config, *arrays)[1])
  assert edge * (1 + 0.1 * edge) == pytest.approx(2 / 0.2, rel=1e-5)


class _Killed(Exception):
  """Stands for a kill."""


@pytest.fixture(scope='module')
def whole(problem, tmp_path_factory):
  """The workdir of a tracked run."""
  workdir = tmp_path_factory.mktemp('tracked') / 'run'
  _run(problem, workdir)
  return workdir


def _run(problem, workdir, **options):
  config = dataclasses.replace(CONFIG, checkpoint_every=3)
  tracker = measurements.tracker('edges', problem, config, 2, **options)
  return loop.train(
    config, problem, workdir, num_devices=1, timing=False, hooks=[tracker]
  )


@pytest.mark.parametrize(
  'changes', [{'perturb_every': 3}, {'hyperparameters': {'num_ascent_steps': 2}}]
)
def test_steps_of_two_kinds_or_of_several_ascents_have_no_edge_of_sam(changes):
  arrays = [jnp.float32(x) for x in (2.0, 0.2, 0.1)]
  config = dataclasses.replace(CONFIG, **changes)
  edge, sam_edge = edges_program.edges_of(config, *arrays)
  assert float(edge) == pytest.approx(10)
  assert np.isnan(float(sam_edge))


@pytest.mark.parametrize('step_number', [9])
def test_a_killed_run_writes_the_same_lines(
  problem, whole, tmp_path, step_number, monkeypatch
):
  with monkeypatch.context() as patch:
    call = edges.Edges.__call__

    def kill(self, state, number):
      if number >= step_number:
        raise _Killed
      return call(self, state, number)

    patch.setattr(edges.Edges, '__call__', kill)
    with pytest.raises(_Killed):
      _run(problem, tmp_path / 'run')
  assert checkpoints.steps(tmp_path / 'run')
  _run(problem, tmp_path / 'run')
  texts = [
    (folder / 'metrics.jsonl').read_text() for folder in (whole, tmp_path / 'run')
  ]
  assert texts[0] == texts[1]
  assert not list((tmp_path / 'run').glob('*.tmp*'))
  with PIL.Image.open(tmp_path / 'run' / 'edges.png') as image:
    assert image.size[0] > 300


def test_a_run_is_tracked_on_the_same_examples_to_its_end(problem, tmp_path, whole):
  workdir = tmp_path / 'run'
  shutil.copytree(whole, workdir)
  (workdir / 'summary.json').unlink()
  files = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  with pytest.raises(UsageError, match='track_on=train: .* --track_on=batch so far'):
    _run(problem, workdir, on='train')
  assert files == {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  # Lines of an earlier version do not tell; those after the checkpoint are cut away.
  path = workdir / 'metrics.jsonl'
  path.write_text(
    path.read_text().replace('"on": "batch", ', '')
    + '{"step": 13, "epoch": 5, "split": "edges", "on": "batch"}\n'
  )
  _run(problem, workdir, on='train')


class Scales(nn.Module):
  """Fewer parameters than a search has vectors."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    return x[:, :3] * self.param('scales', nn.initializers.normal(), (3,))[None]


def test_the_vectors_of_a_network_of_few_parameters_are_kept(problem):
  problem = problem._replace(model=Scales())
  tracker, other = (measurements.tracker('edges', problem, PLAIN) for _ in range(2))
  tracker(_trained(problem, PLAIN, 0), 0)
  memory = tracker.memory()
  other.recall(memory)
  np.testing.assert_array_equal(other.memory()['block/0'], memory['block/0'])


def test_a_run_ends_with_its_medians(whole):
  found = json.loads((whole / 'summary.json').read_text())['during_training']['edges']
  lines = [x for x in metrics.read(whole) if x['split'] == 'edges']
  assert [line['step'] for line in lines] == [0, 2, 4, 6, 8, 10, 12]
  last = [x['lambda_max'] / x['sam_edge'] for x in lines[4:]]
  assert found['median_lambda_over_sam_edge'] == pytest.approx(np.median(last))
  assert found['measured'] == 7
  assert 0 < found['share_of_wall_time'] < 1
  assert found['num_matvecs'] == sum(line['num_matvecs'] for line in lines)


def test_what_was_never_measured_has_no_median():
  line = {
    'step': 0,
    'lambda_max': None,
    'operator_norm': None,
    'residual': None,
    'edge': 2.0,
    'sam_edge': None,
    'gradient_alignment': None,
    'update_alignment': 0.5,
    'num_matvecs': 3,
  }
  found = edges.summarize([line], line['step'])
  assert found['median_lambda_over_edge'] is None
  assert found['median_update_alignment'] == 0.5
  assert edges.summarize([line], line['step'])['max_relative_residual'] is None
  # Of a run that was measured early only, nothing is known of the last third.
  early = edges.summarize([line], 2 * line['step'] + 10)
  assert early['median_gradient_alignment'] is None and early['text'] == ''


def test_a_share_makes_measurements_seldom(problem):
  config = dataclasses.replace(PLAIN, epochs=200)
  tracker = edges.track(problem, config, 1, 'batch', 0.25)
  state = _state(problem, config)
  measured = [0]
  tracker(state, 0)
  for number in range(1, 1000):
    if tracker.due(number, 3):
      tracker(state, number)
      measured.append(number)
  assert len(measured) > 2
  gaps = np.diff(measured)
  assert gaps.min() > 1
  spent = tracker.memory()['spent'][0]
  assert 0.1 < spent / (spent + 8 * 1000) <= 0.25
  # Another tracker goes on from the memory as this one would.
  other = edges.track(problem, config, 1, 'batch', 0.25)
  other.recall(tracker.memory())
  due = [[t.due(n, 3) for n in range(1000, 2000)] for t in (tracker, other)]
  assert due[0] == due[1] and any(due[0])


@pytest.mark.parametrize(
  ('changes', 'options', 'message'),
  [
    ({}, {'every': -1}, 'track_every=-1: must not be negative'),
    ({}, {'on': 'all'}, 'track_on=all: give batch, train, or a number'),
    ({}, {'on': '0'}, 'track_on=0: give batch, train, or a number'),
    ({}, {'on': '23'}, 'track_on=23: the training split has 22'),
    ({}, {'share': 1.0}, 'track_share=1: must be at least 0 and below 1'),
    ({'optimizer': 'msam', 'base_optimizer': 'momentum'}, {}, 'no gradient at w'),
    ({'optimizer': 'esam'}, {}, 'examples that it chooses'),
    ({'m_sharpness': 4}, {}, 'm_sharpness=4 each group'),
  ],
)
def test_what_has_no_edge_is_refused(problem, changes, options, message):
  config = dataclasses.replace(CONFIG, **changes)
  with pytest.raises(UsageError, match=message):
    measurements.tracker('edges', problem, config, **options)
  with pytest.raises(UsageError, match='track=hills: choose of edges'):
    measurements.tracker('hills', problem, CONFIG)


_NO_RADIUS = '''
import optax
from sam_jax.methods import method


@method()
def still(rho: float = 0.1, *, axis_name: str | None = None):
  """Descends the clean gradient.

  Args:
    rho: recorded nowhere.
    axis_name: the mapped axis.
  """
  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda updates, state, params=None, **extra_args: (updates, state),
  )
'''


def test_a_method_whose_state_holds_no_radius_is_refused(problem, tmp_path):
  (tmp_path / 'still.py').write_text(_NO_RADIUS)
  config = dataclasses.replace(CONFIG, optimizer=str(tmp_path / 'still.py'))
  with pytest.raises(UsageError, match=r'optimizer=.*still\.py holds no rho'):
    measurements.tracker('edges', problem, config)


@pytest.mark.parametrize(('steps', 'gradients'), [(None, 2), (1, 2), (3, 4)])
def test_every_ascent_step_of_a_method_takes_a_gradient(steps, gradients):
  """They count in the share of a run's gradients that a tracker may spend."""
  config = dataclasses.replace(CONFIG, hyperparameters={'num_ascent_steps': steps})
  assert edges.gradients_of_step(config) == gradients
  assert edges.gradients_of_step(PLAIN) == 1
