"""What the tasks at the edge of stability share: few images, less their mean."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from input_pipelines import ArraySplit

Arrays = Mapping[str, np.ndarray]


def cut(arrays: Arrays, *sizes: int) -> list[Arrays]:
  """Parts of consecutive examples, from the first on.

  >>> [part['x'].tolist() for part in cut({'x': np.arange(9)}, 2, 3)]
  [[0, 1], [2, 3, 4]]
  """
  ends = np.cumsum(sizes)
  return [
    {name: array[end - size : end] for name, array in arrays.items()}
    for size, end in zip(sizes, ends, strict=True)
  ]


def less_mean(train: Arrays, test: Arrays) -> tuple[ArraySplit, ArraySplit]:
  """Splits with pixels / 256 minus the mean image of the training split, float32."""
  mean = train['inputs'].mean(axis=0, dtype=np.float64) / 256
  return tuple(
    ArraySplit((part['inputs'] / 256 - mean).astype(np.float32), part['labels'])
    for part in (train, test)
  )
