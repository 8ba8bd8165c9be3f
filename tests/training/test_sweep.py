"""Which runs a sweep makes."""

import dataclasses
import re
from types import SimpleNamespace

import numpy
import pytest

import tasks
from training import Config, UsageError, optimizers, scores, sweep


def _resolve(**fields):
  given = {name: value for name, value in fields.items() if value is not None}
  config = dataclasses.replace(Config(seed=5), **given)
  if config.optimizer == 'sam' and config.rho is None:
    config = dataclasses.replace(config, rho=0.5)
  return config


@pytest.mark.parametrize(
  ('names', 'radii', 'seeds', 'folders'),
  [
    ([None], [None], None, ['']),
    (['sam'], [0.1], None, ['']),
    (['sam'], [0.1, 0.2], None, ['rho_0.1/seed_5', 'rho_0.2/seed_5']),
    (['sam'], [None], 2, ['rho_0.5/seed_5', 'rho_0.5/seed_6']),
    (['sgd'], [None], 2, ['seed_5', 'seed_6']),
    (
      ['sgd', 'sam'],
      [0.1, 0.2],
      1,
      ['sgd/seed_5', 'sam/rho_0.1/seed_5', 'sam/rho_0.2/seed_5'],
    ),
  ],
)
def test_runs_by_folder(names, radii, seeds, folders):
  found = sweep.points(_resolve, names, radii, seeds)
  assert list(found) == folders
  for folder, config in found.items():
    if folder:
      assert folder.endswith(f'seed_{config.seed}')
      assert ('rho' in folder) == (config.rho is not None)


def test_no_seeds_are_refused():
  with pytest.raises(UsageError, match='seeds=0'):
    sweep.points(_resolve, ['sam'], [0.1], 0)


def _grid(**fields):
  return tasks.resolve('digits_mlp', **fields)


@pytest.mark.parametrize(
  ('names', 'radii', 'swept', 'folders'),
  [
    ([None], [None], {'learning_rate': [0.1, 0.3]}, ['learning_rate_0.1/seed_0'] * 2),
    (
      ['sam'],
      [0.1],
      {'batch_size': [16, 32], 'schedule': ['step', 'cosine']},
      ['rho_0.1/batch_size_16/schedule_step/seed_0'] * 4,
    ),
    # What means nothing to an optimizer names no folder of its, and makes one run.
    (
      ['sgd', 'sam', 'looksam'],
      [None],
      {'looksam_every': [2, 5], 'perturb_until': [0.0]},
      [
        'sgd/seed_0',
        'sam/rho_0.05/perturb_until_0/seed_0',
        'looksam/rho_0.05/looksam_every_2/perturb_until_0/seed_0',
        'looksam/rho_0.05/looksam_every_5/perturb_until_0/seed_0',
      ],
    ),
    (
      [None],
      [None],
      {'learning_rate': [0.1234567, 0.1234568]},
      ['learning_rate_0.1234567/seed_0', 'learning_rate_0.1234568/seed_0'],
    ),
  ],
)
def test_other_fields_are_swept(names, radii, swept, folders):
  found = sweep.points(_grid, names, radii, None, swept)
  assert len(found) == len(folders)
  if len({*folders}) > 1:
    assert list(found) == folders
  assert next(iter(found)) == folders[0]
  # Each folder names what its run was made with: read back, it gives the same run.
  for folder, config in found.items():
    for name, values in swept.items():
      (text,) = re.findall(rf'\b{name}_([^/]+)/', folder) or ['']
      actual = optimizers.value(config, name)
      assert (actual is None) == (not text)
      if text:
        assert actual in values and type(actual)(text) == actual
  assert len({str(config) for config in found.values()}) == len(found)


@pytest.mark.parametrize(
  ('names', 'words'),
  [
    (['learning_rate', 'seed'], '--seed=S --seeds=N'),
    (['log_every'], '--log_every has several values, and the results do not depend'),
    (['keep_checkpoints'], 'give one'),
  ],
)
def test_what_cannot_be_swept(names, words):
  with pytest.raises(UsageError, match=words):
    sweep.refuse(names)


def test_too_many_runs_are_refused():
  swept = {'learning_rate': [x / 1000 for x in range(1, 400)]}
  with pytest.raises(UsageError, match='a sweep of 11,970 runs is more than 10,000'):
    sweep.points(_grid, [None], [None], 30, swept)


def test_runs_share_a_problem_where_they_can(tmp_path, monkeypatch):
  """Means and errors against numpy; a problem for each value that one may read."""
  built = []

  def build(config):
    built.append((config.label_smoothing, config.batch_size))
    return SimpleNamespace(
      train=SimpleNamespace(num_examples=100),
      scores=scores.Classification(2),
      example_inputs=(),
    )

  def train(config, problem, workdir):
    value = config.learning_rate * config.batch_size + config.seed**2
    return {'final': {'test_loss': value}}

  monkeypatch.setattr(sweep.loop, 'train', train)
  swept = {'learning_rate': [0.1, 0.3], 'batch_size': [10, 20]}
  configs = sweep.points(_grid, [None], [None], 3, swept)
  found = sweep.run(configs, build, tmp_path, swept=list(swept))
  assert built == [(0.1, 10), (0.1, 20)] * 2
  for row in found['rows']:
    rate, size = row['swept']['learning_rate'], row['swept']['batch_size']
    values = rate * size + numpy.array([0, 1, 4])
    assert row['test_loss'] == pytest.approx(values.mean())
    assert row['test_loss_error'] == pytest.approx(values.std(ddof=1) / 3**0.5)
  assert len(found['rows']) == 4
  configs = sweep.points(_grid, [None], [None], None, {'batch_size': [10, 101]})
  with pytest.raises(UsageError, match='--batch_size=101: .* 100 examples'):
    sweep.run(configs, build, tmp_path)
