"""Diabetes progression: scikit-learn's 442 patients, embedded in its package."""

import numpy as np

from input_pipelines import batching


def load(*, seed: int = 0) -> tuple[batching.ArraySplit, batching.ArraySplit]:
  """Loads the patients, split at random 70/30 by `seed`.

  Args:
    seed: seed of the split.

  Returns:
    `(train, test)`: 309 and 133 patients, ten measurements each as float32 of unit
    variance over all, and the progression of the disease after a year, (n, 1), less
    its mean and in units of its standard deviation over the training patients.

  >>> train, test = load(seed=0)
  >>> train.num_examples, test.num_examples
  (309, 133)
  """
  from sklearn import datasets  # Slow to import, and needed by this set alone.

  inputs, targets = datasets.load_diabetes(return_X_y=True)
  inputs = (inputs / inputs.std(axis=0, keepdims=True)).astype(np.float32)
  train, test = batching.split_indices(len(targets), seed)
  targets = (targets - targets[train].mean()) / targets[train].std()
  targets = targets[:, None].astype(np.float32)
  return (
    batching.ArraySplit(inputs[train], targets[train]),
    batching.ArraySplit(inputs[test], targets[test]),
  )
