"""Accumulated gradients: against the whole batch, and against straight-line loops."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sam_jax

_METHODS = {
  'sam': sam_jax.sam(0.3),
  'asam': sam_jax.asam(0.5),
  'gsam': sam_jax.gsam(0.3, alpha=0.2),
  'looksam': sam_jax.looksam(0.3, every=2),
  'trace_sam': sam_jax.trace_sam(0.1),
}


def _data(size, dtype=np.float64):
  rng = np.random.default_rng(0)
  return {
    'x': rng.normal(size=(size, 5)).astype(dtype),
    'y': rng.normal(size=size).astype(dtype),
  }


def _params(dtype=np.float64):
  rng = np.random.default_rng(1)
  return {
    'kernel': jnp.asarray(rng.normal(size=(5, 4)), dtype),
    'out': jnp.asarray(rng.normal(size=4), dtype),
  }


def _losses(params, batch):
  return (jnp.tanh(batch['x'] @ params['kernel']) @ params['out'] - batch['y']) ** 2


def _loss(params, batch):
  return jnp.mean(_losses(params, batch))


def _close(got, expected, rtol=1e-12, atol=1e-13):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected
  )


@pytest.mark.parametrize('name', _METHODS)
def test_ten_steps_equal_those_of_the_whole_batch(name, x64):
  """The perturbed gradients are of the whole batch too, and so is what is recorded."""
  tx = optax.chain(_METHODS[name], optax.sgd(0.05, momentum=0.9))
  of_batch = jax.value_and_grad(_loss)
  accumulated = sam_jax.accumulate(of_batch)

  def step(function, state, batch):
    params, opt_state = state
    at = functools.partial(function, **batch)
    value, grads = at(params)
    updates, opt_state = tx.update(
      grads, opt_state, params, value=value, value_and_grad_fn=at
    )
    return (optax.apply_updates(params, updates), opt_state), value

  whole = jax.jit(functools.partial(step, lambda p, batch: of_batch(p, batch)))
  split = jax.jit(
    functools.partial(
      step, lambda p, batch: accumulated(p, sam_jax.microbatches(batch, 4))
    )
  )
  data = _data(24)
  states = [(_params(), tx.init(_params()))] * 2
  for _ in range(10):
    found = [f(s, {'batch': data}) for f, s in zip((whole, split), states, strict=True)]
    states = [state for state, _ in found]
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-12)
  _close(states[1][0], states[0][0])
  for field in ('gradient_norm', 'perturbed_loss', 'rho'):
    _close(*(optax.tree.get(state[1], field) for state in states))
  assert optax.tree.get(states[1][1], 'perturbed_loss') > 0


def test_m_sharpness_accumulates_each_group(x64):
  """Two groups of 12 in three microbatches each, against both groups in plain SAM."""
  data, params = _data(24), _params()
  groups = jax.tree.map(lambda x: jnp.stack(jnp.split(jnp.asarray(x), 2)), data)
  accumulated = sam_jax.accumulate(jax.value_and_grad(_loss))
  of_group = lambda p, group: accumulated(
    p, sam_jax.microbatches(jax.tree.map(lambda x: x[group], groups), 3)
  )
  tx = sam_jax.m_sharpness(sam_jax.sam(0.3), 2)
  update = jax.jit(lambda p: tx.update(p, tx.init(p), p, value_and_grad_fn=of_group))
  found, state = update(params)
  value_and_grad = jax.jit(jax.value_and_grad(_loss))
  perturbed = []
  for group in range(2):
    rows = jax.tree.map(lambda x, g=group: x[g], groups)
    _, clean = value_and_grad(params, rows)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(clean)))
    at = jax.tree.map(lambda w, g, n=norm: w + 0.3 * g / n, params, clean)
    perturbed.append(value_and_grad(at, rows))
  loss, mean = jax.tree.map(lambda a, b: (a + b) / 2, *perturbed)
  _close(found, mean)
  np.testing.assert_allclose(state.perturbed_loss, loss, rtol=1e-12)


def _masked(params, part):
  """The mean over the real examples, 0 / 0 where there are none."""
  kept = jnp.where(part['mask'], _losses(params, part), 0)
  return jnp.sum(kept) / jnp.sum(part['mask'])


_of_stack = jax.jit(sam_jax.accumulate(jax.value_and_grad(_masked)))
_of_all = jax.jit(jax.value_and_grad(_masked))


@given(
  counts=st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(any),
  dtype=st.sampled_from([np.int32, np.float32, np.float64]),
)
def test_weights_are_numbers_of_examples(counts, dtype):
  """Microbatches with unequal numbers of real examples, and with none."""
  with jax.enable_x64(True):
    flat = {**_data(24), 'mask': np.concatenate([np.arange(6) < n for n in counts])}
    stack = jax.tree.map(lambda x: x.reshape(4, 6, *x.shape[1:]), flat)
    _close(
      _of_stack(_params(), stack, np.array(counts, dtype)),
      _of_all(_params(), flat),
      rtol=1e-11,
    )


def test_nan_passes_unless_its_microbatch_weighs_nothing():
  data = _data(6, np.float32)
  data['y'][1] = np.nan  # In the second of three microbatches.
  stack = sam_jax.microbatches(data, 3)
  accumulated = sam_jax.accumulate(jax.value_and_grad(_loss))
  params = _params(np.float32)
  value, grads = accumulated(params, stack)
  assert np.isnan(value) and np.isnan(grads['out']).all()
  value, grads = accumulated(params, stack, jnp.array([1.0, 0.0, 1.0]))
  others = jax.tree.map(lambda x: np.concatenate([x[0], x[2]]), stack)
  _close((value, grads), jax.value_and_grad(_loss)(params, others), 1e-5, 1e-6)
  value, _ = accumulated(params, stack, jnp.array([1.0, np.nan, 1.0]))
  assert np.isnan(value)
  value, _ = accumulated(params, stack, jnp.zeros(3))  # No examples at all.
  assert np.isnan(value)
  _, grads = jax.jit(accumulated)(params, stack, jnp.array([2.0, 0.0, -1.0]))
  assert np.isnan(grads['out']).all()


@pytest.mark.parametrize('size', [1e-36, 2e38])
def test_large_and_small_weights_are_shares_all_the_same(size):
  stack, params = sam_jax.microbatches(_data(6, np.float32), 3), _params(np.float32)
  accumulated = sam_jax.accumulate(jax.value_and_grad(_loss))
  weights = np.array([1.0, 0.5, 1.0])
  got = accumulated(params, stack, size * weights)
  _close(got, accumulated(params, stack, weights), 1e-5, 1e-6)


def test_half_precision_is_summed_in_float32():
  """In bfloat16 a sum of 256 and ones stays 256."""
  parts = jnp.array([256.0] + [1.0] * 63, jnp.bfloat16)[:, None]
  linear = lambda w, part: jnp.sum(w * part)
  value, grads = sam_jax.accumulate(jax.value_and_grad(linear))(
    jnp.ones(1, jnp.bfloat16), parts
  )
  assert value.dtype == grads.dtype == jnp.bfloat16
  expected = jnp.bfloat16((256 + 63) / 64)
  assert value == expected and grads[0] == expected
  eager = jnp.bfloat16(0)
  for part in parts[:, 0]:
    eager += part
  assert eager / 64 != expected  # So that the test can fail.


def test_microbatches_are_every_kth_example():
  batch = {
    'x': np.arange(12).reshape(6, 2),
    'key': jax.random.split(jax.random.key(0), 6),
  }
  found = sam_jax.microbatches(batch, 3)
  for j in range(3):
    np.testing.assert_array_equal(found['x'][j], batch['x'][j::3])
    assert (found['key'][j] == batch['key'][j::3]).all()


def test_each_microbatch_has_a_dropout_key_the_same_in_both_passes():
  """At a vanishing radius the perturbed pass repeats the clean one, masks included."""
  dropout = nn.Dropout(0.5, deterministic=False)

  def loss(params, part):
    x, key = part
    hidden = dropout.apply({}, jnp.tanh(x @ params['kernel']), rngs={'dropout': key})
    return jnp.mean((hidden @ params['out']) ** 2)

  x = jnp.ones((4, 3, 5))  # The same examples: only their masks differ.
  keys = jax.random.split(jax.random.key(3), 4)
  params = _params(np.float32)
  accumulated = jax.jit(sam_jax.accumulate(jax.value_and_grad(loss)))
  value, grads = accumulated(params, (x, keys))
  tx = sam_jax.sam(1e-7)
  _, state = tx.update(
    grads,
    tx.init(params),
    params,
    value_and_grad_fn=lambda p: accumulated(p, (x, keys)),
  )
  np.testing.assert_allclose(state.perturbed_loss, value, rtol=1e-5)
  loss = jax.jit(loss)
  by_hand = [float(loss(params, (x[j], keys[j]))) for j in range(4)]
  np.testing.assert_allclose(value, np.mean(by_hand), rtol=1e-5)
  assert np.std(by_hand) > 1e-3


def test_aux_is_stacked_and_its_mean_is_one_update_of_running_statistics():
  """Of flax's batch statistics: 0.9 old + 0.1 mean of the microbatches' own."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
      return nn.Dense(1)(x)[:, 0]

  model, data = Net(), _data(12, np.float32)
  variables = model.init(jax.random.key(0), data['x'])
  params, stats = variables['params'], variables['batch_stats']

  def loss(params, batch):
    found, new = model.apply(
      {'params': params, 'batch_stats': stats}, batch['x'], mutable=['batch_stats']
    )
    return jnp.mean((found - batch['y']) ** 2), new['batch_stats']

  function = jax.value_and_grad(loss, has_aux=True)
  accumulated = jax.jit(sam_jax.accumulate(function, has_aux=True))
  parts = sam_jax.microbatches(data, 3)
  (value, stacked), grads = accumulated(params, parts)
  singly = [
    function(params, jax.tree.map(lambda x, j=j: x[j], parts)) for j in range(3)
  ]
  np.testing.assert_allclose(value, np.mean([v for (v, _), _ in singly]), rtol=1e-5)
  _close(
    grads, jax.tree.map(lambda *g: sum(g) / 3, *(g for _, g in singly)), 1e-4, 1e-6
  )
  (new,) = jax.tree.map(lambda x: x.mean(axis=0), stacked).values()
  for name, start, own in (('mean', 0.0, np.mean), ('var', 1.0, np.var)):
    expected = 0.9 * start + 0.1 * np.mean(own(parts['x'], axis=1), axis=0)
    np.testing.assert_allclose(new[name], expected, rtol=1e-4, atol=1e-6)


def test_it_is_mapped_unrolled_and_differentiated(x64):
  params, parts = _params(), sam_jax.microbatches(_data(6), 3)
  function = jax.value_and_grad(_loss)
  accumulated = sam_jax.accumulate(function)
  expected = function(params, _data(6))
  _close(sam_jax.accumulate(function, unroll=True)(params, parts), expected)
  twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  mapped = jax.vmap(accumulated, (0, None))(twice, parts)
  _close(jax.tree.map(lambda x: x[0], mapped), expected)
  vector = _params()
  hvp = jax.jvp(lambda p: accumulated(p, parts)[1], (params,), (vector,))[1]
  _close(hvp, sam_jax.hvp(lambda p: _loss(p, _data(6)), params, vector))


@pytest.mark.parametrize('checked', [True, False])
def test_devices_accumulate_their_own_share(checked, x64):
  """Under jax.shard_map, with and without the tracking of what varies."""
  mesh = jax.make_mesh((2,), ('batch',))
  spec = jax.sharding.PartitionSpec
  tx = optax.chain(
    sam_jax.cross_replica_mean('batch', keep_varying=True),
    sam_jax.sam(0.3, axis_name='batch'),
    sam_jax.cross_replica_mean('batch'),
  )
  params, data = _params(), _data(12)
  accumulated = sam_jax.accumulate(jax.value_and_grad(_loss))

  def step(params, batch):
    parts = sam_jax.microbatches(batch, 3)
    at = lambda p: accumulated(p, parts)
    local = params
    if checked:
      local = jax.tree.map(lambda x: jax.lax.pcast(x, 'batch', to='varying'), params)
    _, grads = at(local)
    updates, _ = tx.update(grads, tx.init(params), params, value_and_grad_fn=at)
    return updates

  mapped = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(spec(), spec('batch')),
    out_specs=spec(),
    check_vma=checked,
  )
  whole = jax.value_and_grad(_loss)
  alone = sam_jax.sam(0.3)
  expected, _ = alone.update(
    whole(params, data)[1],
    alone.init(params),
    params,
    value_and_grad_fn=lambda p: whole(p, data),
  )
  placed = jax.device_put(data, jax.sharding.NamedSharding(mesh, spec('batch')))
  _close(jax.jit(mapped)(params, placed), expected)


def test_sharded_examples_stay_on_their_devices():
  """No collective moves examples: the split is local, what is summed are gradients."""
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  data = jax.device_put(_data(32, np.float32), rows)
  accumulated = sam_jax.accumulate(jax.value_and_grad(_loss))
  function = jax.jit(lambda p, batch: accumulated(p, sam_jax.microbatches(batch, 4)))
  text = function.lower(_params(np.float32), data).compile().as_text()
  assert 'all-reduce' in text
  assert 'all-gather' not in text and 'all-to-all' not in text
  assert 'collective-permute' not in text


@pytest.mark.parametrize(
  ('call', 'error', 'words'),
  [
    (lambda: sam_jax.accumulate(3.0), TypeError, 'must be a function .* got float'),
    (lambda: sam_jax.microbatches(np.ones(6), 4), ValueError, 'num=4 .* 6 examples'),
    (lambda: sam_jax.microbatches(np.ones(6), 0), ValueError, 'num must be at least 1'),
    (lambda: sam_jax.microbatches(np.ones(6), 2.0), TypeError, 'whole number, got 2.0'),
    (lambda: sam_jax.microbatches({}, 2), ValueError, 'batch has no arrays'),
    (
      lambda: sam_jax.microbatches({'x': np.ones(6), 'y': np.ones(5)}, 2),
      ValueError,
      r"at \['x'\] it is \(6,\), at \['y'\] \(5,\)",
    ),
    (lambda: sam_jax.microbatches(1.0, 1), ValueError, 'leading axis of the examples'),
    (lambda: _call(jax.grad(_sum)), TypeError, r'return \(value, grads\)'),
    (lambda: _call(jax.value_and_grad(_with_aux, has_aux=True)), TypeError, 'has_aux'),
    (lambda: _call(jax.value_and_grad(_sum), has_aux=True), TypeError, 'in place of'),
    (lambda: _call(lambda w, x: (x, w)), TypeError, r'scalar value, got shape \(2,\)'),
    (lambda: _call(_of_sum, weights=[1, 2]), ValueError, r'shape \(3,\), .* \(2,\)'),
    (lambda: _call(_of_sum, weights=[1, 2, -1]), ValueError, 'not be negative'),
    (
      lambda: _call(_of_sum, weights=['1', '2', '3']),
      TypeError,
      'weights must be real',
    ),
    (lambda: _call(_of_sum, weights=np.array([1j, 1, 1])), TypeError, 'got complex128'),
    (lambda: _call(lambda w, x: (7, w)), TypeError, 'floating-point value, got int32'),
    (lambda: _call(lambda w, x: (1j * w, w)), TypeError, 'value, got complex64'),
    (
      lambda: _call(lambda w, x: (w, {'n': jnp.int32(3)})),
      TypeError,
      r"gradients, got int32 at \['n'\]: differentiate by",
    ),
    (lambda: _call(_of_sum, parts=np.ones((0, 2))), ValueError, 'is empty'),
  ],
)
def test_what_cannot_be_is_named(call, error, words):
  with pytest.raises(error, match=words):
    call()


def _sum(w, x):
  return jnp.sum(w * x)


def _with_aux(w, x):
  return jnp.sum(w * x), x


_of_sum = jax.value_and_grad(_sum)


def _call(function, parts=None, weights=None, **options):
  parts = np.ones((3, 2), np.float32) if parts is None else parts
  return sam_jax.accumulate(function, **options)(jnp.float32(1), parts, weights)
