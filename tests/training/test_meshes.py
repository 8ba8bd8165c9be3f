"""Steps on a mesh: parameters sharded, the batch split, the numbers of one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tasks
from training import UsageError, meshes, methods, optimizers, sharing, step

_MESH = 'data:4,fsdp:2'


@pytest.fixture(autouse=True)
def split_small_arrays(monkeypatch):
  """The networks of these tests have no large ones."""
  monkeypatch.setattr(meshes, 'SMALL', 1)


class Plain(nn.Module):
  """Without batch normalization: no parameter's gradient is rounding alone."""

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.Dropout(0.2, deterministic=not train)(nn.tanh(nn.Dense(8)(x)))
    return nn.Dense(3)(x)


def config_of(optimizer, **fields):
  base = optimizer if optimizer in optimizers.BASES else 'momentum'
  wanted = {
    'optimizer': optimizer,
    'base_optimizer': base,
    'batch_size': 16,
    'learning_rate': 0.1,
    'weight_decay': 0.01,
    'schedule': 'cosine',
    'epochs': 6,
    **({'rho': 0.2} if methods.is_method(optimizer) else {}),
    **({'looksam_every': 2} if optimizer == 'looksam' else {}),
  }
  return tasks.resolve('digits_mlp', **{**wanted, **fields})


def data_of(tree):
  """Leaves as NumPy arrays, typed keys as their data."""
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  leaves = (jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree))
  return [np.asarray(leaf) for leaf in leaves]


def assert_close(got, expected, tolerance=1e-12):
  for a, b in zip(data_of(got), data_of(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def steps_of(problem, config, mesh, num_steps):
  """Trains in float64 on one device, or on a mesh; yields each state and metrics."""
  shared = sharing.of(config)
  batches = problem.train.batches(config.batch_size, shards=shared.axes, seed=0)
  stepper = step.Stepper(problem, config, batches.steps_per_epoch, shared)
  state = jax.jit(functools.partial(stepper.init, dtype=jnp.float64))(0)
  if mesh is not None:
    mesh.check(config, shared, problem)
    state = mesh.spread(state)
  compiled = {}
  for number in range(num_steps):
    epoch, start = divmod(number, batches.steps_per_epoch)
    batch = next(batches.epoch(epoch, start))
    phase = optimizers.phase(config, batches.steps_per_epoch, number)
    if phase not in compiled:
      train = functools.partial(stepper.train, phase=phase)
      compiled[phase] = mesh.map(train, donate=True) if mesh else jax.jit(train)
    state, metrics = compiled[phase](state, mesh.place(batch) if mesh else batch)
    yield state, metrics


def assert_lies_by_the_rule(mesh, state):
  """Each array on the devices that the rule names; returns those that are split."""
  split = 0
  for leaf, place in zip(
    jax.tree.leaves(state), jax.tree.leaves(mesh.shardings(state)), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)
    split += not leaf.is_fully_replicated
  return split


def assert_equals_one_device(problem, config, num_steps, tolerance=1e-12):
  mesh = meshes.MeshParallel(_MESH)
  expected = steps_of(problem, config, None, num_steps)
  found = steps_of(problem, config, mesh, num_steps)
  for one, many in zip(expected, found, strict=True):
    assert_lies_by_the_rule(mesh, many[0])
  assert assert_lies_by_the_rule(mesh, many[0].params) >= 2
  assert assert_lies_by_the_rule(mesh, many[0].opt_state) >= 2
  assert_close(many[0], one[0], tolerance)
  assert_close(many[1], one[1], tolerance)


_FAMILY = sorted(set(methods.found()) - {'sam', 'asam', 'looksam', 'esam'})


@pytest.mark.parametrize(
  ('optimizer', 'fields'),
  [
    ('momentum', {}),
    ('adamw', {}),
    ('sam', {}),
    ('sam', {'m_sharpness': 8}),
    ('asam', {'rho': 0.5}),
    ('looksam', {}),
    ('esam', {}),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in _FAMILY),
    pytest.param('looksam', {'m_sharpness': 8}, marks=pytest.mark.slow),
    pytest.param('sam', {'perturb_every': 3}, marks=pytest.mark.slow),
    pytest.param('sam', {'base_optimizer': 'adam'}, marks=pytest.mark.slow),
    pytest.param('sam', {'clip_norm': 0.3}, marks=pytest.mark.slow),
  ],
)
def test_ten_steps_equal_one_device(optimizer, fields, small, x64):
  """With batch normalization, dropout, and every second batch of six examples."""
  problem = small.problem(small.split(22, dtype=np.float64))
  if 'adam' in (optimizer + fields.get('base_optimizer', '')):
    # Adam scales a gradient that is rounding alone to the size of all others.
    problem = problem._replace(model=Plain())
  assert_equals_one_device(problem, config_of(optimizer, **fields), 10)


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ((), P()),
    ((7,), P()),
    ((8,), P('fsdp')),
    ((3, 5), P()),
    ((3, 8), P(None, 'fsdp')),
    ((8, 4), P('fsdp')),
    ((4, 4), P(None, 'fsdp')),
    ((9, 4), P(None, 'fsdp')),
    ((3, 3, 16, 32), P(None, None, None, 'fsdp')),
    ((0, 4), P()),
  ],
)
def test_the_largest_dimension_that_divides_is_split(shape, expected):
  assert meshes.MeshParallel('data:2,fsdp:4').spec(shape) == expected
  assert meshes.MeshParallel('data:8').spec(shape) == P()
  assert meshes.MeshParallel('data:8,fsdp:1').spec(shape) == P()


def test_small_arrays_are_whole(monkeypatch):
  monkeypatch.setattr(meshes, 'SMALL', 1024)
  mesh = meshes.MeshParallel('fsdp:8')
  assert mesh.spec((1016,)) == P() and mesh.spec((1024,)) == P('fsdp')
