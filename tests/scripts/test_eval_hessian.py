"""The command line of eval_hessian.py, on runs of train.py."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import eval_hessian
import tasks
import train
from input_pipelines import DataError
from training import cli, sharpness, summary
from training import config as config_lib
from training.errors import UsageError

_FAST = (
  '--top_k=2',
  '--tol=1e-3',
  '--num_matvecs=8',
  '--num_probes=2',
  '--trace_matvecs=4',
  '--landscape_points=3',
  '--one_batch_repeats=2',
  '--num_examples=200',
)


def _run(*arguments):
  return cli.run(
    eval_hessian.main,
    ['eval_hessian.py', '--nocache', *arguments],
    errors=(DataError,),
  )


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """SGD with two seeds and SAM with one, for two epochs."""
  folder = tmp_path_factory.mktemp('runs')
  for name, flags in {
    'sgd_0': ['--optimizer=sgd'],
    'sgd_1': ['--optimizer=sgd', '--seed=1'],
    'sam': ['--optimizer=sam'],
  }.items():
    code = cli.run(
      train.main,
      ['train.py', '--nocache', '--devices=1', '--epochs=2', *flags]
      + [f'--workdir={folder / name}'],
    )
    assert code == 0
  return folder


def test_one_run(runs, capsys):
  assert _run(f'--workdir={runs / "sam"}', *_FAST) == 0
  assert 'lambda_max' in capsys.readouterr().out
  found = json.loads((runs / 'sam/hessian/summary.json').read_text())
  assert found['num_examples'] == 200
  assert found['num_parameters'] == 8970
  # The split is evaluated as training evaluated it.
  final = summary.read(runs / 'sam')['final']
  for name in ('train_loss', 'test_loss', 'test_accuracy', 'generalization_gap'):
    assert found['evaluation'][name] == pytest.approx(final[name], abs=1e-5)


def test_several_runs_are_compared_and_seeds_averaged(runs, tmp_path, capsys):
  out = tmp_path / 'compare'
  assert _run(f'--workdir={runs}/s*', f'--out={out}', *_FAST) == 0
  printed = capsys.readouterr().out
  table = (out / 'comparison.md').read_text()
  for words in ('sgd (2 seeds)', 'sam over sgd, rho 0.05', 'lambda_max', 'residual'):
    assert words in table
  assert 'sgd (2 seeds)' in printed
  names = {path.name for path in out.iterdir()}
  assert names == {
    'comparison.md',
    'comparison.json',
    'spectral_density.png',
    'landscape.png',
    'landscape_surface.png',
  }
  results = json.loads((out / 'comparison.json').read_text())
  values = [s['lambda_max'] for s in results['sgd'].values()]
  assert len(values) == 2
  assert f'{np.mean(values):.2f}'[:3] in table


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], '--workdir is missing'),
    (['--workdir=/nowhere'], '/nowhere holds no run'),
    (['--workdir=/nowhere/*'], '/nowhere/* matches no folder'),
    (['--workdir={runs}/sam', '--split=valid'], '--split=valid: choose one of'),
    (['--workdir={runs}/sam', '--num_examples=9999'], 'the train split has 1257'),
    (['--workdir={runs}/sam', '--top_k=9999'], 'k=9999'),
    (['--workdir={runs}/sam', '--topk=3'], "'topk'. Did you mean: top_k"),
    (['--workdir={runs}/sam', '--tol=tight'], '--tol=tight'),
    (['--workdir={runs}/empty'], 'has no checkpoint yet'),
  ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, runs, capsys):
  (runs / 'empty').mkdir(exist_ok=True)
  shutil.copy(runs / 'sam/config.json', runs / 'empty')
  assert _run(*(argument.format(runs=runs) for argument in arguments)) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.startswith('eval_hessian.py: ') and error.count('\n') == 1


def test_a_checkpoint_of_another_model_is_refused(runs):
  def build(config):
    workload = tasks.build(config)
    return workload._replace(model=dataclasses.replace(workload.model, num_classes=7))

  config = config_lib.load(runs / 'sam')
  with pytest.raises(UsageError, match='is of another model'):
    sharpness.restore(runs / 'sam', config, build)


def test_help_names_every_flag(capsys):
  with pytest.raises(SystemExit) as stop:
    eval_hessian.main(['eval_hessian.py', '--help'])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  for field in dataclasses.fields(sharpness.Options):
    assert f'--{field.name}=' in text
