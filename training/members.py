"""The members of a population as one program over their stacked states."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from training.feeding import Source
from training.step import Metrics, Stepper, TrainState

AXIS = 'members'
# Name of the step at which each member died, among the metrics of a step.
DIED = 'died'
# How one device goes through its members: side by side, or one after the other.
MAPPINGS = ('vmap', 'map')
# Fewest and most steps that are timed, and what is enough: others use the cores too.
_TIMED_STEPS, _TIMED_SECONDS = (3, 100), 1.0


class Population(NamedTuple):
  """The stacked states of some members.

  Attributes:
    step: int32, steps that the population has done.
    members: `TrainState`s along a leading axis of every leaf.
    died: int32 (members,), the step whose metrics or parameters were not finite; 0
      while there is none. The member stays as it was before that step.
  """

  step: jax.Array
  members: TrainState
  died: jax.Array


class Members:
  """The compiled functions of a population, and where its arrays lie.

  Every member does what `Stepper` does of a single run on one device: the functions of
  a population are those of the stepper, mapped over the leading axis of its state. Over
  several devices the members are dealt out evenly, and no device needs another.

  Attributes:
    count: number of members.
    num_devices: devices that they are dealt out to, the most that divide them.
    train: by the phase of a periodic method (None for all others) the compiled step
      ``(state, arrays, items) -> (state, metrics)``, which consumes its state. Arrays
      and items are a `feeding.Source`'s, the items with a leading axis of members; so
      have the metrics, `DIED` among them.
  """

  def __init__(
    self,
    stepper: Stepper,
    count: int,
    devices: Sequence[jax.Device],
    mapping: str = 'vmap',
  ):
    """Takes the step of a member.

    Args:
      stepper: of any member's configuration, without an axis name.
      count: number of members.
      devices: devices to choose from.
      mapping: 'vmap' computes a device's members side by side, 'map' one after the
        other in a loop (`jax.lax.map`).
    """
    self.count, self._stepper, self._mapping = count, stepper, mapping
    self.num_devices = max(
      d for d in range(1, min(count, len(devices)) + 1) if count % d == 0
    )
    if self.num_devices == 1:
      self._mesh = None
      self._shared = self._dealt = SingleDeviceSharding(devices[0])
    else:
      self._mesh = Mesh(np.array(devices[: self.num_devices]), (AXIS,))
      self._shared = NamedSharding(self._mesh, P())
      self._dealt = NamedSharding(self._mesh, P(AXIS))
    state = Population(P(), P(AXIS), P(AXIS))
    self.train = {
      phase: jax.jit(
        self._spread(
          functools.partial(self._train_all, phase),
          (state, P(), P(AXIS)),
          (state, P(AXIS)),
        ),
        donate_argnums=0,
      )
      for phase in (None, False, True)
    }
    self._evaluate = jax.jit(
      self._spread(self._evaluate_all, (P(AXIS), P(), P()), P(AXIS))
    )

  def init(
    self,
    seeds: Sequence[int],
    hyperparams: Mapping[str, Sequence[float]],
    dtype: Any = None,
  ) -> Population:
    """The states before the first step, each as that of a single run.

    Args:
      seeds: of the members.
      hyperparams: what differs between them by name, see `TrainState`.
      dtype: of the parameters; the model's own by default.
    """
    make = lambda args: self._stepper.init(*args, dtype)
    given = {n: jnp.asarray(x, jnp.result_type(float)) for n, x in hyperparams.items()}
    members = jax.jit(lambda *args: jax.lax.map(make, args))(jnp.array(seeds), given)
    return self.place(Population(np.int32(0), members, np.zeros(self.count, np.int32)))

  def shapes(self, names: Iterable[str]) -> Population:
    """Shapes and types of a population whose members differ in what is named."""
    given = {name: jax.ShapeDtypeStruct((), jnp.result_type(float)) for name in names}
    one = jax.eval_shape(self._stepper.init, 0, given)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    stack = lambda x: jax.ShapeDtypeStruct((self.count, *x.shape), x.dtype)
    return Population(number, jax.tree.map(stack, one), stack(number))

  def time(
    self, phase: bool | None, state: Population, arrays: Any, items: Any
  ) -> float:
    """Seconds that a compiled step takes: the least of many, on copies of a state."""
    state, seconds = jax.tree.map(jnp.copy, state), []
    while len(seconds) < 1 + _TIMED_STEPS[0] or (
      sum(seconds[1:]) < _TIMED_SECONDS and len(seconds) < 1 + _TIMED_STEPS[1]
    ):
      before = time.perf_counter()
      state, metrics = jax.block_until_ready(self.train[phase](state, arrays, items))
      seconds.append(time.perf_counter() - before)
    return min(seconds[1:])  # The first one compiles.

  def place(self, state: Population) -> Population:
    """Moves a population to the devices."""
    return Population(
      self.place_shared(state.step), *map(self.place_dealt, (state.members, state.died))
    )

  def place_shared(self, tree: Any) -> Any:
    """Copies to every device what all members share."""
    return jax.device_put(tree, self._shared)

  def place_dealt(self, tree: Any) -> Any:
    """Deals out to the devices what has a leading axis of members."""
    return jax.device_put(tree, self._dealt)

  def evaluate(self, members: TrainState, arrays: Any, item: Any) -> Metrics:
    """Sums over one batch, the same for all, in evaluation mode."""
    return self._evaluate((members.params, members.batch_stats), arrays, item)

  def _spread(self, function, in_specs, out_specs):
    """Each device's own members; there is nothing that they have to tell each other."""
    if self._mesh is None:
      return function
    return jax.shard_map(
      function,
      mesh=self._mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )

  def _each(self, function, *args):
    if self._mapping == 'vmap':
      return jax.vmap(function)(*args)
    return jax.lax.map(lambda xs: function(*xs), args)

  def _train_all(self, phase, state, arrays, items):
    def one(member, died, item):
      batch = Source.batch(arrays, item)
      new, metrics = self._stepper.train(member, batch, phase=phase)
      good = _all_finite((metrics, new.params))
      going = (died == 0) & good
      new = jax.tree.map(lambda a, b: jnp.where(going, a, b), new, member)
      died = jnp.where((died == 0) & ~good, state.step + 1, died)
      return new, died, metrics

    members, died, metrics = self._each(one, state.members, state.died, items)
    return Population(state.step + 1, members, died), {**metrics, DIED: died}

  def _evaluate_all(self, variables, arrays, item):
    batch = Source.batch(arrays, item)
    return self._each(lambda own: self._stepper.evaluate(own, batch), variables)


def _all_finite(tree: Any) -> jax.Array:
  """Whether every number of a tree is finite."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def unstack(members: TrainState, index: int) -> TrainState:
  """One member as a single run stores it, without `hyperparams`.

  Args:
    members: stacked states, as `fetch` makes them.
    index: of the member.
  """
  return jax.tree.map(lambda leaf: leaf[index], members)._replace(hyperparams={})


def fetch(members: TrainState) -> TrainState:
  """Stacked states in NumPy, but for their typed keys."""
  is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), members)
