"""The embedded digits."""

import numpy as np
from sklearn import datasets

from input_pipelines import digits


def _everything(split):
  return next(split.batches(split.num_examples).epoch(0))


def test_both_parts_together_are_the_published_digits():
  train, test, num_classes, num_features = digits.load(seed=3)
  assert (train.num_examples, test.num_examples) == (1257, 540)
  assert (num_classes, num_features) == (10, 64)
  parts = _everything(train), _everything(test)
  inputs = np.concatenate([part['inputs'] for part in parts])
  labels = np.concatenate([part['labels'] for part in parts])
  assert inputs.dtype == np.float32
  published, targets = datasets.load_digits(return_X_y=True)
  rows = np.column_stack([inputs * 16, labels])
  expected = np.column_stack([published, targets])
  np.testing.assert_array_equal(
    rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)]
  )


def test_the_seed_makes_the_split():
  first, again, other = (
    _everything(digits.load(seed=seed)[1])['inputs'] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
