"""Calibration against scikit-learn, a plain loop, and simulation."""

import jax
import numpy as np
import pytest
from sklearn import metrics

from training import Classification
from training.scores import calibration


def example(num_examples, num_classes, seed=0):
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(num_examples, num_classes))
  return logits, rng.integers(0, num_classes, num_examples)


def summed(logits, labels, weights, cuts):
  parts = np.split(np.arange(len(labels)), cuts)
  found = [
    calibration.totals(logits[p], {'labels': labels[p], 'weights': weights[p]})
    for p in parts
  ]
  return jax.tree.map(lambda *x: np.sum(x, axis=0), *found)


def test_scores_over_batches_are_those_of_a_plain_loop(x64):
  logits, labels = example(200, 4)
  weights = np.ones(200)
  weights[150:] = 0  # Slots without an example.
  found = calibration.summarize(summed(logits, labels, weights, [70, 130]))
  probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  probs, labels = probs[:150], labels[:150]
  expected = metrics.log_loss(labels, probs, labels=range(4))
  assert found['nll'] == pytest.approx(expected, rel=1e-12)
  one_hot = np.eye(4)[labels]
  brier = ((probs - one_hot) ** 2).sum(axis=1).mean()
  assert found['brier'] == pytest.approx(brier, rel=1e-12)
  largest, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
  error = 0
  for b in range(15):
    chosen = (largest > b / 15) & (largest <= (b + 1) / 15)
    if chosen.any():
      gap = correct[chosen].mean() - largest[chosen].mean()
      error += chosen.mean() * abs(gap)
  assert found['ece'] == pytest.approx(error, rel=1e-10)


def test_a_calibrated_network_shows_what_chance_makes_of_it():
  """Labels drawn from the probabilities, 400 times: the mean error is the bias."""
  rng = np.random.default_rng(0)
  logits, _ = example(600, 3)
  probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  found = []
  totals = jax.jit(calibration.totals)
  for _ in range(400):
    labels = (rng.uniform(size=(600, 1)) > probs.cumsum(axis=1)).sum(axis=1)
    batch = {'labels': labels, 'weights': np.ones(600, np.float32)}
    found.append(calibration.summarize(jax.device_get(totals(logits, batch))))
  errors = np.array([x['ece'] for x in found])
  by_chance = np.array([x['ece_by_chance'] for x in found])
  assert np.ptp(by_chance) < 1e-6  # It does not depend on the labels.
  assert errors.mean() == pytest.approx(by_chance[0], rel=0.05)


def test_extreme_logits_stay_finite():
  logits = np.array([[1e4, -1e4], [-1e4, 1e4], [0, 0]], np.float32)
  batch = {'labels': np.array([0, 1, 0]), 'weights': np.ones(3, np.float32)}
  scores = Classification(2)
  found = scores.summarize(jax.device_get(scores.totals(logits, batch)))
  assert found['calibration']['ece'] == pytest.approx(0.5 / 3)
  assert found['calibration']['nll'] == pytest.approx(np.log(2) / 3)
  assert 'calibration error 0.1667 (by chance ' in scores.describe(found)


def test_outputs_that_are_no_logits_have_no_calibration():
  batch = {'labels': np.array([0, 1]), 'weights': np.ones(2, np.float32)}
  scores = Classification(2, logits=False)
  found = scores.summarize(jax.device_get(scores.totals(np.eye(2), batch)))
  assert 'calibration' not in found and scores.describe(found) == 'macro F1 1.0000'
