"""Which measurements run: chosen ones, new ones, hooks; and what they cost."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

import measurements
import training
from measurements import context, registry
from training import problem as problem_lib


def test_what_a_chosen_one_needs_runs_too(fast):
  assert list(measurements.choose(['trace'], fast.options)) == ['eigenvalues', 'trace']
  assert measurements.choose(None, fast.options) == measurements.find()
  with pytest.raises(training.UsageError, match='--measure=tarce: choose of evalua'):
    measurements.choose(['tarce'], fast.options)
  with pytest.raises(training.UsageError, match='--measure=layers: --per_layer is off'):
    measurements.choose(['layers'], fast.options)


_NEW = """
import dataclasses
from measurements.measurement import Column, Measurement, at_least, option

@dataclasses.dataclass(frozen=True)
class Options:
  new_power: int = option(2, 'the power', at_least(1))

def _run(context):
  bias = float(context.params['Dense_0']['bias'][0])
  return {'new': context.options.new_power * bias}

MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  columns=lambda summary: [Column('new one', ('new',))],
)
"""


@pytest.fixture
def new_file(tmp_path, monkeypatch):
  """A measurement more, in one file."""
  (tmp_path / 'added_one.py').write_text(_NEW)
  monkeypatch.setattr(measurements, '__path__', [*measurements.__path__, str(tmp_path)])
  registry.find.cache_clear()
  yield
  registry.find.cache_clear()
  sys.modules.pop('measurements.added_one', None)


def test_a_new_measurement_is_one_file(network, new_file, tmp_path):
  options = measurements.options_class()(new_power=3)
  with pytest.raises(training.UsageError, match='--new_power=0: must be at least 1'):
    dataclasses.replace(options, new_power=0).validate()
  found = measurements.measure(network, tmp_path / 'out', options, ['added_one'])
  assert found['new'] == pytest.approx(3 * network.params['Dense_0']['bias'][0])
  from reports import comparison

  run = comparison.Run(tmp_path, network.config, found)
  assert '| new one' in comparison.write([run], tmp_path / 'compare')


def test_a_bug_is_a_traceback(network, fast, tmp_path, monkeypatch):
  def broken(outputs, batch):
    raise ValueError('a bug in a loss')

  wrong = network.problem._replace(example_losses=broken)
  with pytest.raises(ValueError, match='a bug in a loss') as raised:
    measurements.measure(
      network._replace(problem=wrong), tmp_path, fast.options, ['eigenvalues']
    )
  assert not isinstance(raised.value, training.UsageError)


def test_lambda_max_is_one_definition(network, matrices, fast, tmp_path):
  dense = np.linalg.eigvalsh(matrices['hessian'].mean(0))
  variables = network.params, network.batch_stats
  found = measurements.lambda_max(network.problem, *variables)
  assert found['lambda_max_converged']
  # An eigenvalue lies within the residual, but for rounding in float32.
  assert abs(found['lambda_max'] - dense[-1]) <= found['lambda_max_residual'] + 1e-5
  assert found['lambda_max_residual'] <= 1e-4 * np.abs(dense).max()
  # Training in half precision measures the same.
  config = dataclasses.replace(network.config, dtype='bfloat16')
  hook = measurements.hook('eigenvalues', network.problem, config)
  assert hook(network, 5) == found == hook(network, 5)
  summary = measurements.measure(
    network._replace(config=config), tmp_path, fast.options, ['eigenvalues']
  )
  assert {name for name in found if name in summary} == set(found)
  assert summary['lambda_max'] == pytest.approx(found['lambda_max'], rel=1e-5)


def test_hooks_are_due_and_tell_plain_numbers(network):
  assert measurements.hooks() == ('evaluation', 'eigenvalues', 'trace')
  hook = measurements.hook('evaluation', network.problem, network.config, every=3)
  assert [step for step in range(1, 8) if hook.due(step, 5)] == [3, 6]
  each = dataclasses.replace(hook, _every=0)
  assert [step for step in range(1, 11) if each.due(step, 5)] == [5, 10]
  found = hook(network, 3)
  assert json.loads(json.dumps(found)) == found
  test = next(network.problem.test.batches(1000).epoch(0))
  whole = problem_lib.loss(network.problem, network.params, network.batch_stats, test)
  assert found['test_loss'] == pytest.approx(float(whole[0]), rel=1e-5)
  with pytest.raises(training.UsageError, match='--measure=landscape: choose of'):
    measurements.hook('landscape', network.problem, network.config)
  trace = measurements.hook('trace', network.problem, network.config)
  assert trace(network, 3)['trace_standard_error'] > 0
  poisoned = jax.tree.map(lambda x: x * np.nan, network.params)
  with pytest.raises(training.TrainingDiverged, match='step 3'):
    trace(network._replace(params=poisoned), 3)


@pytest.mark.slow
def test_several_networks_are_compiled_and_loaded_once(network, fast, tmp_path):
  counts = {'compiled': 0, 'drawn': 0}

  def count(event, seconds, **_):
    counts['compiled'] += event == '/jax/core/compile/backend_compile_duration'

  class Counting:
    num_examples = network.problem.train.num_examples

    def batches(self, *arguments, **options):
      counts['drawn'] += 1
      return network.problem.train.batches(*arguments, **options)

  problem = network.problem._replace(train=Counting())
  measurer = measurements.Measurer(
    problem, fast.but(landscape_points=2, worst_case_rho=0.1, average_case_sigma=0.1)
  )
  other = jax.tree.map(lambda x: 1.5 * x, (network.params, network.batch_stats))
  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    first = measurer.measure(network._replace(problem=problem), tmp_path / 'first')
    once = dict(counts)
    moved = network._replace(problem=problem, params=other[0], batch_stats=other[1])
    second = measurer.measure(moved, tmp_path / 'second')
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  assert once['compiled'] > 0 and counts == once
  # Neither parameters nor batch statistics were left in a program.
  alone = measurements.measure(
    moved._replace(problem=network.problem), tmp_path / 'alone', fast.options, ['trace']
  )
  assert second['lambda_max'] == pytest.approx(alone['lambda_max'], rel=1e-7)
  assert second['lambda_max'] != pytest.approx(first['lambda_max'], rel=0.01)


def test_numbers_that_are_not_finite_are_null():
  found = context.plain({'a': [np.float64(np.inf), np.int64(2)], 'b': np.nan})
  assert found == {'a': [None, 2], 'b': None}


def test_a_file_need_not_postpone_its_annotations(new_file):
  """The file has a class as its field's type; a flag wants the name."""
  kinds = {
    field.name: field.type for field in dataclasses.fields(registry.options_class())
  }
  assert kinds['new_power'] == 'int'
