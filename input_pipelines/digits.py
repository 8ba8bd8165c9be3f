"""Handwritten digits: scikit-learn's 1,797 scans, embedded in its package."""

import numpy as np

from input_pipelines import batching


def load(*, seed: int = 0) -> tuple[batching.ArraySplit, batching.ArraySplit, int, int]:
  """Loads the digits, split at random 70/30 by `seed` (not stratified).

  Args:
    seed: seed of the split.

  Returns:
    `(train, test, num_classes, num_features)`: 1,257 and 540 scans of 8x8 pixels
    as float32 rows of 64 values in [0, 1], 10 classes, 64 features.

  >>> train, test, num_classes, num_features = load(seed=0)
  >>> train.num_examples, test.num_examples, num_classes, num_features
  (1257, 540, 10, 64)
  """
  from sklearn import datasets  # Slow to import, and needed by this set alone.

  pixels, labels = datasets.load_digits(return_X_y=True)
  inputs = (pixels / 16.0).astype(np.float32)
  train, test = batching.split_indices(len(labels), seed)
  return (
    batching.ArraySplit(inputs[train], labels[train]),
    batching.ArraySplit(inputs[test], labels[test]),
    10,
    64,
  )
