"""The command line of eval_hessian.py, on runs of train.py."""

import dataclasses
import fcntl
import html.parser
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval_hessian
import measurements
import sam_jax
import tasks
import train
from input_pipelines import DataError
from sam_jax import landscape
from training import cli, summary
from training import config as config_lib
from training import problem as problem_lib
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
  '--worst_case_steps=2',
  '--average_case_samples=2',
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
    'adam': ['--optimizer=adam', '--keep_checkpoints=0', '--checkpoint_every=20'],
  }.items():
    code = cli.run(
      train.main,
      ['train.py', '--nocache', '--devices=1', '--epochs=2', *flags]
      + [f'--workdir={folder / name}'],
    )
    assert code == 0
  return folder


def test_one_run(runs, tmp_path, capsys):
  out = tmp_path / 'one'
  assert _run(f'--workdir={runs / "sam"}', f'--out={out}', *_FAST) == 0
  assert '| sam' in (out / 'comparison.md').read_text()
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
    'report.html',
    'spectral_density.png',
    'landscape.png',
    'landscape_surface.png',
  }
  results = json.loads((out / 'comparison.json').read_text())
  values = [s['lambda_max'] for s in results['sgd'].values()]
  assert len(values) == 2
  assert f'{np.mean(values):.2f}'[:3] in table


def test_a_report_needs_no_other_file(runs):
  assert _run(f'--workdir={runs / "sam"}', *_FAST) == 0
  page = (runs / 'sam/hessian/report.html').read_text()
  assert page.count('src="data:image/png;base64,') == 2
  assert page.count('src=') == 2 and 'href=' not in page
  found = json.loads((runs / 'sam/hessian/summary.json').read_text())
  assert f'{found["lambda_max"]:.6g}' in page
  parser = _Balanced()
  parser.feed(page)
  assert parser.open == []


class _Balanced(html.parser.HTMLParser):
  """Checks that every element that is opened is closed."""

  def __init__(self):
    super().__init__()
    self.open = []

  def handle_starttag(self, tag, attrs):
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_a_regression_is_measured_and_compared(tmp_path):
  workdir, out = tmp_path / 'run', tmp_path / 'compare'
  flags = ['--task=diabetes_mlp', '--epochs=2', '--optimizer=sam', '--devices=1']
  flags += ['--measure=eigenvalues', f'--workdir={workdir}']
  assert cli.run(train.main, ['train.py', '--nocache', *flags]) == 0
  only = '--measure=evaluation,eigenvalues'
  assert _run(f'--workdir={workdir}', f'--out={out}', only, '--top_k=1') == 0
  found = json.loads((workdir / 'hessian/summary.json').read_text())
  final = summary.read(workdir)['final']
  for name in ('train_absolute_error', 'test_absolute_error', 'test_loss'):
    assert found['evaluation'][name] == pytest.approx(final[name], abs=1e-5)
  assert '| test absolute error |' in (out / 'comparison.md').read_text()
  # The last line that training wrote tells the same lambda_max.
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  told = [line for line in map(json.loads, lines) if line['split'] == 'eigenvalues']
  assert [line['step'] for line in told] == [0, 10, 20]
  assert told[-1]['lambda_max'] == pytest.approx(found['lambda_max'], rel=1e-3)


@pytest.mark.slow
def test_a_new_measurement_leaves_nothing_of_the_old_one(runs):
  workdir = runs / 'sgd_1'
  assert _run(f'--workdir={workdir}', *_FAST) == 0
  assert (workdir / 'hessian/landscape.png').exists()
  flags = ['--landscape_points=0', '--operator=fisher', '--max_num_matvecs=5']
  assert _run(f'--workdir={workdir}', *_FAST, *flags) == 0
  assert not (workdir / 'hessian/landscape.png').exists()
  page = (workdir / 'hessian/report.html').read_text()
  assert 'The matrix A is the empirical Fisher matrix of the loss' in page
  assert page.count('data:image/png') == 1
  found = json.loads((workdir / 'hessian/summary.json').read_text())
  # Too few products for four pairs, and a matrix with many zeros.
  assert not found['all_converged']
  assert found['lambda_max_over_abs_lambda_min'] is None


def test_one_process_measures_at_a_time(runs, capsys):
  folder = runs / 'sgd_0/hessian'
  folder.mkdir(exist_ok=True)
  with (folder / '.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert _run(f'--workdir={runs / "sgd_0"}', *_FAST, '--seed=5') == 2
  assert 'another process is measuring into' in capsys.readouterr().err


def test_folders_that_cannot_be_written_are_named_first(runs, tmp_path, capsys):
  (tmp_path / 'file').touch()
  out = f'--out={tmp_path / "file"}'
  assert _run(f'--workdir={runs / "sgd_0"},{runs / "sam"}', out) == 2
  printed = capsys.readouterr()
  assert 'cannot be written' in printed.err and not printed.out


def test_ctrl_c_says_how_to_go_on(capsys):
  def main(argv):
    raise KeyboardInterrupt

  assert cli.run(main, ['eval_hessian.py']) == 130
  assert 'the same command goes on' in capsys.readouterr().err


def test_several_steps_of_one_run(runs, capsys, monkeypatch):
  flags = [*_FAST, '--measure=evaluation,adaptive_sharpness,eigenvalues']
  built = []
  build = tasks.build
  monkeypatch.setattr(tasks, 'build', lambda c: built.append(c) or build(c))
  assert _run(f'--workdir={runs / "adam"}', '--steps=20,40', *flags) == 0
  assert len(built) == 1
  table = capsys.readouterr().out
  entries = json.loads((runs / 'adam/hessian/over_training.json').read_text())
  assert [entry['step'] for entry in entries] == [20, 40]
  assert (runs / 'adam/hessian/over_training.png').exists()
  for entry in entries:
    assert f'{entry["lambda_max"]:.5g}' in table
    step = json.loads(
      (runs / f'adam/hessian/step_{entry["step"]:08d}/summary.json').read_text()
    )
    assert step['step'] == entry['step'] and step['lambda_max'] == entry['lambda_max']
  assert _run(f'--workdir={runs / "adam"}', '--steps=7') == 2
  assert 'has no checkpoint of step 7: it has 20, 40' in capsys.readouterr().err


@pytest.mark.slow
def test_the_landscape_along_a_trajectory(runs):
  flags = [*_FAST, '--landscape_directions=trajectory', '--vtk']
  assert _run(f'--workdir={runs / "adam"}', *flags) == 0
  drawn = landscape.load(runs / 'adam/hessian/landscape.npz')
  np.testing.assert_allclose(drawn.path[-1], 0, atol=1e-12)
  assert len(drawn.path) >= 3 and 0 < sum(drawn.explained) <= 1 + 1e-12
  assert (runs / 'adam/hessian/landscape.vtk').exists()


@pytest.mark.slow
def test_the_line_to_another_run(runs):
  flags = [*_FAST, f'--landscape_towards={runs / "sgd_1"}']
  assert _run(f'--workdir={runs / "sgd_0"}', *flags) == 0
  line = landscape.load(runs / 'sgd_0/hessian/line.npz')
  at_other = line.loss[np.argmin(np.abs(line.x - 1))]
  # 200 examples here, all of them there.
  train_loss = summary.read(runs / 'sgd_1')['final']['train_loss']
  assert at_other == pytest.approx(train_loss, rel=0.3)
  found = json.loads((runs / 'sgd_0/hessian/summary.json').read_text())
  assert found['line']['barrier'] > 0


@pytest.mark.slow
def test_adams_preconditioner_is_that_of_its_checkpoint(runs):
  flags = [*_FAST, '--preconditioner=adam', '--landscape_points=0']
  assert _run(f'--workdir={runs / "adam"}', *flags) == 0
  found = json.loads((runs / 'adam/hessian/summary.json').read_text())
  config = config_lib.load(runs / 'adam')
  network = measurements.restore(runs / 'adam', config, tasks.build(config))
  arrays = {k.split('nu/')[1]: v for k, v in network.arrays.items() if '/nu/' in k}
  count = network.step
  batch = next(network.problem.train.batches(10**6, seed=0).epoch(0))
  chosen = {name: leaf[:200] for name, leaf in batch.items()}

  def loss(params, batch):
    return problem_lib.loss(network.problem, params, network.batch_stats, batch)[0]

  def scale(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    second = np.sqrt(arrays[name] / (1 - 0.999**count)) + 1e-8
    return (1 - 0.9**count) ** -0.5 * second**-0.5

  scales = jax.tree_util.tree_map_with_path(scale, network.params)
  product = jax.jit(
    lambda v: jax.tree.map(
      jnp.multiply,
      scales,
      sam_jax.hvp(
        lambda p: loss(p, chosen),
        network.params,
        jax.tree.map(jnp.multiply, scales, v),
      ),
    )
  )
  vector = jax.tree.map(jnp.ones_like, network.params)
  for _ in range(300):
    image = product(vector)
    norm = np.sqrt(sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(image)))
    vector = jax.tree.map(lambda x, n=norm: x / n, image)
  assert found['lambda_max'] == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], '--workdir is missing'),
    (['--workdir=/nowhere'], '/nowhere holds no run'),
    (['--workdir=/nowhere/*'], '/nowhere/* matches no folder'),
    (['--workdir={runs}/sam', '--landscape_points=1'], '--landscape_points=1: must'),
    (['--workdir={runs}/sam', '--measure=sharpness'], '--measure=sharpness: choose'),
    (['--workdir={runs}/sam', '--measure='], '--measure= has an empty entry'),
    (['--workdir={runs}/sam', '--split=valid'], '--split=valid: choose one of'),
    (['--workdir={runs}/sam', '--num_examples=9999'], 'the train split has 1257'),
    (['--workdir={runs}/sam', '--top_k=9999'], '--top_k=9999: only 8970 parameters'),
    (['--workdir={runs}/sam', '--topk=3'], "'topk'. Did you mean: top_k"),
    (['--workdir={runs}/sam', '--tol=tight'], '--tol=tight'),
    (['--workdir={runs}/empty'], 'has no checkpoint yet'),
    (['--workdir={runs}/empty', '--steps=all'], 'has no checkpoint yet'),
    (['--workdir={runs}/sam', '--steps=all', '--out=c'], '--out=c is for the comp'),
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
  config = config_lib.load(runs / 'sam')
  problem = tasks.build(config)
  other = problem._replace(model=dataclasses.replace(problem.model, num_classes=7))
  with pytest.raises(UsageError, match='is of another model'):
    measurements.restore(runs / 'sam', config, other)


def test_help_names_every_flag(capsys):
  with pytest.raises(SystemExit) as stop:
    eval_hessian.main(['eval_hessian.py', '--help'])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  for field in dataclasses.fields(measurements.Options):
    assert f'{field.name}' in text


_STACKED = """
import flax.linen as nn
import numpy as np

import training
from input_pipelines import ArraySplit
from training import scores

RECIPE = training.Config(
  optimizer='sgd', base_optimizer='sgd', epochs=1, batch_size=8, label_smoothing=0.0,
)


class Layers(nn.Module):
  @nn.compact
  def __call__(self, x, *, train=False):
    for kernel in self.param('kernel', nn.initializers.normal(), (2, 3, 3)):
      x = nn.tanh(x @ kernel)
    return x[:, 0]


def build(config):
  x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
  split = ArraySplit(x, x[:, 0])
  return training.Problem(
    model=Layers(), train=split, test=split, example_losses=scores.squared_error,
    scores=scores.SquaredError(), example_inputs=x[:1],
  )
"""


def test_filters_that_are_not_known_are_refused(tmp_path, capsys):
  task, workdir = tmp_path / 'stacked.py', f'--workdir={tmp_path / "run"}'
  task.write_text(_STACKED)
  flags = ['--nocache', '--devices=1', workdir, f'--task={task}']
  assert cli.run(train.main, ['train.py', *flags]) == 0
  capsys.readouterr()
  flags = [workdir, '--measure=landscape', '--landscape_points=2']
  assert _run(*flags) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert '--landscape_directions=filter: what the filters of kernel are cannot' in error
  assert not (tmp_path / 'run/hessian/summary.json').exists()
  assert error.endswith('give --landscape_directions=layer.\n')
  assert _run(*flags, '--landscape_directions=layer') == 0


def test_the_task_of_the_docs(tmp_path, capsys):
  """Two parameters: what is asked for by default is refused, and how it is mended."""
  text = (pathlib.Path(train.__file__).parent / 'docs' / 'tasks.md').read_text()
  task, workdir = tmp_path / 'my_task.py', f'--workdir={tmp_path / "run"}'
  task.write_text(re.search('```python\n(.*?)```', text, re.DOTALL)[1])
  flags = ['--nocache', '--devices=1', workdir, f'--task={task}', '--optimizer=sam']
  assert cli.run(train.main, ['train.py', *flags]) == 0
  capsys.readouterr()
  for flags, words in (
    ([], '--top_k=5: only 2 parameters are measured; give at most that.'),
    (['--top_k=2'], 'of 2 parameters 1 would be moved; give --landscape_biases to'),
  ):
    assert _run(workdir, *flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1
  mended = re.search('that is `(--top_k.*)`', text)[1].split()
  fast = [flag for flag in _FAST if not flag.startswith(('--top_k', '--num_ex'))]
  assert _run(workdir, *fast, *mended) == 0


@pytest.mark.slow
def test_members_of_a_population_are_runs_like_others(tmp_path):
  """Two members, measured side by side and averaged over their seeds."""
  flags = ['--optimizer=sam', '--seeds=2', '--epochs=1', '--batch_size=200']
  command = ['train.py', '--nocache', '--devices=1', *flags, '--population']
  assert cli.run(train.main, [*command, f'--workdir={tmp_path}']) == 0
  out = tmp_path / 'compared'
  runs = f'{tmp_path}/rho_0.05/seed_*'
  assert _run(f'--workdir={runs}', f'--out={out}', *_FAST) == 0
  assert '(2 seeds)' in (out / 'comparison.md').read_text()
