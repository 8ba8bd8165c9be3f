"""Shards of several processes, and what replicas tell each other."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_pipelines import ArraySplit
from training import Config, UsageError, parallel, sharing, step


def _processes(patch, num_processes, num_devices):
  """The replicas of each of several processes, which this one plays in turn."""
  patch.setattr(jax, 'process_count', lambda *_: num_processes)
  patch.setattr(jax, 'device_count', lambda *_: num_processes * num_devices)
  for index in range(num_processes):
    patch.setattr(jax, 'process_index', lambda *_, i=index: i)
    yield parallel.DataParallel(num_devices)


@given(
  sizes=st.tuples(st.integers(1, 70), st.integers(1, 80)),
  num_processes=st.sampled_from([1, 2, 4]),
  num_devices=st.sampled_from([1, 3]),
  groups=st.sampled_from([(), (2,)]),
  position=st.tuples(st.integers(0, 3), st.integers(0, 2)),
)
def test_every_example_goes_to_one_device_of_one_process(
  sizes, num_processes, num_devices, groups, position
):
  num_examples, batch_size = sizes
  split = ArraySplit(np.zeros((num_examples, 1)), np.arange(num_examples))
  seen = {}
  with pytest.MonkeyPatch.context() as patch:
    for replicas in _processes(patch, num_processes, num_devices):
      batches = split.batches(batch_size, shards=(*replicas.axes, *groups), seed=3)
      for number, whole in enumerate(batches.epoch(*position)):
        batch = replicas.local(whole)
        real = batch['weights'] > 0
        if replicas.axes:
          assert real.shape[: 1 + len(groups)] == (num_devices, *groups)
        # A resident split is dealt out by the same rule.
        indices = replicas.local(batches.indices(*position)[number])
        np.testing.assert_array_equal(indices[real], batch['labels'][real])
        assert ((indices >= 0) == real).all()
        seen.setdefault(number, []).extend(batch['labels'][real].tolist())
  epoch, start = position
  alone = split.batches(batch_size, seed=3).epoch(epoch, start)
  for number, batch in enumerate(alone):
    assert sorted(seen[number]) == sorted(batch['labels'].tolist())
  every = [label for labels in seen.values() for label in labels]
  assert start or sorted(every) == list(range(num_examples))


def test_processes_take_all_their_devices(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda *_: 2)
  monkeypatch.setattr(jax, 'device_count', lambda *_: 16)
  assert parallel.DataParallel().num_replicas == 16
  with pytest.raises(UsageError, match='--devices=3: of several processes each'):
    parallel.DataParallel(3)


class _Plain(nn.Module):
  """75 parameters."""

  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(3)(nn.tanh(nn.Dense(8)(x)))


_METHODS = {
  'sgd': (1, {'optimizer': 'sgd', 'base_optimizer': 'sgd'}),
  'sam': (2, {'optimizer': 'sam', 'rho': 0.2}),
  'sam, a group a device': (1, {'optimizer': 'sam', 'rho': 0.2, 'm_sharpness': 4}),
  'sam, two groups a device': (1, {'optimizer': 'sam', 'rho': 0.2, 'm_sharpness': 2}),
  'sam, accumulated': (2, {'optimizer': 'sam', 'rho': 0.2, 'grad_accum_steps': 2}),
  'asam': (2, {'optimizer': 'asam', 'rho': 0.5}),
}


@pytest.mark.parametrize('name', _METHODS)
def test_gradients_are_sent_once_for_each_shared_pass(name, small):
  """All-reduces of the compiled step: their elements, all together."""
  count, fields = _METHODS[name]
  config = Config(**{'base_optimizer': 'momentum', **fields}, batch_size=16)
  problem = small.problem(small.split(16))._replace(model=_Plain())
  replicas = parallel.DataParallel(4)
  shared = sharing.of(config, 4)
  stepper = step.Stepper(problem, config, 1, shared, parallel.AXIS)
  state = replicas.replicate(jax.jit(stepper.init)(0))
  batch = next(problem.train.batches(16, shards=(4, *shared.axes)).epoch(0))
  train = replicas.map(functools.partial(stepper.train, phase=None), donate=True)
  text = train.lower(state, jax.tree.map(jnp.asarray, batch)).compile().as_text()
  reduced = re.findall(r'= (.*?) all-reduce(?:-start)?\(', text)
  sizes = [
    np.prod([int(n) for n in dims.split(',') if n], dtype=int)
    for shapes in reduced
    for dims in re.findall(r'\w\d+\[([\d,]*)\]', shapes)
  ]
  assert count * 75 <= sum(sizes) <= count * 75 + 12, sizes
  assert not re.search('all-gather|all-to-all|collective-permute|reduce-scatter', text)
