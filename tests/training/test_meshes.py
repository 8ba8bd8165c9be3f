"""Steps on a mesh: parameters sharded, the batch split, the numbers of one device."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tasks
from input_pipelines import ArraySplit, GraphSplit
from models import GCN, WideResNet
from training import feeding, meshes, methods, optimizers, sharing, step
from training.scores import SquaredError, squared_error

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


def assert_equals_one_device(problem, config, num_steps):
  mesh = meshes.MeshParallel(_MESH)
  expected = steps_of(problem, config, None, num_steps)
  found = steps_of(problem, config, mesh, num_steps)
  for one, many in zip(expected, found, strict=True):
    assert_lies_by_the_rule(mesh, many[0])
    assert_close(many[1], one[1])
  assert assert_lies_by_the_rule(mesh, many[0].params) >= 2
  assert assert_lies_by_the_rule(mesh, many[0].opt_state) >= 2
  assert_close(many[0], one[0])


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


@pytest.mark.parametrize(
  'fields',
  [
    {'grad_accum_steps': 2},
    pytest.param(
      {'grad_accum_steps': 2, 'm_sharpness': 16, 'batch_size': 32},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_accumulated_steps_equal_one_device(fields, small, x64):
  """Each microbatch with statistics and dropout of its own, on either."""
  problem = small.problem(small.split(38, dtype=np.float64))
  assert_equals_one_device(problem, config_of('sam', **fields), 6)


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['momentum', 'sam'])
def test_ten_steps_of_a_convolutional_network_equal_one_device(optimizer, small, x64):
  rng = np.random.default_rng(0)
  train = ArraySplit(rng.normal(size=(12, 8, 8, 3)), np.arange(12) % 3)
  problem = small.problem(train)._replace(
    model=WideResNet(num_classes=3, depth=10, width=1),
    example_inputs=np.zeros((1, 8, 8, 3)),
  )
  config = config_of(optimizer, batch_size=8)
  assert_equals_one_device(problem, config, 10)


def graphs(num_graphs):
  """Random graphs packed one after the other."""
  rng = np.random.default_rng(0)
  n_node, n_edge = rng.integers(2, 6, num_graphs), rng.integers(1, 9, num_graphs)
  first = np.repeat(np.cumsum(n_node) - n_node, n_edge)
  ends = first + rng.integers(0, np.repeat(n_node, n_edge), (2, n_edge.sum()))
  nodes = rng.normal(size=(n_node.sum(), 4))
  return jraph.GraphsTuple(
    nodes=nodes,
    edges=None,
    globals=None,
    senders=ends[0],
    receivers=ends[1],
    n_node=n_node,
    n_edge=n_edge,
  )


@pytest.mark.slow
def test_packed_graphs_stay_whole_and_equal_one_device(small, x64):
  """No number of them has to divide: here 7, and 2 in the last batch."""
  train = GraphSplit(graphs(9), np.arange(9) % 3)
  batch = next(train.batches(7).epoch(0))
  placed = meshes.MeshParallel(_MESH).place(batch)
  assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
  model = GCN(num_classes=3, features=(8, 8, 8), hidden_features=8, dropout_rate=0.2)
  problem = small.problem(train)._replace(model=model, example_inputs=batch['inputs'])
  assert_equals_one_device(problem, config_of('sam', batch_size=7), 4)


class Linear(nn.Module):
  """A kernel of 16 x 8, which is split."""

  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(8, use_bias=False)(x)


def test_a_schedule_reaches_the_optimizer_and_rho_the_ascent(small, x64):
  """On a quadratic each step is ``w - rate_t g(w + rho g(w) / |g(w)|)``, in NumPy."""
  rng = np.random.default_rng(0)
  inputs, targets = rng.normal(size=(16, 16)), rng.normal(size=(16, 8))
  train = ArraySplit(inputs, targets)
  problem = small.problem(train)._replace(
    model=Linear(),
    example_inputs=inputs[:1],
    example_losses=squared_error,  # Half the square, the mean over 8 outputs.
    scores=SquaredError(),
  )
  config = config_of('sam', base_optimizer='sgd', rho=0.5, epochs=5, weight_decay=0.0)
  gradient = lambda w: inputs.T @ (inputs @ w - targets.astype(np.float32)) / 128
  mesh, expected = meshes.MeshParallel(_MESH), None
  stepper = step.Stepper(problem, config, 1, sharing.of(config))
  state = mesh.spread(stepper.init(0, dtype=jnp.float64))
  train_step = mesh.map(stepper.train, donate=True)
  for number in range(5):
    if expected is None:
      expected = mesh.first(state).params['Dense_0']['kernel']
    rate = 0.1 * (1 + np.cos(np.pi * number / 5)) / 2
    clean = gradient(expected)
    point = expected + 0.5 * clean / np.linalg.norm(clean)
    expected = expected - rate * gradient(point)
    batch = next(train.batches(16, seed=0).epoch(number))
    state, metrics = train_step(state, mesh.place(batch))
    kernel = state.params['Dense_0']['kernel']
    assert kernel.sharding.spec == P('fsdp')
    # The rate is of float32.
    np.testing.assert_allclose(kernel, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics['learning_rate'], rate, rtol=1e-6)
    assert metrics['rho'] == 0.5
    assert metrics['perturbed_loss'] > metrics['loss']


class Wide(nn.Module):
  """A kernel of 2048 entries, larger than anything else in a step."""

  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(8)(nn.tanh(nn.Dense(64)(x)))


_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
  r'(?:-start)?\('
)


def collectives(small, optimizer):
  """How often a compiled step moves how many entries, but for scalars; and those."""
  rng = np.random.default_rng(0)
  train = ArraySplit(rng.normal(size=(16, 32)).astype(np.float32), np.arange(16) % 8)
  problem = small.problem(train)._replace(
    model=Wide(), example_inputs=np.zeros((1, 32), np.float32)
  )
  config, mesh = config_of(optimizer), meshes.MeshParallel(_MESH)
  stepper = step.Stepper(problem, config, 1, sharing.of(config))
  batch = next(train.batches(16).epoch(0))
  lowered = mesh.map(stepper.train, donate=True).lower(
    mesh.make(stepper.init, 0), mesh.place(batch)
  )
  found, scalars = collections.Counter(), 0
  for match in _COLLECTIVE.finditer(lowered.compile().as_text()):
    for shape in re.findall(r'\w+\[([\d,]*)\]', match[1]):
      size = int(np.prod([int(n) for n in shape.split(',') if n]))
      found[match[2], size] += size > 1
      scalars += size <= 1
  return +found, scalars


@pytest.fixture(scope='module')
def of_two_steps(small):
  """What two steps of the base optimizer move, as many as SAM has gradients."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(meshes, 'SMALL', 1)
    once, scalars = collectives(small, 'momentum')
  return {kind: 2 * count for kind, count in once.items()}, 2 * scalars


@pytest.mark.parametrize(
  'optimizer',
  [
    'sam',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('asam', 'gsam', 'looksam', 'friendly_sam', 'wsam')
    ),
  ],
)
def test_a_perturbation_adds_scalars_to_what_two_gradients_move(
  optimizer, small, of_two_steps
):
  """No array, and no part of one, crosses devices for a norm or for eps-hat."""
  twice, scalars = of_two_steps
  found, own_scalars = collectives(small, optimizer)
  assert set(found) <= set(twice)
  assert all(count <= twice[kind] for kind, count in found.items()), (found, twice)
  reduced = {kind: n for kind, n in twice.items() if kind[0] == 'all-reduce'}
  assert reduced == {kind: n for kind, n in found.items() if kind[0] == 'all-reduce'}
  assert reduced['all-reduce', 1024] == 2  # The halves of the kernel's gradients.
  assert own_scalars > scalars
  assert max(size for _, size in found) < 2048


def test_both_ways_of_feeding_split_the_batch(small):
  """From arrays on the devices and from the host: the batches of the split."""
  split, mesh = small.split(22), meshes.MeshParallel(_MESH)
  batches = split.batches(16, shards=(), seed=5)
  expected = list(batches.epoch(3))
  for resident in (True, False):
    found = list(feeding.Feed(split, mesh, resident=resident).epoch(batches, 3))
    for ours, theirs in zip(found, expected, strict=True):
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # 16 over all eight devices, 6 over the two of 'fsdp'.
    for axes, batch in zip((('data', 'fsdp'), 'fsdp'), found, strict=True):
      for leaf in jax.tree.leaves(batch):
        place = NamedSharding(mesh.mesh, P(axes))
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_a_state_is_made_where_it_belongs(small):
  """And is that of one device; its keys, too."""
  config, mesh = config_of('trace_sam'), meshes.MeshParallel(_MESH)
  stepper = step.Stepper(small.problem(), config, 1, sharing.of(config))
  state = mesh.make(stepper.init, 3)
  assert assert_lies_by_the_rule(mesh, state) >= 4
  assert_close(mesh.first(state), jax.jit(stepper.init)(3), 1e-6)
  on_one = mesh.variables(state)
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(on_one))
  assert_close(on_one, state, 0)


@pytest.mark.parametrize('mesh', [None, _MESH])
def test_any_number_of_evaluations_may_be_asked_for(mesh, small):
  """Without waiting they took each other's threads, and the process was ended."""
  config, problem = config_of('sgd', batch_size=8), small.problem()
  devices = meshes.of(mesh)
  shared = sharing.of(config, devices.num_replicas)
  stepper = step.Stepper(problem, config, 1, shared, devices.axis_name)
  state = devices.spread(devices.make(stepper.init, 0))
  batches = problem.train.batches(8, shards=devices.axes)
  batch = devices.place(next(batches.epoch(0)))
  evaluate = devices.map(stepper.evaluate)
  sums = [evaluate((state.params, state.batch_stats), batch) for _ in range(300)]
  assert all(float(devices.first(found)['examples']) == 8 for found in sums)
