"""A network with batch normalization and dropout that was not trained, and its data."""

import dataclasses
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import measurements
import training
from input_pipelines import ArraySplit
from training import problem as problem_lib
from training import scores

CONFIG = training.Config(optimizer='sgd', base_optimizer='sgd', batch_size=8)
OPTIONS = measurements.Options(
  dtype='float64',
  tol=1e-8,
  top_k=2,
  batch_size=10,
  num_matvecs=6,
  num_probes=2,
  trace_matvecs=10,
  landscape_points=0,
  one_batch_repeats=0,
  worst_case_rho=0.0,
  average_case_sigma=0.0,
)


class SmallNetwork(nn.Module):
  """Dense, batch normalization, dropout, dense."""

  dropout_rate: float = 0.3

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.Dense(8)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.tanh(x))
    return nn.Dense(3)(x)


def split(num_examples, seed=0):
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(num_examples, 5)).astype(np.float32)
  labels = (inputs[:, 0] > 0).astype(np.int32) + (inputs[:, 1] > 0.5)
  return ArraySplit(inputs, labels)


def trained(problem, config=CONFIG):
  """A network of a problem, as if it came from a checkpoint."""
  variables = problem.model.init(jax.random.key(0), problem.example_inputs)
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
    variables['params'],
  )
  stats = jax.tree.map(lambda x: x + 0.3, variables.get('batch_stats', {}))
  return measurements.Network(
    config, problem, params, stats, 7, {}, pathlib.Path('run')
  )


def dense(network):
  """What each example adds to each kind of matrix, (n, p, p), and the parameters."""
  with jax.enable_x64(True):
    problem = network.problem
    batch = next(problem.train.batches(1000).epoch(0))
    wide = problem_lib.cast({'inputs': batch['inputs']}, 'float64')
    batch = {**batch, **wide}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.params)
    flat, unravel = ravel_pytree(params)

    def outputs(w):
      stats = network.batch_stats
      found = problem_lib.outputs(problem.model, unravel(w), stats, batch['inputs'])[0]
      return found.reshape(found.shape[0], -1)

    shape = jax.eval_shape(
      problem.model.apply,
      {'params': params, 'batch_stats': network.batch_stats},
      batch['inputs'],
    ).shape

    def losses(z):
      return problem.example_losses(z.reshape(shape), batch)

    # The loss of an example depends on its own outputs only: the sum's blocks.
    at = outputs(flat)
    blocks = jax.jit(jax.hessian(lambda z: losses(z).sum()))(at)
    curved = jnp.stack([blocks[i, :, i] for i in range(len(at))])
    jacobian = jax.jit(jax.jacobian(outputs))(flat)
    gradients = jax.jit(jax.jacobian(lambda w: losses(outputs(w))))(flat)
    return {
      'flat': np.asarray(flat),
      'unravel': unravel,
      'paths': np.repeat(
        _paths(params), [leaf.size for leaf in jax.tree.leaves(params)]
      ),
      'hessian': np.asarray(jax.jit(jax.hessian(lambda w: losses(outputs(w))))(flat)),
      'gauss_newton': np.asarray(
        jnp.einsum('nci,ncd,ndj->nij', jacobian, curved, jacobian)
      ),
      'fisher': np.asarray(jnp.einsum('ni,nj->nij', gradients, gradients)),
    }


def _paths(params):
  leaves = jax.tree.leaves_with_path(params)
  return [jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in leaves]


@pytest.fixture(scope='session')
def network():
  problem = training.Problem(
    model=SmallNetwork(),
    train=split(22),
    test=split(13, seed=1),
    example_losses=scores.smoothed_kl(0.1),
    scores=training.Classification(3),
    example_inputs=np.zeros((1, 5), np.float32),
  )
  return trained(problem)


@pytest.fixture(scope='session')
def matrices(network):
  return dense(network)


@pytest.fixture(scope='session')
def fast():
  """Options of a small measurement, and what makes others of them."""
  return types.SimpleNamespace(
    options=OPTIONS,
    but=lambda **changes: dataclasses.replace(OPTIONS, **changes),
    trained=trained,
    dense=dense,
  )
