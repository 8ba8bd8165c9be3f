"""The cost model against compiled programs, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_jax
import tasks
from benchmarks import collectives, cost_model
from training import parallel, sharing, step

_DEVICES = 8


def _of_training(**fields):
  """What a compiled step of the loop moves, and its number of parameters."""
  config = tasks.resolve('digits_mlp', **fields)
  problem = tasks.build(config)
  replicas = parallel.DataParallel(_DEVICES)
  shared = sharing.of(config, _DEVICES)
  stepper = step.Stepper(problem, config, 2, shared, replicas.axis_name)
  state = jax.eval_shape(lambda: stepper.init(0))
  size = sum(x.size for x in jax.tree.leaves(state.params))
  axes = (*replicas.axes, *shared.axes)
  batch = next(problem.train.batches(config.batch_size, shards=axes).epoch(0))
  stack = lambda x: jax.ShapeDtypeStruct((_DEVICES, *x.shape), x.dtype)
  mapped = replicas.map(stepper.train, donate=True)
  compiled = mapped.lower(jax.tree.map(stack, state), batch).compile()
  return [x.entries for x in collectives.of(compiled)], size


@pytest.mark.parametrize(
  ('fields', 'method'),
  [
    ({'optimizer': 'sgd'}, 'sgd'),
    ({'optimizer': 'sam'}, 'sam'),
    ({'optimizer': 'sam', 'm_sharpness': 4}, 'sam, a perturbation a device'),
  ],
)
def test_replicas_reduce_as_many_gradients_as_the_model_says(fields, method):
  entries, size = _of_training(**fields)
  devices = cost_model.Devices(_DEVICES)
  reductions = cost_model.METHODS[method].reductions
  moved = cost_model.moved(size, devices, reductions)
  assert moved['all-gather'] == moved['reduce-scatter'] == 0
  gradients = [n for n in entries if n >= size]
  assert len(gradients) == reductions
  # Beside them travel a few scalars.
  assert moved['all-reduce'] <= sum(entries) <= moved['all-reduce'] + 8


def _loss(params, x):
  for kernel in params.values():
    x = jnp.tanh(x @ kernel)
  return jnp.mean(x**2)


def _remat_loss(params, x):
  for kernel in params.values():
    x = jax.checkpoint(lambda x, kernel: jnp.tanh(x @ kernel))(x, kernel)
  return jnp.mean(x**2)


@pytest.mark.parametrize('shape', [(4, 2), (1, 8)])
@pytest.mark.parametrize('gathers', [1, 2])
def test_a_sharded_step_moves_what_the_model_says(shape, gathers):
  """With activations larger than the parameters, which therefore are what travels.

  On the CPU a reduce-scatter is an all-reduce of all entries, cut down.
  """
  mesh = jax.make_mesh(shape, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  place = NamedSharding(mesh, P(None, 'fsdp')), NamedSharding(mesh, P('fsdp'))
  shapes = {'a': (64, 128), 'b': (128, 64), 'c': (64, 64)}
  params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
  places = {name: place[s[0] > s[1]] for name, s in shapes.items()}
  rows = NamedSharding(mesh, P(('data', 'fsdp')))
  loss = _loss if gathers == 1 else _remat_loss
  tx = optax.chain(sam_jax.sam(0.1), optax.sgd(0.1))

  def train_step(params, x):
    grad_fn = functools.partial(jax.grad(loss), x=x)
    state = tx.init(params)
    updates, _ = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates)

  mapped = jax.jit(train_step, in_shardings=(places, rows), out_shardings=places)
  compiled = mapped.lower(params, jax.ShapeDtypeStruct((4096, 64), jnp.float32))
  found = {'all-gather': 0, 'all-reduce': 0}
  for kind, entries, num_bytes in collectives.of(compiled.compile()):
    found[kind] += entries
    assert num_bytes == 4 * entries
  devices, size = cost_model.Devices(*shape), sum(map(np.prod, shapes.values()))
  moved = cost_model.moved(size, devices, 2, gathers)
  assert found['all-gather'] == moved['all-gather']
  scattered = moved['reduce-scatter'] * devices.fsdp
  assert found['all-reduce'] == pytest.approx(scattered + moved['all-reduce'], abs=8)


def test_bytes_sent_by_hand():
  sent = functools.partial(cost_model.sent, 1200.0)
  assert sent(cost_model.Devices(), 2) == 0
  assert sent(cost_model.Devices(4), 2) == 2 * 2 * 3 / 4 * 1200
  # Gathered twice and scattered once over 3 devices, then reduced over 2 in thirds.
  assert sent(cost_model.Devices(2, 3), 1) == 3 * 2 / 3 * 1200 + 2 / 2 * 1200 / 3


def test_the_plans_fit_a_page(capsys):
  cost_model.main(['--batch_size=1024'])
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2 + 18 + 1 + 2 + 6 and max(map(len, lines)) <= 102
  assert 'A step over 1,024 examples' in lines[0]


@pytest.mark.parametrize(
  ('flag', 'sentence'),
  [
    ('--batch_size=-5', 'at least 512'),
    ('--tokens=0', 'at least 512'),
    ('--efficiency=3', 'at most 1'),
    ('--gigabytes_per_second=0', 'above 0'),
  ],
)
def test_plans_that_mean_nothing_are_refused(flag, sentence, capsys):
  with pytest.raises(SystemExit):
    cost_model.main([flag])
  assert sentence in capsys.readouterr().err
