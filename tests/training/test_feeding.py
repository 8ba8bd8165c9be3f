"""Batches on the devices: the same from a copy there and in a stream."""

import threading
import time
import types

import jax
import numpy as np
import pytest

from training import feeding, parallel

_SHARDS = [(), (3,), (2, 2)]


def _epoch(split, shards, resident, epoch, start=0):
  replicas = parallel.DataParallel(shards[0] if shards else 1)
  feed = feeding.Feed(split, replicas, resident=resident)
  batches = split.batches(8, shards=shards, seed=5)
  return list(feed.epoch(batches, epoch, start))


def _comes_true(condition):
  deadline = time.monotonic() + 10
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.01)
  return condition()


@pytest.mark.parametrize('shards', _SHARDS, ids=str)
@pytest.mark.parametrize('resident', [True, False])
def test_both_ways_give_the_batches_of_the_split(small, shards, resident):
  split = small.split(22)  # 8, 8 and 6, which leaves empty slots
  expected = list(split.batches(8, shards=shards, seed=5).epoch(3, start=1))
  found = _epoch(split, shards, resident, 3, start=1)
  assert len(found) == len(expected) == 2
  for ours, theirs in zip(found, expected, strict=True):
    assert jax.tree.map(lambda x: x.dtype, ours) == {
      'inputs': np.float32,
      'labels': np.int32,
      'weights': np.float32,
    }
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for leaf in jax.tree.leaves(ours):
      assert leaf.sharding.device_set == set(jax.devices()[: (*shards, 1)[0]])


def test_bytes_of_images_stay_bytes():
  from input_pipelines import ArraySplit

  images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
  split = ArraySplit(images, np.arange(9))
  for resident in (True, False):
    batch = _epoch(split, (2,), resident, 0)[-1]
    assert batch['inputs'].dtype == np.uint8 and batch['inputs'].shape == (
      2,
      1,
      4,
      4,
      3,
    )
    (label,) = batch['labels'][batch['weights'] > 0]
    np.testing.assert_array_equal(batch['inputs'][0, 0], images[label])
    assert not batch['inputs'][1].any()


def test_what_fits(small):
  splits = [small.split(22), small.split(13)]
  gib = 35 * (5 * 4 + 4) / 2**30
  assert feeding.fit(splits, gib)
  assert not feeding.fit(splits, 0.999 * gib)
  packed = types.SimpleNamespace(num_examples=3)  # streamed: no arrays
  assert not feeding.fit([splits[0], packed], 1.0)


def test_a_stream_runs_ahead_and_ends_its_threads_when_closed(small):
  split = small.split(22)
  made = []

  class Batches:
    def epoch(self, epoch, start=0):
      for batch in split.batches(1, seed=0).epoch(epoch, start):
        made.append(1)
        yield batch

  batches = Batches()
  threads = threading.active_count()
  feed = feeding.Feed(split, parallel.DataParallel(1), resident=False)
  stream = feed.epoch(batches, 0)
  next(stream)
  assert _comes_true(lambda: len(made) >= 5)
  assert len(made) < 22
  stream.close()
  count = len(made)
  assert _comes_true(lambda: threading.active_count() <= threads)
  assert len(made) == count


def test_an_error_in_a_stream_is_raised_where_it_is_read(small):
  split = small.split(22)

  class Batches:
    def epoch(self, epoch, start=0):
      yield next(split.batches(8).epoch(0))
      raise OSError('no such disk')

  batches = Batches()
  feed = feeding.Feed(split, parallel.DataParallel(1), resident=False)
  with pytest.raises(OSError, match='no such disk'):
    list(feed.epoch(batches, 0))


def test_where_batches_can_nothing_but_the_processs_own_shards_is_made(small):
  split = small.split(22)
  everything = split.batches(8, shards=(4,), seed=5)
  own = lambda array: array[2:4]

  class Batches:
    def local_epoch(self, epoch, start, local):
      for indices in everything.indices(epoch, start):
        yield everything._collate(local(indices))

  replicas = types.SimpleNamespace(
    local=lambda tree: jax.tree.map(own, tree), place=jax.device_put
  )
  feed = feeding.Feed(split, replicas, resident=False)
  ours = list(feed.epoch(Batches(), 3, 1))
  theirs = list(feed.epoch(everything, 3, 1))
  assert len(ours) == 2 and ours[0]['labels'].shape == (2, 2)
  for pair in zip(ours, theirs, strict=True):
    jax.tree.map(np.testing.assert_array_equal, *pair)


class _Result:
  """A result of a device that is there, or not yet."""

  def __init__(self, ready):
    self.is_ready = lambda: ready


@pytest.mark.parametrize('ready', [True, False])
def test_only_idle_devices_wait(ready):
  def feed():
    time.sleep(0.05)
    yield 'batch'

  stopwatch = feeding.Stopwatch(1.0, 3.0)
  assert stopwatch.next(feed(), {'loss': _Result(ready)}) == 'batch'
  waited = stopwatch.waited - 1.0
  assert (0.05 <= waited < 5) if ready else waited == 0
  stopwatch.total += 1.0
  assert stopwatch.share == stopwatch.waited / 4
  assert feeding.Stopwatch().share == 0
  assert stopwatch.next(iter(()), None) is None
