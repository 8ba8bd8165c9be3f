"""The embedded digits."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets

from input_pipelines import DataError, digits


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


def test_scikit_learn_is_not_imported_for_its_file():
  """It takes longer than everything else that a run imports."""
  program = """
import sys
from input_pipelines import digits
digits.load()
print('sklearn' in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == 'False'


def test_where_scikit_learn_keeps_its_file_elsewhere_it_is_asked(monkeypatch):
  expected = digits.load(seed=1)
  monkeypatch.setattr(pathlib.Path, 'exists', lambda path: False)
  found = digits.load(seed=1)
  for split, other in zip(found[:2], expected[:2], strict=True):
    for name, array in _everything(split).items():
      np.testing.assert_array_equal(array, _everything(other)[name])


def test_without_scikit_learn_its_name_is_said(hide):
  hide('sklearn')
  with pytest.raises(DataError, match='package scikit-learn'):
    digits.load()
