"""Handwritten digits: scikit-learn's 1,797 scans, embedded in its package."""

import importlib.util
import pathlib

import numpy as np

from input_pipelines import batching
from input_pipelines.errors import DataError


def load(*, seed: int = 0) -> tuple[batching.ArraySplit, batching.ArraySplit, int, int]:
  """Loads the digits, split at random 70/30 by `seed` (not stratified).

  Args:
    seed: seed of the split.

  Returns:
    `(train, test, num_classes, num_features)`: 1,257 and 540 scans of 8x8 pixels
    as float32 rows of 64 values in [0, 1], 10 classes, 64 features.

  Raises:
    DataError: scikit-learn, which holds the scans, is not installed.

  >>> train, test, num_classes, num_features = load(seed=0)
  >>> train.num_examples, test.num_examples, num_classes, num_features
  (1257, 540, 10, 64)
  """
  pixels, labels = _scans()
  inputs = (pixels / 16.0).astype(np.float32)
  train, test = batching.split_indices(len(labels), seed)
  return (
    batching.ArraySplit(inputs[train], labels[train]),
    batching.ArraySplit(inputs[test], labels[test]),
    10,
    64,
  )


def _scans() -> tuple[np.ndarray, np.ndarray]:
  """Returns scans `(1797, 64)` of values from 0 to 16, and their int64 labels."""
  package = importlib.util.find_spec('sklearn')
  if package is None:
    raise DataError(
      'the digits need the package scikit-learn, which holds them: install the '
      'requirements with pip install -r requirements.txt.'
    )
  # Importing scikit-learn takes longer than everything else that a run imports.
  path = pathlib.Path(package.origin).parent / 'datasets' / 'data' / 'digits.csv.gz'
  if path.exists():
    table = np.loadtxt(path, delimiter=',')
    return table[:, :-1], table[:, -1].astype(np.int64)
  from sklearn import datasets

  return datasets.load_digits(return_X_y=True)
