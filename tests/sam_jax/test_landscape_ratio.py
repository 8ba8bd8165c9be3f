"""Maps of eigenvalue ratios against dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_jax import landscape

_X = np.linspace(-1, 1, 3)
_RNG = np.random.default_rng(0)
_BATCHES = [
  (_RNG.normal(size=(n, 2)), np.sign(_RNG.normal(size=(n, 1)))) for n in (5, 3)
]


def _network(params, batch):
  inputs, targets = batch
  hidden = jnp.tanh(inputs @ params['first'] + params['bias'][None])
  return jnp.mean((hidden @ params['second'] - targets) ** 2)


def _parameters():
  params = {
    'first': _RNG.normal(size=(2, 3)),
    'bias': _RNG.normal(size=3),
    'second': _RNG.normal(size=(3, 1)),
  }
  return jax.tree.map(jnp.asarray, params)


def test_a_network_against_its_dense_hessian(x64, tmp_path):
  params = _parameters()
  directions = landscape.random_directions(jax.random.key(0), params)
  seen = []

  def evaluate(tol, batches=_BATCHES):
    return landscape.eigen_ratio(
      _network,
      params,
      directions,
      _X,
      _X[:2],
      batches,
      tol=tol,
      record=tmp_path / 'points',
      progress=lambda *done: seen.append(done),
    )

  whole = tuple(np.concatenate(part) for part in zip(*_BATCHES, strict=True))
  flat, unravel = ravel_pytree(params)
  along = [ravel_pytree(d)[0] for d in directions]
  dense = jax.jit(jax.hessian(lambda w: _network(unravel(w), whole)))
  expected = np.empty((2, 3))
  for i, b in enumerate(_X[:2]):
    for j, a in enumerate(_X):
      values = np.linalg.eigvalsh(dense(flat + a * along[0] + b * along[1]))
      expected[i, j] = abs(values[0] / values[-1])
  result = evaluate(1e-8)
  np.testing.assert_allclose(result.loss, expected, rtol=1e-6)
  assert result.value == '|lambda_min/lambda_max|'
  assert seen == [(i, 6) for i in range(1, 7)]
  again = evaluate(1e-8, iter(_BATCHES))
  np.testing.assert_array_equal(again.loss, result.loss)
  assert len(seen) == 6
  # Another tolerance is another map: the record is not taken for it.
  np.testing.assert_allclose(evaluate(1e-2).loss, expected, atol=1e-2)
  assert len(seen) == 12


class Interrupted(Exception):
  """Stands for whatever ends a run."""


@pytest.mark.parametrize('lost', [0, 1, 2])
def test_an_interrupted_map_has_the_same_bits(x64, tmp_path, lost):
  """Killed after a point, or before the point was recorded; or the record is torn."""
  params = _parameters()
  directions = landscape.random_directions(jax.random.key(0), params)
  record = tmp_path / 'points'

  def evaluate(path, progress=None):
    return landscape.eigen_ratio(
      _network,
      params,
      directions,
      _X,
      [0.0, 0.5],
      _BATCHES,
      record=path,
      progress=progress,
    ).loss

  def stop(done, total):
    if done == 4:
      raise Interrupted

  expected = evaluate(None)
  with pytest.raises(Interrupted):
    evaluate(record, stop)
  lines = record.read_bytes().splitlines(keepends=True)
  record.write_bytes(b''.join(lines[: len(lines) - lost]))
  seen = []
  got = evaluate(record, lambda *done: seen.append(done))
  if lost < 2:
    np.testing.assert_array_equal(got, expected)
    assert seen == [(5, 6), (6, 6)]
  else:
    # The start is gone with the points: the numbers are as good, not the same.
    np.testing.assert_allclose(got, expected, atol=2e-2)
    assert seen == [(i, 6) for i in range(3, 7)]
  assert list(tmp_path.iterdir()) == [record]


def _diagonal(params, batch):
  """Its Hessian at x = 1 is diagonal: the batch."""
  return jnp.sum(jnp.mean(batch, 0) * params**3 / 6)


@pytest.mark.parametrize(
  ('scale', 'expected'),
  [
    ([3.0, 1.0, 0.0], 0.0),
    ([4.0, 1.0, -1.0], 0.25),
    ([0.0, 0.0, 0.0], 0.0),
    ([0.0, -1.0, -1.0], np.inf),
    ([2.0, np.nan, -1.0], np.nan),
  ],
)
def test_special_values(scale, expected):
  directions = jnp.ones(3), jnp.zeros(3)
  batches = [jnp.array([scale, scale])]
  result = landscape.eigen_ratio(
    _diagonal, jnp.zeros(3), directions, [1.0], [0.0], batches
  )
  np.testing.assert_allclose(result.loss, [[expected]], atol=1e-6)


def test_a_search_that_does_not_converge_has_no_value():
  result = landscape.eigen_ratio(
    _diagonal,
    jnp.ones(200),
    (jnp.zeros(200), jnp.zeros(200)),
    [0.0],
    [0.0],
    [jnp.linspace(-1.0, 1.0, 200)[None]],
    tol=1e-6,
    max_num_matvecs=6,
  )
  assert np.isnan(result.loss).all()


def test_short_steps_of_half_precision_parameters_are_gone():
  """w0^4 - w1^2: the ratio is 2 / (12 w0^2), and bfloat16 rounds 1.001 to 1."""
  loss = lambda w, batch: jnp.mean(batch) * (w[0] ** 4 - w[1] ** 2)
  at, x = jnp.array([1.0, 0.0], jnp.bfloat16), np.array([-1e-3, 0.0, 1e-3])
  along = jnp.eye(2, dtype=jnp.bfloat16)
  found = landscape.eigen_ratio(loss, at, tuple(along), x, [0.0], [jnp.ones(2)])
  np.testing.assert_allclose(found.loss, [1 / (6 * (1 + x) ** 2)], rtol=1e-5)
