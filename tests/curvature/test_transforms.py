"""Preconditioned and restricted operators, and Adam's preconditioner."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import sam_jax
from sam_jax import curvature

_SHAPES = {'Dense_0': {'bias': (2,), 'kernel': (3, 2)}, 'Dense_1': {'kernel': (2, 2)}}
_PATHS = ['Dense_0/bias', 'Dense_0/kernel', 'Dense_1/kernel']


def _params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape)),
    _SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _loss(params, x):
  hidden = jnp.tanh(x @ params['Dense_0']['kernel'] + params['Dense_0']['bias'][None])
  return jnp.mean((hidden @ params['Dense_1']['kernel']) ** 4)


def _matrix(operator):
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), operator.structure)
  flat, unravel = ravel_pytree(zeros)
  return np.stack(
    [ravel_pytree(operator.matvec(unravel(row)))[0] for row in jnp.eye(flat.size)]
  )


@pytest.fixture
def problem(x64):
  """A Hessian, its dense matrix, and the indices of the kernels in it."""
  params = _params()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
  flat, unravel = ravel_pytree(params)
  dense = np.asarray(jax.hessian(lambda w: _loss(unravel(w), x))(flat))
  return curvature.hessian(_loss, params, [x]), dense, np.arange(2, 12)


def test_paths_name_the_leaves_in_their_order():
  assert curvature.paths(_params()) == _PATHS
  assert curvature.paths(jnp.ones(2)) == ['']


@pytest.mark.parametrize('keep', ['kernel', lambda path: path.endswith('/kernel')])
def test_restricted_is_the_principal_submatrix(problem, keep):
  hessian, dense, kernels = problem
  block = curvature.restricted(hessian, keep)
  assert block.size == 10
  assert block.structure['Dense_0']['bias'] is None
  np.testing.assert_allclose(
    _matrix(block), dense[np.ix_(kernels, kernels)], atol=1e-13
  )
  pairs = curvature.eigenpairs(block, 2, tol=1e-9)
  values = np.linalg.eigvalsh(dense[np.ix_(kernels, kernels)])[::-1]
  np.testing.assert_allclose(
    pairs.eigenvalues, values[[0, 1, -2, -1]], atol=1e-9 * np.abs(values).max()
  )
  assert pairs.eigenvectors[0]['Dense_0']['bias'] is None


def test_restricted_composes(problem):
  hessian, dense, kernels = problem
  scale = jax.tree.map(jnp.abs, hessian.params)
  flat = np.asarray(ravel_pytree(scale)[0])
  expected = (flat[:, None] * dense * flat)[np.ix_(kernels, kernels)]
  outside = curvature.restricted(curvature.preconditioned(hessian, scale), 'kernel')
  block = curvature.restricted(hessian, 'kernel')
  kept = {'Dense_0': {**scale['Dense_0'], 'bias': None}, 'Dense_1': scale['Dense_1']}
  for operator in (outside, curvature.preconditioned(block, kept)):
    np.testing.assert_allclose(_matrix(operator), expected, atol=1e-13)
  twice = curvature.restricted(block, '^Dense_0')
  np.testing.assert_allclose(_matrix(twice), dense[2:8, 2:8], atol=1e-13)


def test_unusable_keep_is_named(problem):
  hessian, _, _ = problem
  with pytest.raises(ValueError, match="'Conv'.*'Dense_0/bias', 'Dense_0/kernel'"):
    curvature.restricted(hessian, 'Conv')
  with pytest.raises(ValueError, match=r"keep='\(' is no regular expression"):
    curvature.restricted(hessian, '(')
  many = curvature.operator(lambda v: v, [jnp.ones(1)] * 10)
  with pytest.raises(ValueError, match="'5' and 4 more$"):
    curvature.restricted(many, 'x')


def test_adams_preconditioner_in_closed_form(x64):
  params, b1, b2, eps = _params(), 0.8, 0.95, 1e-3
  tx = optax.chain(
    optax.clip_by_global_norm(1e6),
    sam_jax.sam(0.1),
    optax.adamw(0.1, b1=b1, b2=b2, eps=eps),
  )
  state = tx.init(params)
  rng = np.random.default_rng(2)
  grads = [
    jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), params)
    for _ in range(3)
  ]
  for grad in grads:
    _, state = tx.update(grad, state, params, grad_fn=lambda _, g=grad: g)
  scale = curvature.adam_preconditioner(state, b1=b1, b2=b2, eps=eps)

  def expected(*history):
    v = sum((1 - b2) * b2 ** (2 - i) * np.square(g) for i, g in enumerate(history))
    return 1 / np.sqrt((1 - b1**3) * (np.sqrt(v / (1 - b2**3)) + eps))

  jax.tree.map(
    lambda x, *history: np.testing.assert_allclose(x, expected(*history), rtol=1e-12),
    scale,
    *grads,
  )


def test_one_step_of_adam_on_a_quadratic_is_stable_below_the_edge(x64):
  """With frozen second moments, Adam is stable iff the preconditioned top is below."""
  diagonal = jnp.array([4.0, 1.0, 0.25])
  nu = optax.ScaleByAdamState(
    count=jnp.array(10_000), mu=jnp.zeros(3), nu=jnp.array([1.0, 4.0, 1e-4])
  )
  scale = curvature.adam_preconditioner((nu,), eps=0.0)
  hessian = curvature.operator(lambda v: diagonal * v, diagonal)
  operator = curvature.preconditioned(hessian, scale)
  top = curvature.eigenpairs(operator, 1, 'largest', tol=1e-9).eigenvalues[0]
  # P^-1 H is diagonal too: 4 / 1, 1 / 2 and 0.25 / 0.01, over 1 - b2^t.
  np.testing.assert_allclose(top, 25 * np.sqrt(1 - 0.999**10_000), rtol=1e-9)


@pytest.mark.parametrize(
  ('tx', 'steps', 'message'),
  [
    (optax.sgd(0.1, momentum=0.9), 1, 'holds 0 states'),
    (optax.chain(optax.adam(0.1), optax.scale_by_adam()), 1, 'holds 2 states'),
    (optax.adam(0.1), 0, 'no update'),
  ],
)
def test_states_without_second_moments_are_refused(tx, steps, message):
  state = tx.init(jnp.ones(2))
  for _ in range(steps):
    _, state = tx.update(jnp.ones(2), state)
  with pytest.raises(ValueError, match=message):
    curvature.adam_preconditioner(state)
