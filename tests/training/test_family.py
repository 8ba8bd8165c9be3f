"""Every method through the training step: replicas, resume of periodic phases, logs."""

import functools

import jax
import numpy as np
import pytest

import tasks
from training import (
  UsageError,
  loop,
  methods,
  metrics,
  optimizers,
  parallel,
  sharing,
  step,
)

METHODS = sorted(methods.found())


def config_of(method, **overrides):
  given = {
    'optimizer': method,
    'base_optimizer': 'momentum',
    'epochs': 2,
    'batch_size': 8,
    'learning_rate': 0.05,
    'weight_decay': 1e-3,
    **({'looksam_every': 2} if method == 'looksam' else {}),
  }
  return tasks.resolve('digits_mlp', **{**given, **overrides})


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_trains_logs_and_resumes_bit_for_bit(method, small, tmp_path, monkeypatch):
  """A run stopped after its fourth step goes on as if it had not been."""
  config = config_of(method)
  whole = loop.train(
    config, small.problem(), tmp_path / 'whole', num_devices=2, timing=False
  )
  lines = metrics.read(tmp_path / 'whole')
  train_lines = [line for line in lines if line['split'] == 'train']
  has_loss = not methods.get(method).traits.one_gradient
  for line in train_lines:
    assert (line['loss'] is not None) == has_loss
    assert line['perturbed_loss'] > 0
    assert line['rho'] > 0
    assert line['gradient_norm'] > 0
  assert np.isfinite(whole['final']['test_loss'])

  monkeypatch.setattr(parallel, 'agree_to_stop', lambda step, asked: step == 4)
  with pytest.raises(SystemExit):
    loop.train(config, small.problem(), tmp_path / 'cut', num_devices=2, timing=False)
  monkeypatch.undo()
  loop.train(config, small.problem(), tmp_path / 'cut', num_devices=2, timing=False)
  cut, uncut = (tmp_path / run / 'metrics.jsonl' for run in ('cut', 'whole'))
  assert cut.read_bytes() == uncut.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_replicas_hold_one_state_in_float64(method, small, x64):
  """pmap over two devices equals vmap over the same shards, and replicas agree."""
  config = config_of(method)
  problem = small.problem(small.split(22, dtype=np.float64), dropout_rate=0.0)
  batches = problem.train.batches(8, shards=(2,), seed=0)
  replicas = parallel.DataParallel(2)
  stepper = step.Stepper(
    problem, config, batches.steps_per_epoch, sharing.of(config, 2), parallel.AXIS
  )
  state = stepper.init(0, dtype=float)
  on_devices = replicas.replicate(state)
  on_one = jax.tree.map(lambda x: x, on_devices)
  compiled = {}
  for number, batch in enumerate(batches.epoch(0)):
    phase = optimizers.phase(config, batches.steps_per_epoch, number)
    if phase not in compiled:
      function = functools.partial(stepper.train, phase=phase)
      compiled[phase] = (
        replicas.map(function),
        jax.jit(jax.vmap(function, axis_name=parallel.AXIS)),
      )
    pmapped, vmapped = compiled[phase]
    on_devices, _ = pmapped(on_devices, batch)
    on_one, _ = vmapped(on_one, batch)
  for a, b in zip(jax.tree.leaves(on_devices), jax.tree.leaves(on_one), strict=True):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a[0], a[1])
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'optimizer': 'msam', 'base_optimizer': 'sgd'}, 'momentum buffer'),
    ({'optimizer': 'msam', 'm_sharpness': 4}, 'm_sharpness=4 does not go'),
    ({'optimizer': 'esam', 'm_sharpness': 4}, 'm_sharpness=4 does not go'),
    ({'optimizer': 'graphsam', 'perturb_every': 2}, 'no clean gradient'),
    ({'optimizer': 'frob_sam', 'num_probes': 1}, 'at least 2'),
    ({'optimizer': 'momentum', 'perturb_every': 2}, 'has no effect'),
  ],
)
def test_options_that_do_not_go_together_are_refused(overrides, message):
  with pytest.raises(UsageError, match=message):
    tasks.resolve('digits_mlp', **{'base_optimizer': 'momentum', **overrides})


def test_phases_of_periodic_runs():
  config = config_of('sam', epochs=4, perturb_every=3, perturb_from=1.0)
  active = [s for s in range(12) if optimizers.phase(config, 3, s)]
  assert active == [3, 6, 9]
  until = config_of('sam', epochs=4, perturb_until=2.0)
  assert [optimizers.phase(until, 3, s) for s in (0, 5, 6)] == [True, True, False]
  assert optimizers.phase(config_of('sam'), 3, 0) is None
  assert optimizers.phase(config_of('graphsam'), 3, 3) is True


@pytest.mark.slow
def test_gsam_radius_follows_the_learning_rate(small, tmp_path):
  """rho is recorded between its bounds, in proportion to the rate."""
  config = config_of('gsam', gsam_rho_min=0.01, epochs=10)
  loop.train(config, small.problem(), tmp_path, num_devices=1, timing=False)
  lines = metrics.read(tmp_path)
  lines = [line for line in lines if line['split'] == 'train']
  low, high = 0.025 * (1 + np.cos(np.pi * 29 / 30)), 0.05  # A cosine over 30 steps.
  for line in lines:
    share = (line['learning_rate'] - low) / (high - low)
    assert line['rho'] == pytest.approx(0.01 + 0.04 * share, rel=1e-4)
  assert lines[0]['rho'] > 0.0495 and lines[-1]['rho'] == pytest.approx(0.01)
