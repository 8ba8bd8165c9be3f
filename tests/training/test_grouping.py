"""Which runs are members of one population, and how many at once."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import Config, UsageError, grouping

_SAM = Config(optimizer='sam', base_optimizer='momentum', rho=0.1, learning_rate=0.2)


def _named(*configs):
  return {f'run_{number}': config for number, config in enumerate(configs)}


def _like(**fields):
  return dataclasses.replace(_SAM, **fields)


@pytest.mark.parametrize(
  'fields',
  [{'seed': 3}, {'rho': 0.3}, {'learning_rate': 0.01}],
)
def test_what_members_may_differ_in(fields):
  runs = _named(_SAM, _like(**fields))
  assert grouping.groups(runs) == [runs]


@pytest.mark.parametrize(
  'fields',
  [
    {'rho': 0.0},
    {'weight_decay': 0.1},
    {'learning_rate': 0.0},
    {'batch_size': 32},
    {'hyperparameters': {'alpha': 0.1}},
    {'schedule': 'cosine'},
    {'model': 'depth=3'},
    {'optimizer': 'asam'},
    {'epochs': 7},
  ],
)
def test_what_makes_another_program(fields):
  runs = _named(_SAM, _like(**fields), _like(seed=1), _like(seed=1, **fields))
  first, second = grouping.groups(runs)
  assert list(first) == ['run_0', 'run_2'] and list(second) == ['run_1', 'run_3']


def test_hyperparams_are_what_varies():
  assert grouping.hyperparams([_SAM, _like(seed=1)]) == {}
  assert grouping.hyperparams([_SAM, _like(rho=0.3)]) == {'rho': [0.1, 0.3]}
  found = grouping.hyperparams([_SAM, _like(learning_rate=0.1)])
  assert found == {'learning_rate_scale': [1.0, 0.5]}


@given(st.integers(1, 60), st.integers(1, 20))
def test_chunks_are_even_and_stay_when_the_first_is_done(count, most):
  group = _named(*[_SAM] * count)
  parts = grouping.chunks(group, most)
  assert [name for part in parts for name in part] == list(group)
  sizes = [len(part) for part in parts]
  assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
  assert len(parts) == math.ceil(count / most)
  left = {name: c for name, c in group.items() if name not in parts[0]}
  assert not left or grouping.chunks(left, most) == parts[1:]


def test_memory_decides_how_many_train_at_once(capsys):
  needed = grouping.Need(shared=100, state=10, work=40)
  group = _named(*[_like(seed=seed) for seed in range(10)])
  plan = lambda limit, mapping='vmap', devices=1: [
    len(part) for part in grouping.plan(group, needed, limit, devices, mapping, print)
  ]
  assert plan(600) == [10]
  assert plan(599) == [5, 5]
  assert plan(300) == [4, 3, 3]
  assert plan(300, devices=2) == [5, 5]
  # One after the other, only the states add up: 100 + 40 + 10 * 2 * 10.
  assert plan(340, 'map') == [10]
  assert 'in 3 populations, one after the other' in capsys.readouterr().out
  with pytest.raises(UsageError, match='one member needs .* --population_gib'):
    plan(149)


def test_the_limit_is_the_users_or_the_machines():
  devices = jax.local_devices()[:4]
  assert grouping.limit(devices, 2.0) == grouping.GIB // 2
  assert 0 < grouping.limit(devices, None) < grouping.limit(devices[:1], None)
