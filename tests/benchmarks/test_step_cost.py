"""The cost of a step: counted as by hand, and printed to be read."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_cost


def test_a_row_a_method(capsys):
  step_cost.main(
    ['--optimizers=sam', '--repeats=1', '--hessian_batch_size=0', '--peak_tflops=0.5']
  )
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 88
  assert 'a step of 32 examples' in lines[1] and 'peak 0.5 TFLOP/s' in lines[1]
  rows = {line.split()[0]: line.replace(',', '').split()[1:] for line in lines[3:5]}
  values = {name: list(map(float, row)) for name, row in rows.items()}
  for milliseconds, _, speed, megaflops, _, _, _, peak in values.values():
    assert speed == pytest.approx(32e3 / milliseconds, rel=0.05)
    share = megaflops * 1e6 / (milliseconds * 1e-3) / 0.5e12
    assert peak == pytest.approx(100 * share, rel=0.05, abs=0.01)
  # Products of 64-64-64-10: forward and weights', and inputs' but for the first layer.
  by_hand = 2 * 32 * (2 * 64 * 64 + 3 * 64 * 64 + 3 * 64 * 10) / 1e6
  assert values['sgd'][3] == pytest.approx(by_hand, rel=0.15)
  assert values['sam'][4] == pytest.approx(2, abs=0.05)
  # SAM holds at most one further tree of the size of the parameters.
  assert values['sgd'][6] == 0 and values['sam'][6] <= 1


def test_memory_is_what_arguments_results_and_temporaries_take():
  x = jnp.zeros((256, 256))
  size = x.size * 4
  plain = jax.jit(lambda x: x + 1).lower(x).compile()
  assert step_cost.memory(plain) == 2 * size
  given = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
  assert step_cost.memory(given) == size
