"""Means with intervals that heed autocorrelation."""

import numpy as np
import pytest
import scipy.stats

from measurements import blocks


def test_the_interval_by_its_formula():
  values = np.random.default_rng(0).normal(size=30)
  pairs = list(enumerate(values))
  mean, half = blocks.late_mean(pairs, 29)  # steps from 20 on
  assert mean == pytest.approx(values[20:].mean())
  lengths = [2, 2, 1, 1, 1, 1, 1, 1]
  means = [x.mean() for x in np.split(values[20:], np.cumsum(lengths)[:-1])]
  interval = scipy.stats.t.interval(0.95, 7, scale=scipy.stats.sem(means))
  assert half == pytest.approx(interval[1], rel=1e-6)


def test_what_there_is_too_little_of():
  assert blocks.late_mean([], 10) == (None, None)
  assert blocks.late_mean([(0, 1.0)], 10) == (None, None)
  assert blocks.late_mean([(9, 1.0), (10, 2.0)], 10) == (1.5, None)
  assert blocks.show(1.5, None) == '1.500'
  assert blocks.show(1.5, 0.25) == '1.500 ± 0.250'


def test_95_of_100_intervals_of_correlated_values_hold_the_mean():
  """An autoregression of correlation .8, whose plain errors are a third of the true."""
  rng = np.random.default_rng(1)
  runs, length = 600, 900
  noise = rng.normal(size=(length, runs))
  values = np.zeros((length, runs))
  for number in range(1, length):
    values[number] = 0.8 * values[number - 1] + noise[number]
  late = values[2 * length // 3 :]
  plain = 1.96 * late.std(0) / np.sqrt(len(late))
  assert np.mean(np.abs(late.mean(0)) < plain) < 0.6
  found = [blocks.late_mean(list(enumerate(run)), length - 1) for run in values.T]
  covered = np.mean([abs(mean) < half for mean, half in found])
  assert 0.91 < covered < 0.98
