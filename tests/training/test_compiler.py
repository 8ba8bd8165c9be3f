"""Settings of the compiler reach it from the scripts, and spare the user's own."""

import importlib.metadata
import os
import subprocess
import sys

import jax
import pytest

from training import compiler

_SET = """
import eval_hessian, train  # nothing they import may start JAX
from training import compiler
compiler.use_all_cores()
"""
_COMPILE = """
import jax
image, kernel = jax.numpy.ones((8, 8, 8, 32)), jax.numpy.ones((3, 3, 32, 32))
labels = ('NHWC', 'HWIO', 'NHWC')
convolve = lambda x, k: jax.lax.conv_general_dilated(
  x, k, (1, 1), ((1, 1), (1, 1)), dimension_numbers=labels)
print(jax.jit(convolve).lower(image, kernel).compile().as_text())
"""


@pytest.mark.parametrize(('before', 'handed_over'), [('', True), (_SET, False)])
def test_convolutions_stay_with_the_compiler_on_the_cpu(before, handed_over):
  """YNNPACK, to which this release of XLA hands them, computes them on one core."""
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run(
    [sys.executable, '-c', before + _COMPILE],
    env=environment,
    capture_output=True,
    text=True,
  )
  # XLA aborts at a flag that it does not know, and says so.
  assert done.returncode == 0, done.stderr
  assert 'ENTRY' in done.stdout
  assert ('ynn_fusion' in done.stdout) == handed_over


@pytest.mark.parametrize(
  ('flags', 'platforms', 'expected'),
  [
    ('', 'cpu', compiler._YNN_SETTING),
    ('--xla_a=1', 'cpu', f'--xla_a=1 {compiler._YNN_SETTING}'),
    (f'{compiler._YNN_FLAG}=', 'cpu', f'{compiler._YNN_FLAG}='),
    ('', 'tpu,cpu', ''),
  ],
)
def test_flags_are_added_for_the_cpu_alone(monkeypatch, flags, platforms, expected):
  """Nothing of the user's is changed."""
  monkeypatch.setenv('XLA_FLAGS', flags)
  monkeypatch.setattr(compiler, '_on_cpu', lambda: platforms == 'cpu')
  compiler.use_all_cores()
  assert os.environ['XLA_FLAGS'] == expected


@pytest.mark.parametrize(
  ('release', 'known'),
  [('0.10.2', True), ('0.11.2', True), ('0.12.0.1', True), ('0.99.1', False)],
)
def test_releases_that_do_not_know_the_flag_do_not_get_it(monkeypatch, release, known):
  """XLA would abort at a flag that it does not know."""
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setattr(compiler, '_on_cpu', lambda: True)
  monkeypatch.setattr(compiler.jaxlib, '__version__', release)
  compiler.use_all_cores()
  assert os.environ['XLA_FLAGS'] == (compiler._YNN_SETTING if known else '')


def test_installed_accelerators_count_unless_the_cpu_is_asked_for(monkeypatch):
  """A plug-in's own compiler reads XLA_FLAGS too."""
  monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: [group])
  assert compiler._on_cpu() == (jax.config.jax_platforms == 'cpu')
  monkeypatch.setattr(compiler.jax, 'config', _Config(''))
  assert not compiler._on_cpu()
  monkeypatch.setattr(compiler.jax, 'config', _Config('cpu'))
  assert compiler._on_cpu()


class _Config:
  """What `_on_cpu` asks jax.config for."""

  def __init__(self, platforms):
    self.jax_platforms = platforms
