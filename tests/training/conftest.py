"""A problem with batch normalization and dropout."""

import types

import flax.linen as nn
import numpy as np
import pytest

from input_pipelines import ArraySplit
from training import Classification, Problem
from training.scores import smoothed_kl


class SmallNetwork(nn.Module):
  """Dense, batch normalization, dropout, dense."""

  dropout_rate: float = 0.3

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.Dense(8)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.tanh(x))
    return nn.Dense(3)(x)


def split(num_examples, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_examples, 5)).astype(dtype)
  labels = (inputs[:, 0] > 0).astype(np.int32) + (inputs[:, 1] > 0.5)
  return ArraySplit(inputs, labels)


def problem(train=None, dropout_rate=0.3, label_smoothing=0.1):
  train = train or split(22)
  return Problem(
    model=SmallNetwork(dropout_rate),
    train=train,
    test=split(13, seed=1),
    example_losses=smoothed_kl(label_smoothing),
    scores=Classification(3),
    example_inputs=np.zeros((1, 5), np.float32),
  )


@pytest.fixture(scope='session')
def small():
  """The network, its data and the problem of both."""
  return types.SimpleNamespace(Network=SmallNetwork, split=split, problem=problem)
