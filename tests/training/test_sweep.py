"""Which runs a sweep makes."""

import dataclasses

import pytest

from training import Config, UsageError, sweep


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
