"""Products kept in a file: a killed computation goes on where it was."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sam_jax import curvature

_PROGRAM = """
import os, signal, sys
import jax, jax.numpy as jnp
from sam_jax import curvature

path, kill_at = sys.argv[1], int(sys.argv[2])
x = jax.random.normal(jax.random.key(0), (40, 8))
loss = lambda w, x: jnp.mean(jnp.tanh(x @ w['a']) ** 2) + 0.1 * jnp.sum(w['b'] ** 4)
params = {'a': jax.random.normal(jax.random.key(1), (8, 6)), 'b': jnp.ones(3)}
hessian = curvature.hessian(loss, params, [x[:30], x[30:]])

def product(vector):
  if hessian.num_matvecs + 1 == kill_at:
    os.kill(os.getpid(), signal.SIGKILL)
  return hessian.matvec(vector)

inner = curvature.operator(product, params)
operator = curvature.journaled(inner, path, identity='test')
pairs = curvature.eigenpairs(operator, 3, tol=1e-5)
print(pairs.eigenvalues.tobytes().hex(), pairs.residuals.tobytes().hex())
print(operator.num_matvecs, operator.num_computed, pairs.num_matvecs)
"""


def _run(path, kill_at=0):
  return subprocess.run(
    [sys.executable, '-c', _PROGRAM, str(path), str(kill_at)],
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )


@pytest.mark.slow
def test_killed_eigenpairs_end_bit_for_bit_as_uninterrupted_ones(tmp_path):
  whole = _run(tmp_path / 'whole')
  assert whole.returncode == 0, whole.stderr
  values, counts = whole.stdout.splitlines()
  asked, computed, of_pairs = map(int, counts.split())
  assert asked == computed == of_pairs > 25

  for kill_at in (20, 5):  # the second time five products after those recorded
    killed = _run(tmp_path / 'killed', kill_at)
    assert killed.returncode == -signal.SIGKILL
  resumed = _run(tmp_path / 'killed')
  again, counts = resumed.stdout.splitlines()
  assert again == values
  # Each time the product under way was lost, which the operator never answered.
  assert list(map(int, counts.split())) == [asked, asked - 19 - 4, asked]


def _counting(dtype=jnp.float32):
  """An operator with leaves of two types and shapes, one of them a scalar."""
  like = {'a': jnp.zeros((3, 2), dtype), 'b': jnp.zeros((), jnp.float32)}
  return curvature.operator(lambda v: jax.tree.map(lambda x: x * 1.7, v), like)


def _vectors(count, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), count)
  return [
    {'a': jax.random.normal(key, (3, 2), dtype), 'b': jnp.float32(index)}
    for index, key in enumerate(keys)
  ]


def _ask(operator, vectors):
  products = [operator.matvec(vector) for vector in vectors]
  return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(products)]


@pytest.mark.parametrize('dtype', [jnp.float32, ml_dtypes.bfloat16])
def test_recorded_products_are_those_computed(tmp_path, dtype):
  path, vectors = tmp_path / 'folder' / 'journal', _vectors(4, dtype)
  first = curvature.journaled(_counting(dtype), path)
  answers = _ask(first, vectors)
  again = curvature.journaled(_counting(dtype), path)
  assert _ask(again, vectors) == answers
  assert (first.num_matvecs, first.num_computed) == (4, 4)
  assert (again.num_matvecs, again.num_computed) == (4, 0)


@pytest.mark.parametrize('damage', ['cut', 'changed'])
def test_a_half_written_or_damaged_entry_is_computed_again(tmp_path, damage):
  path, vectors = tmp_path / 'journal', _vectors(4)
  answers = _ask(curvature.journaled(_counting(), path), vectors)
  content = path.read_bytes()
  if damage == 'cut':
    path.write_bytes(content[:-5])
  else:
    path.write_bytes(content[:-40] + b'????' + content[-36:])
  repaired = curvature.journaled(_counting(), path)
  assert _ask(repaired, vectors) == answers
  assert repaired.num_computed == 1
  assert path.read_bytes() == content


def test_another_course_cuts_off_the_rest(tmp_path):
  path, vectors = tmp_path / 'journal', _vectors(6)
  _ask(curvature.journaled(_counting(), path), vectors[:4])
  size = path.stat().st_size
  other = curvature.journaled(_counting(), path)
  course = [vectors[0], vectors[5], vectors[2]]
  _ask(other, course)
  assert other.num_computed == 2
  assert path.stat().st_size < size
  again = curvature.journaled(_counting(), path)
  _ask(again, course)
  assert again.num_computed == 0


def test_another_identity_or_shape_starts_anew(tmp_path):
  path, vectors = tmp_path / 'journal', _vectors(3)
  _ask(curvature.journaled(_counting(), path, identity='one'), vectors)
  other = curvature.journaled(_counting(), path, identity='two')
  _ask(other, vectors)
  assert other.num_computed == 3
  transposed = curvature.operator(
    lambda v: v, {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(())}
  )
  shaped = curvature.journaled(transposed, path, identity='two')
  _ask(shaped, [{'a': v['a'].T, 'b': v['b']} for v in vectors])
  assert shaped.num_computed == 3


@pytest.mark.parametrize('entries', [0, 2])
def test_the_file_grows_to_its_limit_and_no_further(tmp_path, entries):
  path, vectors = tmp_path / 'journal', _vectors(5)
  _ask(curvature.journaled(_counting(), path, max_gib=1), vectors[:1])
  header = path.read_bytes().index(b'\n') + 1
  entry = path.stat().st_size - header
  path.unlink()
  limit = (header + entries * entry) / 2**30
  for computed in (5, 5 - entries):
    operator = curvature.journaled(_counting(), path, max_gib=limit)
    _ask(operator, vectors)
    assert operator.num_computed == computed
    assert path.stat().st_size == header + entries * entry
