"""Several real processes take the steps of one device, to 1e-12 in float64."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import training
from tests.training import replicas as script
from training import parallel

_ROOT = pathlib.Path(training.__file__).parents[1]


def _start(tmp_path, cases, num_processes, devices):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')
  command = [sys.executable, script.__file__, tmp_path, ','.join(cases), address]
  return [
    subprocess.Popen(
      [*map(str, command), str(num_processes), str(i)],
      env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(num_processes)
  ]


def _reference(case, num_replicas):
  """The last state on one device, all replicas of it."""

  def mapping(step):
    mapped = jax.jit(jax.vmap(step, axis_name=parallel.AXIS))

    def run(state, batch):
      if not jnp.ndim(state.step):
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_replicas), state)
      return mapped(state, batch)

    return run

  for state in script.states(case, num_replicas, mapping, lambda _: _epoch):
    last = state
  return script.leaves(last)


def _epoch(batches, epoch):
  return batches.epoch(epoch)


def _check(tmp_path, cases, num_processes, devices):
  """Compares every replica's whole state with the reference, and with each other."""
  processes = _start(tmp_path, cases, num_processes, devices)
  num_replicas = num_processes * devices
  try:
    expected = {case: _reference(case, num_replicas) for case in cases}
    for process in processes:
      _, error = process.communicate(timeout=600)
      assert process.returncode == 0, error
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  for case in cases:
    parts = [np.load(tmp_path / f'{case}_{i}.npz') for i in range(num_processes)]
    for number, wanted in enumerate(expected[case]):
      got = np.concatenate([part[f'arr_{number}'] for part in parts])
      assert got.shape == wanted.shape == (num_replicas, *wanted.shape[1:])
      assert got.dtype == wanted.dtype
      assert (got == got[0]).all()
      np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12, err_msg=case)


def test_two_processes_take_the_steps_of_one_device(tmp_path, x64):
  _check(tmp_path, ['sam_per_group mlp'], 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(('num', 'devices'), [(2, 1), (4, 1), (2, 4)])
def test_every_method_takes_the_steps_of_one_device(tmp_path, x64, num, devices):
  _check(tmp_path, [f'{method} mlp' for method in script.METHODS], num, devices)


@pytest.mark.slow
@pytest.mark.parametrize(('num', 'devices'), [(2, 1), (2, 4)])
@pytest.mark.parametrize('network', ['gcn', 'wrn'])
def test_other_networks_too(tmp_path, x64, network, num, devices):
  methods = ['sam', 'sam_per_group', *(['looksam'] if network == 'gcn' else [])]
  _check(tmp_path, [f'{method} {network}' for method in methods], num, devices)
