"""Scores that are no classification, against scikit-learn and closed forms."""

import jax.numpy as jnp
import numpy as np
from sklearn import metrics

from training import NextToken, SquaredError
from training.scores import TopClasses, next_token_loss, squared_error


def _totals(scores, outputs, batch, cuts):
  """The sums of totals over parts of a batch."""
  parts = np.split(np.arange(len(outputs)), cuts)
  found = [
    scores.totals(outputs[part], {name: leaf[part] for name, leaf in batch.items()})
    for part in parts
  ]
  return {name: sum(np.asarray(f[name], float) for f in found) for name in found[0]}


def test_regression_is_that_of_scikit_learn(x64):
  rng = np.random.default_rng(0)
  outputs, targets = rng.normal(size=(9, 2)), rng.normal(size=(9, 2))
  weights = np.array([1.0] * 7 + [0.0] * 2)
  batch = {'labels': targets, 'weights': weights}
  real = slice(0, 7)
  scores = SquaredError()
  errors = scores.of_examples(outputs, batch)
  expected = metrics.mean_absolute_error(targets[real], outputs[real])
  np.testing.assert_allclose((weights * errors).sum() / 7, expected)
  losses = squared_error(outputs, batch)
  mean = metrics.mean_squared_error(targets[real], outputs[real])
  np.testing.assert_allclose((weights * losses).sum() / 7, mean / 2)
  found = scores.summarize(_totals(scores, outputs, batch, [4]))
  np.testing.assert_allclose(found['root_mean_squared_error'], np.sqrt(mean))
  # One variance over both outputs: that of a column of all values.
  flat = [array[real].ravel() for array in (targets, outputs)]
  np.testing.assert_allclose(found['r_squared'], metrics.r2_score(*flat))
  assert not scores.main.higher_is_better


def test_constant_targets_have_no_r_squared():
  batch = {'labels': np.ones(3), 'weights': np.ones(3, np.float32)}
  scores = SquaredError()
  found = scores.summarize(_totals(scores, np.zeros(3), batch, []))
  assert found == {'root_mean_squared_error': 1.0, 'r_squared': None}


def test_a_column_of_outputs_does_not_meet_a_row_of_targets():
  # (B, 1) against (B,) would broadcast to (B, B).
  try:
    squared_error(jnp.zeros((3, 1)), {'labels': jnp.zeros(3)})
  except ValueError as error:
    assert 'drops its last axis' in str(error)
  else:
    raise AssertionError('shapes that broadcast were accepted')


def test_next_tokens(x64):
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(size=(4, 3, 5)), rng.integers(0, 5, (4, 3))
  batch = {'labels': labels, 'weights': np.array([1.0, 1.0, 1.0, 0.0])}
  probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  each = -np.log(np.take_along_axis(probabilities, labels[..., None], -1)[..., 0])
  np.testing.assert_allclose(next_token_loss(logits, batch), each.mean(1))
  scores = NextToken()
  right = (logits.argmax(-1) == labels).mean(1)
  np.testing.assert_allclose(scores.of_examples(logits, batch), right)
  found = scores.summarize(_totals(scores, logits, batch, [2]))
  np.testing.assert_allclose(found['perplexity'], np.exp(each[:3].mean()))


def test_the_first_of_many_classes_are_those_of_scikit_learn():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(60, 30)), rng.integers(0, 29, 60)
  logits[:20] += 2 * np.eye(30)[labels[:20]]
  weights = np.array([1.0] * 50 + [0.0] * 10, np.float32)
  batch, real = {'labels': labels, 'weights': weights}, slice(0, 50)
  scores = TopClasses(30)
  found = scores.summarize(_totals(scores, logits, batch, [7, 30]))
  expected = metrics.top_k_accuracy_score(
    labels[real], logits[real], k=5, labels=range(30)
  )
  np.testing.assert_allclose(found['top_5_accuracy'], expected)
  predicted = logits[real].argmax(1)
  balanced = np.mean(
    [(predicted == c)[labels[real] == c].mean() for c in set(labels[real])]
  )
  np.testing.assert_allclose(found['balanced_accuracy'], balanced)
  assert found['recalls']['29'] is None and len(found['recalls']) == 30
  right = np.asarray(scores.of_examples(logits, batch))
  np.testing.assert_array_equal(right[real], predicted == labels[real])


def test_of_equal_logits_the_first_class_is_taken():
  batch = {'labels': np.array([0, 4, 5]), 'weights': np.ones(3, np.float32)}
  totals = TopClasses(9).totals(jnp.zeros((3, 9)), batch)
  assert totals['right'].tolist() == [1] + [0] * 8
  assert totals['among_first'].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0]
