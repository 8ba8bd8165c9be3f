"""Configurations: validation, files, and whose workdir it is."""

import dataclasses
import json
import math

import pytest

from training import Config, UsageError
from training import config as config_lib


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('rho', -0.1),
    ('rho', math.nan),
    ('learning_rate', math.inf),
    ('learning_rate', -1.0),
    ('weight_decay', -1.0),
    ('epochs', 0),
    ('batch_size', 0),
    ('schedule', 'exponential'),
    ('dtype', 'float16'),
    ('momentum', 1.0),
    ('label_smoothing', 1.0),
    ('warmup_epochs', 50.0),
    ('m_sharpness', -1),
    ('grad_accum_steps', 0),
    ('grad_accum_steps', 3),
    ('seed', -1),
    ('checkpoint_every', -1),
    ('clip_norm', -1.0),
  ],
)
def test_a_bad_value_is_named(field, value):
  with pytest.raises(UsageError, match=f'^--{field}={value}: .*\\.$'):
    config_lib.validate(dataclasses.replace(Config(), **{field: value}))


def test_the_default_is_valid_and_survives_its_file(tmp_path):
  config = Config(optimizer='sam', rho=0.1, learning_rate=1e-3)
  config_lib.validate(config)
  config_lib.save(config, tmp_path)
  assert config_lib.load(tmp_path) == config
  written = json.loads((tmp_path / 'config.json').read_text())
  assert {'python', 'jax', 'flax', 'optax'} <= set(written['versions'])


def test_a_foreign_workdir_is_refused_with_the_differing_fields(tmp_path):
  config_lib.claim(Config(optimizer='sam', rho=0.1), tmp_path / 'run').close()
  with pytest.raises(UsageError) as caught:
    config_lib.check(Config(optimizer='sam', rho=0.2, seed=3), tmp_path / 'run')
  message = str(caught.value)
  assert 'rho is 0.1 there and 0.2 here' in message
  assert 'seed is 0 there and 3 here' in message
  assert 'optimizer' not in message


def test_where_the_data_lies_may_change(tmp_path):
  config_lib.claim(Config(manual_dir='/here'), tmp_path).close()
  config_lib.check(Config(manual_dir='/there', checkpoint_every=5), tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('all of it')
  with pytest.raises(UsageError, match='not empty .*thesis.tex'):
    config_lib.check(Config(), tmp_path)


def test_a_file_is_no_workdir(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='not a folder'):
    config_lib.check(Config(), tmp_path / 'file')


@pytest.mark.parametrize('text', ['', '{"config": {"se', '{}', '[]', '{"config": 3}'])
def test_a_damaged_config_is_named(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UsageError, match='config.json is damaged'):
    config_lib.load(tmp_path)


def test_fields_of_a_later_version_are_refused(tmp_path):
  (tmp_path / 'config.json').write_text(
    '{"format": 2, "config": {"seed": 1, "colour": "red"}}'
  )
  with pytest.raises(UsageError, match='colour'):
    config_lib.load(tmp_path)
  text = '{"format": 2, "config": {"seed": 1}}'
  (tmp_path / 'config.json').write_text(text)
  assert config_lib.load(tmp_path).seed == 1
  (tmp_path / 'config.json').write_text(text.replace('2', '99'))
  with pytest.raises(UsageError, match='has the format 99, this version knows 2'):
    config_lib.load(tmp_path)


# Written by version 0.1, which had a field for each argument of each method.
_FORMAT_1 = {
  'task': 'digits_mlp',
  'base_optimizer': 'sgd',
  'batch_size': 32,
  'm_sharpness': 0,
  'sync_perturbation': False,
  'adaptive_eta': 0.01,
  'adaptive_rule': 'weights',
  'num_ascent_steps': 1,
  'gsam_alpha': 0.4,
  'gsam_rho_min': None,
  'wsam_gamma': 0.9,
  'looksam_every': 3,
  'looksam_alpha': 0.7,
  'friendly_sigma': 1.0,
  'friendly_decay': 0.9,
  'esam_beta': 0.5,
  'esam_gamma': 0.5,
  'graphsam_beta': 0.99,
  'graphsam_gamma': 0.5,
  'graphsam_epochs': 1,
  'universal_lam': None,
  'num_probes': 0,
  'antithetic': False,
  'det_half_width': 0.01,
}


@pytest.mark.parametrize(
  ('fields', 'hyperparameters', 'm_sharpness'),
  [
    ({'optimizer': 'sgd', 'rho': None}, {}, None),
    ({'optimizer': 'sam', 'm_sharpness': 8}, {'num_ascent_steps': 1}, 8),
    ({'optimizer': 'looksam'}, {'every': 3, 'alpha': 0.7}, 32),
    ({'optimizer': 'asam', 'adaptive_rule': 'all'}, {'weights': 'all'}, 32),
    ({'optimizer': 'frob_sam'}, {'lam': 0.005, 'num_probes': None}, 32),
    ({'optimizer': 'trace_sam', 'num_probes': 4}, {'num_probes': 4}, 32),
    ({'optimizer': 'gsam', 'gsam_rho_min': 0.01}, {'rho_min': 0.01}, 32),
  ],
)
def test_format_1_is_read(tmp_path, fields, hyperparameters, m_sharpness):
  stored = {'config': {**_FORMAT_1, 'rho': 0.05, **fields}}
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  config = config_lib.load(tmp_path)
  assert config.m_sharpness == m_sharpness
  assert config.hyperparameters.items() >= hyperparameters.items()
  assert bool(config.hyperparameters) == bool(hyperparameters)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'optimizer': 'adam', 'base_optimizer': 'adam'}, 'digits_mlp: adam, seed 3'),
    (
      {'optimizer': 'sam', 'base_optimizer': 'momentum', 'rho': 0.05},
      'digits_mlp: sam over momentum, rho 0.05, seed 3',
    ),
    (
      {'task': '/a/mine.py', 'optimizer': 'b/own.py', 'base_optimizer': 'sgd'},
      'mine: own over sgd, seed 3',
    ),
  ],
)
def test_a_title_names_task_method_base_radius_and_seed(fields, words):
  assert config_lib.title(Config(seed=3, **{'task': 'digits_mlp', **fields})) == words
