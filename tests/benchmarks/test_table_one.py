"""The script of Table I: what it starts, and the table it writes."""

import json

import numpy as np
import pytest

import tasks
from benchmarks import table_one
from input_pipelines.labelled_arrays import LabelledArrays


def _finish(folder, number):
  """Writes what a run and its measurement leave behind."""
  (folder / 'hessian').mkdir(parents=True)
  final = {'test_loss': 0.3 + number, 'test_accuracy': 0.9}
  (folder / 'summary.json').write_text(json.dumps({'final': final}))
  lines = [
    {'step': step, 'split': split, 'loss': 0.1 * step, 'accuracy': 0.5}
    for step in (1, 2)
    for split in ('train', 'test')
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  hessian = {
    'one_batch': {'ratio_median': 20.0 + 2 * number},
    'lambda_max': 5.0,
    'lambda_max_over_abs_lambda_min': 40.0,
  }
  (folder / 'hessian' / 'summary.json').write_text(json.dumps(hessian))


@pytest.fixture
def started(monkeypatch):
  """The commands that were started; training leaves a finished run."""
  commands = []

  def run(script, flags):
    commands.append((script, list(flags)))
    if script == 'train.py':
      given = dict(flag.removeprefix('--').split('=', 1) for flag in flags)
      folder = table_one.pathlib.Path(given['workdir'])
      _finish(folder, int(given['seed']))

  monkeypatch.setattr(table_one, '_run', run)
  return commands


def test_two_networks_are_trained_measured_and_tabled(tmp_path, started, capsys):
  table_one.main(
    [f'--out={tmp_path}', f'--manual_dir={tmp_path}', '--rows=attention,gcn']
    + ['--seeds=2', '--epochs=3', '--dtype=bfloat16', '--hessian_examples=500']
  )
  scripts = [script for script, _ in started]
  assert scripts == ['train.py'] * 8 + ['eval_hessian.py'] * 2
  first, asam = started[0][1], started[2][1]
  assert '--task=mitbih_attention' in first and '--optimizer=momentum' in first
  assert {'--epochs=3', '--dtype=bfloat16', f'--manual_dir={tmp_path}'} <= set(first)
  assert {'--optimizer=asam', '--rho=1', '--seed=0'} <= set(asam)
  workdirs = [flag for flag in started[8][1] if flag.startswith('--workdir=')]
  assert len(workdirs[0].split(',')) == 4 and '--num_examples=500' in started[8][1]
  lines = (tmp_path / 'table_one.md').read_text().splitlines()
  assert lines[0] == '# Table I, epochs 3, dtype bfloat16, hessian_examples 500'
  rows = [line.split(' | ') for line in lines if line.startswith('| ')][2:]
  assert {len(row) for row in rows} == {9}
  published = ['0.0770', '96.31', '0.1204', '94.64', '16.8', '-', '- |']
  assert rows[0] == ['| attention SGD', 'published', *published]
  assert rows[1][:2] == ['| attention SGD', 'ours, 2 seeds']
  # Means of the two seeds with their standard errors.
  assert rows[1][2:5] == ['0.2000 ± 0.0000', '50.00 ± 0.00', '0.8000 ± 0.5000']
  assert rows[1][6:] == ['21.0 ± 1.0', '5 ± 0', '40.0 ± 0.0 |']
  assert lines[2] in capsys.readouterr().out


def test_a_dry_run_takes_few_real_examples(tmp_path, started, monkeypatch):
  labels = np.repeat(np.arange(10), 100)
  part = {'inputs': np.zeros((1000, 32, 32, 3), np.uint8), 'labels': labels}
  parts = {'train': part, 'test': part}
  classes = table_one.cifar10.CLASSES
  load = lambda **folders: LabelledArrays(parts, classes)
  monkeypatch.setattr(table_one.cifar10, 'load_arrays', load)
  table_one.main([f'--out={tmp_path}', '--rows=wrn', '--dry_run'])
  flags = started[0][1]
  assert '--epochs=1' in flags and f'--manual_dir={tmp_path / "data"}' in flags
  assert any(flag.startswith('--model=') for flag in flags)
  assert (tmp_path / 'table_one.md').read_text().startswith('# Table I, dry run')
  with np.load(tmp_path / 'data' / 'cifar10.npz') as file:
    np.testing.assert_array_equal(np.bincount(file['train/labels']), [60] * 10)


def test_unknown_rows_are_refused(capsys):
  with pytest.raises(SystemExit) as caught:
    table_one.main(['--rows=wrn,cnn'])
  assert caught.value.code == 2
  assert '--rows has cnn: choose from wrn' in capsys.readouterr().err


@pytest.mark.parametrize('row', table_one._ROWS, ids=lambda row: row.name)
def test_rows_train_with_the_published_settings(row):
  flags = dict(flag.removeprefix('--').split('=', 1) for flag in row.flags)
  radius = float(flags['rho']) if 'rho' in flags else None
  config = tasks.resolve(
    table_one._TASKS[row.network], optimizer=flags['optimizer'], rho=radius
  )
  base = 'adam' if row.network == 'gcn' else 'momentum'
  assert (config.base_optimizer, config.rho) == (base, radius)
  if config.optimizer == 'asam':  # |w| of every parameter, as in the paper's code
    assert config.hyperparameters == {'weights': 'all', 'eta': 0.0}
