"""Settings of every test: 8 host devices, fast compiles, typed keys, strict shapes."""

import importlib.metadata
import os

# Before jax starts: eight CPU devices in one process, so pmap is really parallel; and
# programs that run once are not worth optimising, which halves the time of compiling.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_FLAGS = os.environ.get('XLA_FLAGS', '')
_WANTED = [
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
]
# Emitting loops without MLIR takes 40% off the rest. Newer releases know only the one
# way, and end the process at a flag that they do not know.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _WANTED.append('--xla_cpu_use_fusion_emitters=false')
for _flag in _WANTED:
  if _flag.split('=')[0] not in _FLAGS:
    _FLAGS = f'{_FLAGS} {_flag}'.strip()
os.environ['XLA_FLAGS'] = _FLAGS

import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_threefry_partitionable', True)

settings.register_profile('default', deadline=None, max_examples=30, derandomize=True)
settings.load_profile('default')


@pytest.fixture(scope='session', autouse=True)
def cache_programs(tmp_path_factory):
  """What several tests compile is compiled once a worker, each with a folder its own.

  Workers that write into one folder at the same time have crashed jaxlib.
  """
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('xla')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def data_dir() -> pathlib.Path:
  """The folder with the real data sets, named by SAM_JAX_TEST_DATA."""
  folder = os.environ.get('SAM_JAX_TEST_DATA', '')
  if not folder or not pathlib.Path(folder).is_dir():
    pytest.skip('SAM_JAX_TEST_DATA does not name a folder with the real data sets')
  return pathlib.Path(folder)
