"""Reports of result files: those of today, of earlier versions, and partial ones."""

import dataclasses
import json

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import training
from measurements.measurement import Figure as Source
from measurements.measurement import Measurement
from reports import comparison, over_training, sweep

# As it was written before a summary named its score and its measurements.
_EARLIER = {
  **dict.fromkeys(('optimizer', 'base_optimizer'), 'sgd'),
  **{'operator': 'hessian', 'preconditioner': 'none', 'params_regex': ''},
  **{'seed': 0, 'step': 40, 'split': 'train', 'num_examples': 100},
  **{'batch_norm': 'eval', 'dtype': 'float32', 'num_parameters': 10},
  **{'lambda_max': 4.25, 'lambda_max_residual': 1e-6, 'lambda_min': 0.0},
  **{'lambda_max_standard_error': 0.21, 'lambda_min_residual': 1e-6},
  **{'lambda_min_standard_error': 0.01, 'lambda_1_over_lambda_5': None},
  **{'lambda_max_over_abs_lambda_min': None, 'all_converged': True},
  **{'lambda_max_over_abs_lambda_min_standard_error': None},
  **{'adaptive_sharpness': 0.5, 'adaptive_sharpness_converged': False},
  **{'trace': 39.0, 'trace_standard_error': 0.9, 'layers': None, 'one_batch': None},
  **{'worst_case_sharpness': None, 'worst_case_sharpness_standard_error': None},
  **{'average_case_sharpness': 0.002, 'average_case_sharpness_standard_error': 2e-4},
  'options': {'adaptive_ball': False, 'average_case_sigma': 0.01},
  'evaluation': {
    **{'train_loss': 0.2, 'train_accuracy': 0.958, 'test_loss': 0.24},
    **{'test_accuracy': 0.93, 'generalization_gap': 0.04},
  },
  **{'num_matvecs': 600, 'seconds': 9.0},
}
_FACTS = ('operator', 'preconditioner', 'params_regex', 'seed', 'step', 'split')
_FACTS += ('num_examples', 'batch_norm', 'dtype', 'num_parameters', 'num_matvecs')
_PARTIAL = {name: _EARLIER[name] for name in (*_FACTS, 'seconds', 'trace', 'options')}
_CONFIG = training.Config(optimizer='sgd', base_optimizer='sgd')


def _runs(tmp_path, *summaries, **changes):
  return [
    comparison.Run(
      tmp_path / f'run_{seed}', dataclasses.replace(_CONFIG, seed=seed, **changes), s
    )
    for seed, s in enumerate(summaries)
  ]


def _rows(table):
  rows = [line.strip('| ').split('|') for line in table.splitlines()]
  return [[cell.strip() for cell in row] for row in rows]


def test_summaries_of_earlier_versions_are_read(tmp_path):
  table = comparison.write(_runs(tmp_path, _EARLIER), tmp_path)
  headings, _, cells = _rows(table)
  shown = dict(zip(headings, cells, strict=True))
  # lambda_min is 0, which is a number; what is null is left out.
  assert shown['lambda_min'] == '0.000 ± 0.010'
  assert shown['lambda_max'] == '4.25 ± 0.21' and shown['train acc. %'] == '95.8'
  assert not {'ratio', 'worst case'} & set(headings)
  page = (tmp_path / 'comparison.md').read_text()
  assert 'average case is the mean rise' in page and 'worst case is' not in page
  # The adaptive sharpness did not converge.
  assert '| NO ' in page and '39 ± 0.9' in page
  assert 'lambda_max 4.25' in comparison.describe(_EARLIER)


def test_what_was_not_measured_is_left_out(tmp_path):
  runs = _runs(tmp_path, _PARTIAL, _PARTIAL)
  table = comparison.write(runs, tmp_path)
  assert _rows(table)[0] == ['run'] and '(2 seeds)' in table
  page = (tmp_path / 'comparison.md').read_text()
  assert '| trace ' in page and 'lambda_max' not in page.split('The matrix')[0]
  assert 'trace 39' in comparison.describe(_PARTIAL)
  other = _runs(tmp_path / 'other', _EARLIER, hyperparameters={'alpha': 0.5})
  rows = _rows(comparison.write([*runs, *other], tmp_path))
  # Runs that differ in a method's argument are no seeds of one another.
  assert len(rows) == 4 and '-' in rows[2] and '4.25 ± 0.21' in rows[3]


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are saved, by the name of their file."""
  found = {}
  monkeypatch.setattr(
    Figure, 'savefig', lambda figure, path, **_: found.update({path.name: figure})
  )
  return found


def test_panels_name_the_run_that_is_drawn(tmp_path, drawn, monkeypatch):
  def plot(results, *, title):
    figure = Figure()
    figure.suptitle(title)
    for ax, name in zip(figure.subplots(1, len(results)), results, strict=True):
      ax.set_title(name)
    return figure

  figure = Source('one.png', 'one.txt', lambda path: path.read_text(), plot)
  found = {'one': Measurement(run=lambda context: {}, figures=(figure,))}
  monkeypatch.setattr(comparison.measurements, 'find', lambda: found)
  sam = {'optimizer': 'sam', 'base_optimizer': 'momentum', 'rho': 0.05}
  runs = [
    *_runs(tmp_path / 'a', _PARTIAL),
    *_runs(tmp_path / 'b', _PARTIAL, _PARTIAL, **sam)[1:],
  ]
  for run in runs:
    (run.workdir / 'hessian').mkdir(parents=True)
    (run.workdir / 'hessian/one.txt').write_text('')
  monkeypatch.setattr(comparison.page, 'html', lambda *_: '')
  comparison.write(runs, tmp_path)
  titles = [ax.get_title() for ax in drawn['one.png'].axes]
  assert titles == ['sgd, seed 0', 'sam over momentum, rho 0.05, seed 1']
  assert drawn['one.png'].get_suptitle() == _CONFIG.task
  # Of runs of one method the folder tells which is which.
  same = runs[1]._replace(config=dataclasses.replace(_CONFIG, batch_size=7, seed=1))
  comparison.write([runs[0], same], tmp_path)
  titles = [ax.get_title() for ax in drawn['one.png'].axes]
  assert titles == ['a/run_0\nsgd, seed 0', 'b/run_1\nsgd, seed 1']


def test_over_training_with_and_without_eigenvalues(tmp_path):
  (tmp_path / 'hessian').mkdir()
  table = over_training.write(tmp_path, [_EARLIER, {**_EARLIER, 'step': 80}], 'a run')
  assert '93' in _rows(table)[2] and '4.25 ± 0.21' in _rows(table)[3]
  score = {'name': 'absolute_error', 'label': 'absolute error', 'scale': 1, 'unit': ''}
  evaluation = {'train_loss': 0.1, 'test_loss': 0.3, 'test_absolute_error': 0.6}
  found = {**_PARTIAL, 'evaluation': {**evaluation, 'score': score}}
  table = over_training.write(tmp_path, [found], 'a run')
  assert _rows(table)[0][2] == 'test absolute error'
  assert _rows(table)[2][1:] == ['0.1000', '0.6', '-', '-', '-']
  entries = json.loads((tmp_path / 'hessian/over_training.json').read_text())
  assert entries[0]['lambda_max'] is None and entries[0]['trace'] == 39.0


@pytest.mark.parametrize('earlier', [True, False])
def test_a_sweep_is_drawn_from_its_file(tmp_path, earlier):
  name = 'accuracy' if earlier else 'absolute_error'
  row = {'train_loss': 0.2, 'train_loss_error': 0.01, 'test_loss': 0.3}
  row |= {'test_loss_error': None, f'test_{name}': 0.9, f'test_{name}_error': 0.02}
  row |= {'lambda_max': 4.0, 'lambda_max_error': 0.5}
  rows = [
    {'optimizer': 'sgd', 'rho': None, 'seeds': 2, **row},
    {'optimizer': 'sam', 'rho': 0.05, 'seeds': 2, **row},
  ]
  score = {'name': name, 'label': 'absolute error', 'scale': 1.0, 'unit': 'mm'}
  found = {'rows': rows} if earlier else {'rows': rows, 'task': 't', 'score': score}
  (tmp_path / 'sweep.json').write_text(json.dumps(found))
  text = sweep.write(tmp_path)
  headings, _, base, sam = _rows(text)[:4]
  shown = dict(zip(headings, sam, strict=True))
  assert base[1] == '-' and shown['rho'] == '0.05'
  assert shown['lambda_max'] == '4.00 +- 0.50' and shown['test loss'] == '0.3000'
  if earlier:
    assert shown['test accuracy (%)'] == '90.00 +- 2.00'
  else:
    assert shown['test absolute error (mm)'] == '0.9000 +- 0.0200'
  assert (tmp_path / 'sweep.md').read_text() == f'{text}\n'
  assert (tmp_path / 'sweep.png').stat().st_size > 1000


def test_a_sweep_names_the_runs_that_have_diverged(tmp_path, drawn):
  """The first row has none left, and is a row without numbers."""
  row = {'test_loss': 0.3, 'test_loss_error': 0.1, 'lambda_max': 4.0}
  rows = [
    {'optimizer': 'sam', 'rho': 0.5, 'seeds': 0},
    {'optimizer': 'sam', 'rho': 0.1, 'seeds': 2, **row, 'lambda_max_error': 0.5},
  ]
  found = {'rows': rows, 'task': 't', 'diverged': {'rho_0.5/seed_0': 7}}
  (tmp_path / 'sweep.json').write_text(json.dumps(found))
  text = sweep.write(tmp_path)
  assert _rows(text)[2] == ['sam', '0.5', '0', '-', '-']
  assert _rows(text)[3][3:] == ['0.3000 +- 0.1000', '4.00 +- 0.50']
  assert text.endswith('Diverged, and in no mean: rho_0.5/seed_0 (step 7).')
  assert 'over 2 seeds' in drawn['sweep.png'].get_suptitle()


@pytest.mark.parametrize(('seeds', 'error'), [(3, 0.5), (1, None)])
def test_the_legend_of_a_sweep_tells_the_band(tmp_path, drawn, seeds, error):
  row = {'seeds': seeds, 'lambda_max': 4.0, 'lambda_max_error': error}
  rows = [{'optimizer': 'sgd', 'rho': None, **row}]
  rows += [{'optimizer': 'sam', 'rho': rho, **row} for rho in (0.05, 0.1)]
  (tmp_path / 'sweep.json').write_text(json.dumps({'rows': rows, 'task': 'digits'}))
  sweep.write(tmp_path)
  (axes,) = drawn['sweep.png'].axes
  texts = [text.get_text() for text in axes.get_legend().get_texts()]
  band = ['sgd, ± standard error'] if error else []
  assert texts == ['sgd', *band, 'sam']
  title = drawn['sweep.png'].get_suptitle()
  over = 'mean ± standard error over 3 seeds' if error else 'one seed'
  assert title == f'digits: {over}'


def test_a_grid_has_a_column_for_each_field_and_a_curve_for_each_combination(
  tmp_path, monkeypatch
):
  curves, draw = {}, Axes.errorbar

  def errorbar(axes, x, y, yerr, *, label, **style):
    curves[label] = (list(x), list(y), list(yerr))
    return draw(axes, x, y, yerr, label=label, **style)

  monkeypatch.setattr(Axes, 'errorbar', errorbar)
  rows = []
  for rate in (0.3, 0.1, 0.2):  # The curve is drawn in the order of the axis.
    for schedule in ('step', 'cosine'):
      number = rate * (2 if schedule == 'step' else 3)
      swept = {'learning_rate': rate, 'schedule': schedule, 'looksam_every': None}
      row = {'optimizer': 'sgd', 'rho': None, 'seeds': 2, 'swept': swept}
      rows.append({**row, 'lambda_max': number, 'lambda_max_error': rate / 10})
  (tmp_path / 'sweep.json').write_text(json.dumps({'rows': rows}))
  cells = _rows(sweep.write(tmp_path))
  headings = ['optimizer', 'rho', 'learning_rate', 'schedule', 'looksam_every', 'seeds']
  assert cells[0] == [*headings, 'lambda_max']
  assert cells[2] == ['sgd', '-', '0.3', 'step', '-', '2', '0.60 +- 0.03']
  assert list(curves) == ['sgd, schedule step', 'sgd, schedule cosine']
  for factor, (x, y, spread) in zip((2, 3), curves.values(), strict=True):
    assert x == [0.1, 0.2, 0.3]
    assert y == pytest.approx([factor * rate for rate in x])
    assert spread == pytest.approx([0.01, 0.02, 0.03])


def test_a_sweep_over_words(tmp_path):
  row = {'optimizer': 'sgd', 'rho': None, 'seeds': 1}
  row |= {'lambda_max': 4.0, 'lambda_max_error': None}
  rows = [{**row, 'swept': {'schedule': name}} for name in ('step', 'cosine')]
  (tmp_path / 'sweep.json').write_text(json.dumps({'rows': rows}))
  assert _rows(sweep.write(tmp_path))[3] == ['sgd', '-', 'cosine', '1', '4.00']
  assert (tmp_path / 'sweep.png').stat().st_size > 1000
