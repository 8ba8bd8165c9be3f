"""Streams: which examples they read, how often, and with which random choices."""

import threading

import numpy as np
import pytest

from input_pipelines import ArraySplit, DataError, batching
from input_pipelines.streaming import StreamedSplit

COUNT = 53


class Numbers:
  """Examples that tell their number and the first random choice made of them."""

  shape, dtype = (2,), np.float64

  def __init__(self, count=COUNT, damaged=None):
    self.count, self.damaged, self.read = count, damaged, []
    self.lock = threading.Lock()

  def __len__(self):
    return self.count

  def load(self, index, generator):
    if index == self.damaged:
      raise DataError(f'number {index} is damaged: replace it.')
    with self.lock:
      self.read.append(index)
    choice = -1 if generator is None else generator.random()
    return np.array([index, choice]), index % 7


def _split(**arguments):
  return StreamedSplit(Numbers(**arguments))


def _seen(batches):
  """The random choice that each example got, by its number."""
  rows = np.concatenate([b['inputs'][b['weights'] > 0] for b in batches])
  assert len(np.unique(rows[:, 0])) == len(rows)
  return dict(rows.tolist())


@pytest.mark.parametrize('seed', [None, 4])
@pytest.mark.parametrize('shards', [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize('size', [8, 20, 53])
def test_batches_are_those_of_arrays(shards, size, seed):
  arrays = ArraySplit(np.arange(COUNT, dtype=np.float64), np.arange(COUNT) % 7)
  arguments = {'batch_size': size, 'shards': shards, 'seed': seed}
  ours, theirs = _split().batches(**arguments), arrays.batches(**arguments)
  assert ours.steps_per_epoch == theirs.steps_per_epoch
  for epoch, start in ((0, 0), (3, 1)):
    pairs = zip(ours.epoch(epoch, start), theirs.epoch(epoch, start), strict=True)
    for one, other in pairs:
      np.testing.assert_array_equal(one['inputs'][..., 0], other['inputs'])
      for name in ('labels', 'weights'):
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype


def test_choices_depend_on_seed_epoch_and_number_alone():
  expected = {
    i: np.random.default_rng(np.random.SeedSequence([4, 2], spawn_key=(i,))).random()
    for i in range(COUNT)
  }
  for size, shards in ((8, ()), (20, (4,)), (27, (2, 3))):
    batches = _split().batches(size, shards=shards, seed=4)
    assert _seen(list(batches.epoch(2))) == expected
    rest = _seen(list(batches.epoch(2, 1)))
    assert rest == {i: expected[i] for i in rest}
  batches = _split().batches(8, seed=4)
  assert not set(_seen(batches.epoch(3)).values()) & set(expected.values())
  assert set(_seen(_split().batches(8).epoch(2)).values()) == {-1}


@pytest.mark.parametrize('seed', [None, 1])
@pytest.mark.parametrize('shards', [(4,), (4, 2)], ids=str)
def test_a_process_reads_its_own_shards_alone(shards, seed):
  whole = list(_split().batches(20, shards=shards, seed=seed).epoch(1))
  everything = []
  for process in range(2):
    examples = Numbers()
    batches = StreamedSplit(examples).batches(20, shards=shards, seed=seed)
    local = lambda array, i=process: array[2 * i : 2 * i + 2]
    made = batches.local_epoch(1, 0, local)
    for ours, theirs in zip(made, whole, strict=True):
      for name in theirs:
        np.testing.assert_array_equal(ours[name], local(theirs[name]))
    own = [local(b['inputs'])[local(b['weights']) > 0][:, 0] for b in whole]
    own = np.concatenate(own).tolist()
    # In the order of the split even what is read ahead, for later epochs, is its own.
    assert set(examples.read) == set(own) or seed is not None
    everything += own
  assert sorted(everything) == list(range(COUNT))


def test_a_share_without_examples_is_padding():
  batches = _split(count=3).batches(3, shards=(8,), seed=0)
  (batch,) = batches.local_epoch(0, 0, lambda array: array[4:])
  assert batch['inputs'].shape == (4, 1, 2) and not batch['weights'].any()
  assert not list(batches.epoch(0, 1))


def test_streams_go_on_where_they_stand():
  split = _split()
  batches = split.batches(8, seed=4)
  expected = {
    epoch: _seen(_split().batches(8, seed=4).epoch(epoch)) for epoch in range(3)
  }
  assert _seen(batches.epoch(0)) == expected[0]
  thread = split._reader._idle[0]
  assert _seen(batches.epoch(1)) == expected[1]
  assert split._reader._idle[0] is thread
  first = batches.epoch(2)
  next(first)
  other = batches.epoch(2)  # while the first is under way
  rest = [next(other), *other]
  first.close()
  assert _seen(rest) == expected[2]
  assert _seen(batches.epoch(2)) == expected[2]
  # Another seed, and another place, begin anew.
  assert _seen(split.batches(8, seed=5).epoch(0)) != expected[0]
  assert _seen(batches.epoch(0)) == expected[0]
  test = _split()
  for _ in range(2):  # New batches each time, as evaluation makes them.
    assert set(_seen(test.batches(8).epoch(0)).values()) == {-1}
    stream = test._reader._idle[0]
  assert test._reader._idle[0] is stream


def test_threads_share_the_order_of_an_epoch(monkeypatch):
  made = []
  indices = batching.Order.indices

  def counted(order, *position):
    made.append(position)
    return indices(order, *position)

  monkeypatch.setattr(batching.Order, 'indices', counted)
  batches = StreamedSplit(Numbers(2000)).batches(200, seed=0)
  for epoch in range(2):
    assert len(_seen(batches.epoch(epoch))) == 2000
  # For each stream once for its sizes, for an epoch's batches and for its pieces; the
  # pieces of a third are under way.
  assert len(made) <= 9


def test_an_error_is_raised_as_it_is_and_ends_the_stream():
  split = _split(damaged=40)
  with pytest.raises(DataError, match='^number 40 is damaged: replace it.$'):
    list(split.batches(8).epoch(0))
  assert not split._reader._idle


def test_threads_end_with_the_split():
  before = threading.active_count()
  split = _split(count=500)
  next(split.batches(8, seed=0).epoch(0))
  del split
  for _ in range(100):
    if threading.active_count() <= before:
      break
    threading.Event().wait(0.05)
  assert threading.active_count() <= before


def test_without_grain(hide):
  hide('grain', 'grain.python')
  with pytest.raises(DataError, match='needs the package grain.*pip install grain'):
    _split()
