"""A population in one program: every member equals its own single run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import Config, feeding, grouping, members, sharing, step

_STEPS = 51  # 17 epochs of 22 examples in batches of 8
_VARIED = [
  {'rho': 0.05, 'learning_rate': 0.1, 'weight_decay': 1e-3, 'seed': 0},
  {'rho': 0.2, 'learning_rate': 0.05, 'weight_decay': 1e-2, 'seed': 4},
  {'rho': 0.5, 'learning_rate': 0.3, 'weight_decay': 1e-4, 'seed': 1},
]


def _configs(optimizer, count=3, **fields):
  found = []
  for varied in _VARIED[:count]:
    varied = dict(varied, rho=varied['rho'] if optimizer == 'sam' else None)
    varied = {**varied, **fields}
    found.append(
      Config(
        optimizer=optimizer,
        base_optimizer='momentum' if optimizer == 'sam' else optimizer,
        batch_size=8,
        epochs=17,
        schedule='cosine',
        **varied,
      )
    )
  return found


def _population(problem, configs, mapping='vmap', num_devices=1):
  stepper = step.Stepper(problem, configs[0], 3, sharing.of(configs[0]))
  devices = jax.local_devices()[:num_devices]
  found = members.Members(stepper, len(configs), devices, mapping)
  seeds = [config.seed for config in configs]
  return found, found.init(seeds, grouping.hyperparams(configs), jnp.float64)


def _train(found, state, problem, configs, num_steps):
  """The state after some steps, and the metrics of each."""
  shards = sharing.of(configs[0]).axes
  seeds = tuple(config.seed for config in configs)
  batches = problem.train.batches(8, shards=shards, seed=seeds)
  source = feeding.Source(problem.train, found.place_shared, resident=True)
  told = []
  for number in range(num_steps):
    if number % 3 == 0:
      items = source.items(batches, number // 3, 0, found.place_dealt)
    state, metrics = found.train[None](state, source.arrays, next(items))
    told.append(jax.tree.map(np.asarray, metrics))
  return state, told


def _alone(problem, config, num_steps):
  shared = sharing.of(config)
  stepper = step.Stepper(problem, config, 3, shared)
  state = jax.jit(lambda seed: stepper.init(seed, dtype=jnp.float64))(config.seed)
  batches = problem.train.batches(8, shards=shared.axes, seed=config.seed)
  train, told = jax.jit(stepper.train), []
  for epoch in range(-(-num_steps // 3)):
    for batch in list(batches.epoch(epoch))[: num_steps - 3 * epoch]:
      state, metrics = train(state, batch)
      told.append(metrics)
  return state, told


def _assert_close(ours, theirs, **tolerance):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


@pytest.mark.parametrize('optimizer', ['sam', 'momentum'])
def test_members_equal_single_runs(optimizer, small, x64):
  """In float64 over 50 steps, with dropout and batch normalization, by both mappings.

  Radius, learning rate, weight decay and seed differ, and so the order of batches.
  """
  problem = small.problem(small.split(22, dtype=np.float64))
  configs = _configs(optimizer)
  alone = [_alone(problem, config, _STEPS) for config in configs]
  for mapping in members.MAPPINGS:
    found, state = _population(problem, configs, mapping)
    state, told = _train(found, state, problem, configs, _STEPS)
    assert state.members.hyperparams.keys() == grouping.hyperparams(configs).keys()
    got = members.fetch(state.members)
    for index, (expected, facts) in enumerate(alone):
      # Everything that a single run stores, structure and types included.
      _assert_close(members.unstack(got, index), expected, rtol=1e-10, atol=1e-10)
      for ours, theirs in zip(told, facts, strict=True):
        assert set(ours) == {*theirs, members.DIED}
        for name in theirs:
          np.testing.assert_allclose(ours[name][index], theirs[name], rtol=1e-9)


def test_groups_of_m_sharpness(small, x64):
  problem = small.problem(small.split(22, dtype=np.float64))
  configs = _configs('sam', 2, m_sharpness=4)
  found, state = _population(problem, configs)
  state, _ = _train(found, state, problem, configs, 4)
  for index, config in enumerate(configs):
    expected, _ = _alone(problem, config, 4)
    got = members.unstack(members.fetch(state.members), index)
    _assert_close(got.params, expected.params, rtol=1e-10, atol=1e-12)


def _bad(count, index):
  """Configurations of which one has a learning rate that nothing survives."""
  configs = [_configs('sam', 1, seed=seed)[0] for seed in range(count)]
  configs[index] = _configs('sam', 1, seed=index, learning_rate=1e200)[0]
  return configs


@pytest.mark.parametrize(
  ('mapping', 'count', 'num_devices', 'used'),
  [('vmap', 8, 8, 8), ('map', 8, 4, 4), ('vmap', 6, 4, 3)],
)
def test_devices_share_the_members(mapping, count, num_devices, used, small, x64):
  """As on one device, with a member that diverges on one of them."""
  problem = small.problem(small.split(22, dtype=np.float64))
  configs, ends = _bad(count, 1), []
  for number in (1, num_devices):
    found, state = _population(problem, configs, mapping, number)
    assert found.num_devices == (used if number > 1 else 1)
    before = jax.tree.map(np.array, (state.members.params, state.members.batch_stats))
    state, told = _train(found, state, problem, configs, 4)
    ends.append((state, told))
  one, several = ends
  good = [index for index in range(count) if index != 1]
  chosen = [jax.tree.map(lambda x: x[np.array(good)], end[0].members) for end in ends]
  _assert_close(chosen[1], chosen[0], rtol=1e-12, atol=1e-12)
  assert len(several[0].died.sharding.device_set) == used
  died = np.asarray(several[0].died)
  assert died[1] in (1, 2) and not died[good].any()
  after = several[0].members
  if died[1] == 1:
    ours = jax.tree.map(np.asarray, (after.params, after.batch_stats))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), ours, before)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))
  assert after.step.tolist() == [4 if not d else d - 1 for d in died]
