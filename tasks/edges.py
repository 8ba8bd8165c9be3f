"""What the tasks at the edge of stability share: few images, scaled as published."""

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


def in_turn(arrays: Arrays) -> Arrays:
  """Examples whose first thousand hold all classes, whatever their files' order is.

  Folders of images are read class by class. Then the classes take turns: the first
  example of each, the second of each, and so on. Any other order is kept, because that
  of a publisher is part of an experiment.

  >>> in_turn({'labels': np.array([0, 0, 0, 1, 1]), 'x': np.arange(5)})['x'].tolist()
  [0, 3, 1, 4, 2]
  >>> in_turn({'labels': np.array([1, 0, 1]), 'x': np.arange(3)})['x'].tolist()
  [0, 1, 2]
  """
  labels = np.asarray(arrays['labels'])
  if (np.diff(labels) < 0).any():
    return arrays
  place = np.arange(len(labels)) - np.searchsorted(labels, labels)
  order = np.argsort(place, kind='stable')
  return {name: array[order] for name, array in arrays.items()}


def pooled(arrays: Arrays) -> Arrays:
  """Images of half the height and width, the means of 2x2 pixels, as float64.

  >>> pooled({'inputs': np.arange(4).reshape(1, 2, 2, 1)})['inputs'].tolist()
  [[[[1.5]]]]
  """
  count, height, width, channels = arrays['inputs'].shape
  blocks = arrays['inputs'].reshape(count, height // 2, 2, width // 2, 2, channels)
  return {**arrays, 'inputs': blocks.mean(axis=(2, 4))}


def standardised(
  train: Arrays, test: Arrays, first: int
) -> tuple[ArraySplit, ArraySplit]:
  """The first images of each part, each pixel of mean 0 and variance 1, float32.

  Mean and variance are over the whole training part. A pixel that never varies is 0.

  Args:
    train: with 'inputs' (n, ...) and 'labels'.
    test: the same of the test part.
    first: number of images of each part.
  """
  inputs = train['inputs'].reshape(len(train['labels']), -1)
  # Sums of bytes and of their squares are exact in float64, and need no copy of all.
  total, squares = np.zeros((2, inputs.shape[1]))
  for start in range(0, len(inputs), 1000):
    part = inputs[start : start + 1000].astype(np.float64)
    total += part.sum(axis=0)
    squares += (part**2).sum(axis=0)
  mean = total / len(inputs)
  deviation = np.sqrt(np.maximum(squares / len(inputs) - mean**2, 0))
  scale = np.where(deviation > 0, deviation, 1)

  def split(part):
    pixels = part['inputs'][:first].reshape(-1, inputs.shape[1])
    shape = (-1, *part['inputs'].shape[1:])
    scaled = ((pixels - mean) / scale).astype(np.float32).reshape(shape)
    return ArraySplit(scaled, part['labels'][:first])

  return split(train), split(test)
