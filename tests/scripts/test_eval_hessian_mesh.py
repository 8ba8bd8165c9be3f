"""eval_hessian.py over a mesh of eight devices."""

import json

import jax
import pytest

import eval_hessian
import train
from input_pipelines import DataError
from measurements import context
from training import cli


def _run(script, *arguments):
  return cli.run(
    script.main, [f'{script.__name__}.py', '--nocache', *arguments], errors=(DataError,)
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('mesh') / 'run'
  flags = '--optimizer=adam', '--epochs=1', '--devices=1', f'--workdir={workdir}'
  assert _run(train, *flags) == 0
  return workdir


def test_a_mesh_measures_what_one_device_does(run, monkeypatch):
  """Parameters lie on all devices, and nothing but rounding is different."""
  seen = []
  operator = context.Context.over

  def over(self, batches):
    seen.append((self.params, batches[0]))
    return operator(self, batches)

  monkeypatch.setattr(context.Context, 'over', over)
  found = []
  for flags in ((), ('--mesh=data:4,fsdp:2',)):
    options = ('--num_examples=512', '--top_k=2', '--num_probes=2', '--tol=1e-5')
    measure = '--measure=eigenvalues,trace,spectral_density,landscape'
    fast = '--landscape_points=3', '--num_matvecs=8', '--preconditioner=adam'
    arguments = f'--workdir={run}', measure, *options, *fast, *flags
    assert _run(eval_hessian, *arguments) == 0
    summary = run / 'hessian' / 'summary.json'
    found.append(json.loads(summary.read_text()))
    summary.unlink()
  one, eight = found
  for name in ('lambda_max', 'lambda_min', 'trace'):
    assert eight[name] == pytest.approx(one[name], rel=1e-4), name
  (alone, _), *_ = seen
  params, batch = seen[-1]
  kernel = params['Dense_0']['kernel']
  assert len(alone['Dense_0']['kernel'].sharding.device_set) == 1
  assert len(kernel.sharding.device_set) == len(jax.devices()) == 8
  assert kernel.addressable_shards[0].data.size == kernel.size // 2
  inputs = batch['inputs']
  assert inputs.addressable_shards[0].data.shape[0] == len(inputs) // 8


def test_a_mesh_that_does_not_fit_is_refused(run, capsys):
  arguments = f'--workdir={run}', '--mesh=data:3'
  assert _run(eval_hessian, *arguments) == 2
  assert '--mesh=data:3 is of 3 devices, and there are 8' in capsys.readouterr().err
