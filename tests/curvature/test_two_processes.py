"""Curvature of parameters that lie on the devices of two real processes."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys
import jax
jax.distributed.initialize(f'localhost:{sys.argv[2]}', 2, int(sys.argv[1]))
jax.config.update('jax_enable_x64', True)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sam_jax import curvature

def loss(params, batch):
  hidden = jnp.tanh(batch @ params['in'] + params['bias'])
  return jnp.mean((hidden @ params['out']) ** 2)

def placed(x, spec):
  sharding = NamedSharding(mesh, spec)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

automatic = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=automatic)
normal = np.random.default_rng(0).normal
whole = {'in': normal(size=(5, 8)), 'bias': normal(size=8), 'out': normal(size=(8, 4))}
specs = {'in': P(None, ('data', 'fsdp')), 'bias': P(), 'out': P('fsdp', 'data')}
batch = normal(size=(8, 5))
params = jax.tree.map(placed, whole, specs)
assert not params['in'].is_fully_addressable
operator = curvature.hessian(loss, params, [placed(batch, P('data'))])
pairs = curvature.eigenpairs(operator, 3, 'both', tol=1e-9, max_basis_size=24)
flat, unflatten = jax.flatten_util.ravel_pytree(whole)
dense = np.asarray(jax.jit(jax.hessian(lambda w: loss(unflatten(w), batch)))(flat))
values = np.linalg.eigvalsh(dense)[::-1]
expected = np.concatenate([values[:3], values[-3:]])
np.testing.assert_allclose(pairs.eigenvalues, expected, atol=1e-10)
assert pairs.verified
# So many products multiply the whole space: the trace is exact.
trace = curvature.trace(operator, 2 * operator.size).value
np.testing.assert_allclose(trace, np.trace(dense), rtol=1e-8)
for refused in (
  lambda: pairs.save('pairs.npz'), lambda: curvature.journaled(operator, 'journal')
):
  try:
    refused()
  except ValueError as error:
    assert 'several processes' in str(error)
  else:
    raise AssertionError('not refused')
print('as one device')
"""


@pytest.mark.slow
def test_the_spectrum_is_that_of_the_dense_matrix(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  environment = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4 '
    '--xla_backend_optimization_level=0',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(index), port],
      env=environment,
      cwd=tmp_path,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0 and 'as one device' in output, output
