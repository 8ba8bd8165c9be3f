"""The command line of populations."""

import json

import pytest

import train
from input_pipelines import DataError
from training import cli, metrics


def _run(*arguments):
  return cli.run(
    train.main,
    ['train.py', '--nocache', '--devices=1', *arguments],
    errors=(DataError,),
  )


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ('--population', '--population has no effect on a single run'),
    ('--population --seeds=2 --mesh=data:8', '--mesh=data:8 splits one network'),
    ('--population_gib=2 --seeds=2', '--population_gib=2.0 has no effect without'),
    ('--population_mapping=map --seeds=2', '--population_mapping=map has no effect'),
    ('--population --population_mapping=pmap --seeds=2', 'choose one of vmap, map'),
    ('--population --population_gib=0 --seeds=2', '--population_gib=0.0: must be a'),
    ('--population --population_gib=1e-9 --seeds=2', 'one member needs'),
    ('--population --seeds=2 --track=edges', '--track is for a single run'),
    ('--population --seeds=2 --measure=eigenvalues', '--measure is for a single run'),
    ('--population --seeds=2 --coordinator=cluster', 'trains in one process'),
    ('--population --batch_size=8,16', 'no two of these runs share a program'),
    ('--population --optimizer=sam --rho=.1,nan', '--rho=nan: must be a finite'),
  ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, capsys):
  workdir = tmp_path / 'run'
  assert _run(f'--workdir={workdir}', *arguments.split()) == 2
  out, error = capsys.readouterr()
  assert words in error
  assert error.startswith('train.py: ') and error.count('\n') == 1
  assert not workdir.exists() and not out


@pytest.mark.slow
def test_a_population_ends_as_the_sweep_of_its_runs(tmp_path, capsys):
  """Two programs, as radius 0 is one of its own; both run once."""
  flags = ['--optimizer=sam', '--rho=0,.1', '--seeds=2', '--epochs=2']
  flags += ['--batch_size=200', '--notiming']
  found = {}
  for kind in ('population', 'nopopulation'):
    folder = f'--workdir={tmp_path / kind}'
    assert _run(*flags, folder, f'--{kind}') == 0
    found[kind] = json.loads((tmp_path / kind / 'sweep.json').read_text())
    printed = capsys.readouterr().out
    assert printed.count(' runs share a program') == 2 * (kind == 'population')
  ours, theirs = found.values()
  assert ours.keys() == theirs.keys() and ours['runs'].keys() == theirs['runs'].keys()
  for a, b in zip(ours['rows'], theirs['rows'], strict=True):
    numbers = {name: x for name, x in b.items() if isinstance(x, float)}
    assert {'test_loss', 'lambda_max', 'lambda_max_error'} <= numbers.keys()
    assert {n: a[n] for n in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)
  for name in ours['runs']:
    a, b = (metrics.read(tmp_path / kind / name) for kind in found)
    assert [list(line) for line in a] == [list(line) for line in b]
    assert [x['perturbed_loss'] == 0 for x in a] == [
      x['perturbed_loss'] == 0 for x in b
    ]
  assert _run(*flags, f'--workdir={tmp_path / "population"}', '--population') == 0
  printed = capsys.readouterr().out
  assert 'epoch ' not in printed and 'share a program' not in printed
