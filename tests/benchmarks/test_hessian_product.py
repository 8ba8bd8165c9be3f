"""Products of a language model: FLOPs counted as the compiler does, and printed."""

import jax
import numpy as np
import pytest

from benchmarks import hessian_product, step_cost
from models import LanguageModel


def test_flops_of_a_pass_are_those_of_the_compiler():
  model = LanguageModel(
    vocabulary=512, features=64, num_layers=2, num_heads=2, head_features=32
  )
  tokens = np.zeros((2, 32), np.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  forward = lambda p: model.apply({'params': p}, tokens)
  counted = step_cost.flops(jax.jit(forward).lower(params).compile())
  formula = hessian_product.forward_flops(model, tokens.size, 32)
  assert counted == pytest.approx(formula, rel=0.05)


def test_a_row_of_each_and_the_eigenvalues(capsys):
  hessian_product.main(
    ['--width=8', '--layers=1', '--heads=1', '--vocabulary=16', '--length=8']
    + ['--batch_size=2', '--chunk=8', '--repeats=1', '--top=1']
  )
  lines = capsys.readouterr().out.splitlines()
  assert 'a batch of 2 x 8' in lines[0] and max(map(len, lines)) <= 88
  rows = {line[2:29].strip(): line[29:].split() for line in lines[2:5]}
  assert list(rows) == ['gradient', 'product', 'product, linearization kept']
  assert all(float(x) >= 0 for row in rows.values() for x in row)
  assert lines[-2].startswith('  top 1: ') and 'residuals at most' in lines[-1]


def test_flops_of_a_residual_network_are_counted(capsys):
  flags = ['--depth=10', '--pixels=16', '--batch_size=1', '--repeats=1']
  hessian_product.main(flags)
  lines = capsys.readouterr().out.splitlines()
  ratios = [float(line[29:].split()[2]) for line in lines[2:5]]
  assert ratios[0] == 1 and ratios[1] > ratios[2] > 1.5


@pytest.mark.parametrize('flags', [['--width=30', '--heads=4'], ['--depth=7']])
def test_networks_that_there_are_not_are_refused(flags, capsys):
  with pytest.raises(SystemExit):
    hessian_product.main(flags)
  assert flags[-1].partition('=')[0] in capsys.readouterr().err
