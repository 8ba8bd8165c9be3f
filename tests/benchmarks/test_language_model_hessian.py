"""Products of a language model: FLOPs counted as the compiler does, and printed."""

import jax
import numpy as np
import pytest

from benchmarks import language_model_hessian, step_cost
from models import LanguageModel


def test_flops_of_a_pass_are_those_of_the_compiler():
  model = LanguageModel(
    vocabulary=512, features=64, num_layers=2, num_heads=2, head_features=32
  )
  tokens = np.zeros((2, 32), np.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  forward = lambda p: model.apply({'params': p}, tokens)
  counted = step_cost.flops(jax.jit(forward).lower(params).compile())
  formula = language_model_hessian.forward_flops(model, tokens.size, 32)
  assert counted == pytest.approx(formula, rel=0.05)


def test_a_row_of_each_and_the_eigenvalues(capsys):
  language_model_hessian.main(
    ['--width=8', '--layers=1', '--heads=1', '--vocabulary=16', '--length=8']
    + ['--batch_size=2', '--chunk=8', '--repeats=1', '--top=1']
  )
  lines = capsys.readouterr().out.splitlines()
  assert '16 tokens' in lines[0] and max(map(len, lines)) <= 88
  rows = {line[2:29].strip(): line[29:].split() for line in lines[2:5]}
  assert list(rows) == ['gradient', 'product', 'product, linearization kept']
  assert all(float(x) >= 0 for row in rows.values() for x in row)
  assert lines[-2].startswith('  top 1: ') and 'residuals at most' in lines[-1]
