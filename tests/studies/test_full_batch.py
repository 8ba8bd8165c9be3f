"""The loss and the start of train.py; commands that go on; commands that cannot be."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tasks
from input_pipelines import DataError
from studies import central_flow, full_batch, gradient_flow
from training import cli, step

TINY = '--model=features=(3,)'


def test_loss_and_start_are_those_of_training(tmp_path):
  """One full-batch step of train.py from the same seed is one step on this loss."""
  config = tasks.resolve(
    'digits_mlp', model='features=(3,)', optimizer='sgd', seed=3, learning_rate=0.2
  )
  full = full_batch.FullBatch(config)
  assert full.num_examples == len(full.batch['labels']) == 1257
  assert full.num_parameters == 64 * 3 + 3 + 3 * 10 + 10
  problem = tasks.build(config)
  stepper = step.Stepper(problem, config, 1)
  state = stepper.init(config.seed)
  jax.tree.map(np.testing.assert_array_equal, full.params, state.params)
  (batch,) = problem.train.batches(1257).epoch(0)
  after, metrics = jax.jit(stepper.train)(state, batch)
  value, gradient = jax.jit(jax.value_and_grad(full.loss))(full.params, full.batch)
  np.testing.assert_allclose(value, metrics['loss'], rtol=1e-6)
  moved = jax.tree.map(lambda w, g: w - 0.2 * g, full.params, gradient)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), moved, after.params
  )


def test_in_float64_the_start_is_the_same():
  config = tasks.resolve('digits_mlp', model='features=(3,)', optimizer='sgd')
  narrow = full_batch.FullBatch(config)
  with jax.enable_x64(True):
    wide = full_batch.FullBatch(config, 'float64')
    loss = wide.loss(jax.device_put(wide.params), wide.batch)
  assert loss.dtype == np.float64
  for leaf in jax.tree.leaves(wide.params):
    assert leaf.dtype == np.float64
  jax.tree.map(np.testing.assert_array_equal, narrow.params, wide.params)
  np.testing.assert_allclose(loss, narrow.loss(narrow.params, narrow.batch), rtol=1e-5)


@pytest.mark.parametrize(
  ('study', 'more'),
  [
    (gradient_flow, ()),
    pytest.param(
      central_flow,
      ('--window=2', '--substeps=2', '--dtype=float64', '--tol=1e-3'),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_command_goes_on_with_more_steps(study, more, tmp_path, capsys):
  run = lambda out, steps: cli.run(
    study.main,
    ['study.py', TINY, '--every=2', f'--steps={steps}', f'--out={out}', *more]
    + ['--nocache'],
  )
  whole, parted = tmp_path / 'whole', tmp_path / 'parted'
  assert run(whole, 6) == 0
  assert run(parted, 2) == 0
  assert run(parted, 6) == 0
  assert 'going on after step 2' in capsys.readouterr().out
  lines = (whole / full_batch.LINES).read_bytes()
  assert (parted / full_batch.LINES).read_bytes() == lines
  assert [json.loads(x)['step'] for x in lines.splitlines()][-3:] == [2, 4, 6]
  results = [json.loads((x / full_batch.RESULT).read_text()) for x in (whole, parted)]
  assert results[0] == results[1]
  assert results[0]['study']['model'] == 'features=(3,)'
  assert (whole / full_batch.FIGURE).stat().st_size > 10_000
  # A study that has ended is only told again, without its data.
  (whole / full_batch.FIGURE).unlink()
  assert run(whole, 6) == 0
  told = capsys.readouterr().out
  assert 'examples' not in told and results[0]['result']['text'] in told
  assert (whole / full_batch.FIGURE).exists()


BOTH = """
--steps=0
--steps=-5
--steps=7
--steps=1.5
--every=0
--every=-1
--every=2000
--learning_rate=0
--learning_rate=-1
--learning_rate=nan
--dtype=bfloat16
--out=
--task=nothing
--model=depth=3
--optimizer=sam
--rho=0.1
--momentum=.9
steps
"""
OWN = {
  gradient_flow: ('--step_times_curvature=0', '--step_times_curvature=3'),
  central_flow: (
    '--window=3',
    '--window=0',
    '--window=22',
    '--substeps=1',
    '--num_eigenvalues=0',
    '--tol=0',
    '--tol=1',
  ),
}
BAD = [
  (study, flag) for study in OWN for flag in (*BOTH.strip().split('\n'), *OWN[study])
]


@pytest.mark.parametrize(('study', 'flag'), BAD)
def test_what_cannot_be_is_one_sentence(study, flag, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.run(study.main, ['study.py', flag]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and error.startswith('study.py: ')
  assert flag.lstrip('-').split('=')[0] in error
  assert not list(tmp_path.iterdir())


AUGMENTED = """
import tasks
RECIPE = tasks.load('digits_mlp').RECIPE
def build(config):
  problem = tasks.load('digits_mlp').build(config)
  return problem._replace(augment=lambda key, inputs: inputs)
"""
NORMALISED = """
import flax.linen as nn
import tasks
class Net(nn.Module):
  @nn.compact
  def __call__(self, inputs, *, train=False):
    x = nn.BatchNorm(use_running_average=not train)(inputs.reshape(len(inputs), -1))
    return nn.Dense(10)(x)
RECIPE = tasks.load('digits_mlp').RECIPE
def build(config):
  return tasks.load('digits_mlp').build(config)._replace(model=Net())
"""


@pytest.mark.parametrize(
  ('source', 'word'), [(AUGMENTED, 'augmented'), (NORMALISED, 'statistics of batches')]
)
def test_a_loss_that_is_no_function_of_the_parameters_is_refused(
  source, word, tmp_path, capsys
):
  task, out = tmp_path / 'own.py', tmp_path / 'out'
  task.write_text(source)
  argv = ['study.py', f'--task={task}', f'--out={out}', '--nocache']
  assert cli.run(gradient_flow.main, argv) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and word in error and str(task) in error


def fails(argv, capsys):
  assert (
    cli.run(gradient_flow.main, ['study.py', TINY, *argv], errors=(DataError,)) == 2
  )
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  return error


def test_a_folder_that_is_not_its_own_is_refused(tmp_path, capsys):
  config = tasks.resolve('digits_mlp', model='features=(3,)', optimizer='sgd')
  out = tmp_path / 'out'
  there = {'name': 'gradient_flow', 'every': 20, 'learning_rate': 0.7}
  full_batch.Journal(out, there).close()
  error = fails([f'--out={out}'], capsys)
  assert f'learning_rate is 0.7 there and {config.learning_rate} here' in error
  assert 'every is' not in error
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'letter.txt').write_text('mine')
  assert 'letter.txt' in fails([f'--out={other}'], capsys)
  (tmp_path / 'file').write_text('')
  assert 'not a folder' in fails([f'--out={tmp_path / "file"}'], capsys)
  assert [p.name for p in other.iterdir()] == ['letter.txt']


def test_a_folder_has_one_process_at_a_time_and_whole_files(tmp_path):
  journal = full_batch.Journal(tmp_path / 'out', {'name': 'test'})
  with pytest.raises(full_batch.UsageError, match='another process'):
    full_batch.Journal(tmp_path / 'out', {'name': 'test'})
  journal.add({'step': 0}, {'w': {'a': jnp.arange(3.0)}})
  journal.close()
  again = full_batch.Journal(tmp_path / 'out', {'name': 'test'})
  assert again.lines == [{'step': 0}]
  np.testing.assert_array_equal(again.state['w']['a'], [0, 1, 2])
  again.close()
  path = tmp_path / 'out' / full_batch.STATE
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(full_batch.UsageError, match='damaged'):
    full_batch.Journal(tmp_path / 'out', {'name': 'test'})
  path.write_bytes(whole)
  (tmp_path / 'out' / full_batch.LINES).write_text('')
  with pytest.raises(full_batch.UsageError, match='lacks lines'):
    full_batch.Journal(tmp_path / 'out', {'name': 'test'})


def test_a_descent_that_diverges_stops_with_its_step(tmp_path):
  full = types.SimpleNamespace(
    loss=lambda w, curvature: 0.5 * jnp.sum(curvature * w**2),
    params=np.ones(2, np.float32),
    batch=np.array([4.0, 1.0], np.float32),
  )
  journal = full_batch.Journal(tmp_path / 'out', {'name': 'test'})
  found = gradient_flow.compare(full, 5.0, [0, 40])
  with pytest.raises(full_batch.TrainingDiverged, match='at step 40: try a lower'):
    full_batch.follow(journal, found, 40, lambda line: '', lambda: None)
  journal.close()
  assert [line['step'] for line in journal.lines] == [0]
