"""Scores of each class against scikit-learn, and where a run writes them."""

import json

import numpy as np
import pytest
from sklearn import metrics

from training import Classification, Config, loop, summary
from training.scores import classification as classes

CONFUSION = np.array([[5, 1, 0, 2], [0, 7, 1, 0], [2, 0, 3, 4], [1, 1, 1, 9]])


def test_scores_are_those_of_scikit_learn():
  rows, columns = np.indices(CONFUSION.shape)
  true = np.repeat(rows.ravel(), CONFUSION.ravel())
  predicted = np.repeat(columns.ravel(), CONFUSION.ravel())
  precision, recall, f1, examples = metrics.precision_recall_fscore_support(
    true, predicted
  )
  found = classes.scores(CONFUSION, ['a', 'b', 'c', 'd'])
  by_name = lambda name: [entry[name] for entry in found['classes']]
  assert by_name('name') == ['a', 'b', 'c', 'd']
  assert by_name('examples') == examples.tolist()
  np.testing.assert_allclose(by_name('precision'), precision)
  np.testing.assert_allclose(by_name('recall'), recall)
  np.testing.assert_allclose(by_name('f1'), f1)
  np.testing.assert_allclose(by_name('predicted'), CONFUSION)
  np.testing.assert_allclose(found['macro_f1'], f1.mean())
  expected = metrics.balanced_accuracy_score(true, predicted)
  np.testing.assert_allclose(found['balanced_accuracy'], expected)


def test_what_cannot_be_said_is_left_out_of_the_means():
  found = classes.scores(np.array([[2, 0, 2], [0, 0, 0], [0, 0, 4]]))
  absent = found['classes'][1]
  assert absent['recall'] is absent['precision'] is absent['f1'] is None
  assert found['balanced_accuracy'] == 0.75
  np.testing.assert_allclose(found['macro_f1'], (2 / 3 + 0.8) / 2)


def test_confusion_counts_weights():
  logits = np.array([[3.0, 1.0], [0.0, 2.0], [0.0, 2.0], [5.0, 0.0]])
  labels, weights = np.array([0, 0, 1, 0]), np.array([1, 1, 1, 0], np.float32)
  batch = {'labels': labels, 'weights': weights}
  found = Classification(2).totals(logits, batch)
  np.testing.assert_array_equal(found['confusion'], [[1, 1], [0, 1]])


@pytest.mark.parametrize('num_devices', [1, 4])
def test_a_run_writes_scores_and_picture(small, tmp_path, num_devices):
  config = Config(optimizer='sgd', base_optimizer='sgd', epochs=1, batch_size=8)
  names = ('left', 'middle', 'right')
  problem = small.problem()._replace(scores=Classification(3, names))
  loop.train(config, problem, tmp_path, num_devices=num_devices)
  found = json.loads((tmp_path / 'summary.json').read_text())
  scores = found['test_scores']
  rows = np.array([entry['predicted'] for entry in scores['classes']])
  labels = next(problem.test.batches(13).epoch(0))['labels']
  assert rows.sum(axis=1).tolist() == np.bincount(labels, minlength=3).tolist()
  np.testing.assert_allclose(np.trace(rows) / 13, found['final']['test_accuracy'])
  assert [entry['name'] for entry in scores['classes']] == ['left', 'middle', 'right']
  assert (tmp_path / 'confusion.png').stat().st_size > 1000
  assert f'macro F1 {scores["macro_f1"]:.4f}' in summary.describe(found)


def test_many_classes_are_drawn_without_counts(tmp_path):
  found = classes.scores(np.eye(60))
  classes.draw(tmp_path, found, 'sixty')
  assert (tmp_path / 'confusion.png').is_file()


def test_names_that_the_font_lacks_bring_no_warning(tmp_path):
  found = classes.scores(np.eye(2), ['\u732b', '\u72ac'])
  classes.draw(tmp_path, found, 'two')  # Warnings are errors here.
