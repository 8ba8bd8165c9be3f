"""Ten float64 steps of several methods: a script for several processes, and its cases.

  python replicas.py OUT CASES COORDINATOR NUM_PROCESSES PROCESS_ID

writes every process's whole states, all replicas of them, to OUT/CASE_PROCESS.npz.
"""

import functools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

import tasks
from input_pipelines import ArraySplit, GraphSplit
from models import GCN, WideResNet
from training import (
  Classification,
  Problem,
  cli,
  feeding,
  optimizers,
  parallel,
  peers,
)
from training import sharing as sharing_lib
from training import step as step_lib
from training.scores import smoothed_kl

NUM_STEPS = 10
METHODS = {
  'sgd': {'optimizer': 'sgd', 'base_optimizer': 'sgd'},
  'sam': {'optimizer': 'sam', 'rho': 0.2},
  'sam_per_group': {'optimizer': 'sam', 'rho': 0.2},
  'asam': {'optimizer': 'asam', 'rho': 0.5},
  'looksam': {'optimizer': 'looksam', 'rho': 0.2, 'looksam_every': 3},
}


class Network(nn.Module):
  """Dense, batch normalization, dropout, dense."""

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
    x = nn.Dropout(0.3, deterministic=not train)(nn.tanh(x))
    return nn.Dense(3)(x)


def _rows(num, shape):
  inputs = np.random.default_rng(0).normal(size=(num, *shape))
  means = inputs.reshape(num, -1)
  return ArraySplit(inputs, (means[:, 0] > 0).astype(np.int32) + (means[:, 1] > 0.5))


def _graphs(num):
  """Rings, whose labels say which of two kinds of nodes most are."""
  rng = np.random.default_rng(0)
  n_node = rng.integers(3, 9, num)
  kinds = rng.integers(0, 2, n_node.sum())
  first = np.repeat(np.cumsum(n_node) - n_node, n_node)
  one = np.arange(n_node.sum())
  other = first + (one - first + 1) % np.repeat(n_node, n_node)
  graphs = jraph.GraphsTuple(
    nodes=np.eye(2)[kinds],
    edges=None,
    senders=np.concatenate([one, other]),
    receivers=np.concatenate([other, one]),
    n_node=n_node,
    n_edge=2 * n_node,
    globals=None,
  )
  # Edges of a graph have to stand together.
  order = np.argsort(np.repeat(np.arange(num), n_node)[graphs.senders], kind='stable')
  graphs = graphs._replace(
    senders=graphs.senders[order], receivers=graphs.receivers[order]
  )
  owners = np.repeat(np.arange(num), n_node)
  labels = np.bincount(owners, kinds, num) / n_node > 0.5
  return GraphSplit(graphs, labels.astype(np.int32))


def problem_of(network):
  """The problem with a small network: mlp, gcn or wrn."""
  if network == 'mlp':
    model, split, example = Network(), _rows(53, (5,)), np.zeros((1, 5))
  elif network == 'wrn':
    model = WideResNet(num_classes=3, depth=10, width=1)
    split, example = _rows(53, (8, 8, 3)), np.zeros((1, 8, 8, 3))
  else:
    model = GCN(num_classes=2, features=(8, 8), hidden_features=8, dropout_rate=0.3)
    split = _graphs(53)
    example = next(split.batches(1).epoch(0))['inputs']
  classes = 2 if network == 'gcn' else 3
  return Problem(
    model=model,
    train=split,
    test=split,
    example_losses=smoothed_kl(0.1),
    scores=Classification(classes),
    example_inputs=example,
  )


def config_of(method, num_replicas):
  """Its configuration; every second batch is of 21 examples, unequally dealt."""
  fields = {'base_optimizer': 'momentum', 'learning_rate': 0.1, **METHODS[method]}
  if method == 'sam_per_group':
    fields['m_sharpness'] = 32 // num_replicas
  return tasks.resolve(
    'digits_mlp', **fields, batch_size=32, weight_decay=0.01, schedule='constant'
  )


def states(case, num_replicas, mapping, feed_of):
  """The state before, and after each of the steps, of a case 'method network'.

  Args:
    case: which.
    num_replicas: over all processes.
    mapping: maps a step over the replicas.
    feed_of: makes a function of (batches, epoch) that yields batches, from a split.
  """
  method, network = case.split()
  problem, config = problem_of(network), config_of(method, num_replicas)
  shared = sharing_lib.of(config, num_replicas)
  batches = problem.train.batches(32, shards=(num_replicas, *shared.axes), seed=0)
  stepper = step_lib.Stepper(
    problem, config, batches.steps_per_epoch, shared, parallel.AXIS
  )
  state = jax.jit(functools.partial(stepper.init, dtype=jnp.float64))(0)
  yield state
  steps = {
    phase: mapping(functools.partial(stepper.train, phase=phase))
    for phase in (None, False, True)
  }
  number, feed = 0, feed_of(problem.train)
  while True:
    for batch in feed(batches, number // batches.steps_per_epoch):
      phase = optimizers.phase(config, batches.steps_per_epoch, number)
      state, _ = steps[phase](state, batch)
      yield state
      number += 1
      if number == NUM_STEPS:
        return


def leaves(tree):
  """Leaves as NumPy arrays, typed keys as their data; a mapped one's local part."""
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  found = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
  return [np.concatenate([s.data for s in x.addressable_shards]) for x in found]


def main(out, cases, coordinator, num_processes, process_id):
  """Runs the cases in this process of several."""
  jax.config.update('jax_enable_x64', True)
  parallel.initialize(coordinator, int(num_processes), int(process_id))
  replicas = parallel.DataParallel()
  for case in cases.split(','):
    resident = case.startswith('sam_per_group')  # The two ways to feed.
    feed_of = lambda split, r=resident: (
      feeding.Feed(split, replicas, resident=r and hasattr(split, 'arrays')).epoch
    )
    found = states(case, replicas.num_replicas, _Placing(replicas), feed_of)
    for state in found:
      last = state
    np.savez(pathlib.Path(out) / f'{case}_{process_id}.npz', *leaves(last))


class _Placing:
  """Maps a step of replicas, and spreads the first state that it takes."""

  def __init__(self, replicas):
    self._replicas = replicas

  def __call__(self, step):
    mapped = self._replicas.map(step, donate=True)

    def run(state, batch):
      if not jnp.ndim(state.step):
        state = self._replicas.place(self._replicas.replicate(state))
      return mapped(state, batch)

    return run


if __name__ == '__main__':
  run = lambda argv: main(*argv[1:])
  sys.exit(peers.together(cli.run, run, sys.argv))
