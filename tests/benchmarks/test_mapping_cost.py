"""Both mappings of a step over one device take the same steps."""

import jax
import numpy as np

import tasks
from benchmarks import mapping_cost


def test_jit_and_pmap_end_at_the_same_parameters():
  config = tasks.resolve('digits_mlp', optimizer='sam', model='features=(4,)')
  states = {name: run() for name, run in mapping_cost.turns(config, steps=3).items()}
  assert int(states['jit'].step) == 3
  for plain, mapped in zip(
    *(jax.tree.leaves(states[name].params) for name in ('jit', 'pmap')), strict=True
  ):
    np.testing.assert_allclose(mapped[0], plain, rtol=1e-5, atol=1e-6)
