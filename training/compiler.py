"""Settings of JAX's compiler. They take effect before the first computation only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import jax
import jaxlib

# Which operations the CPU compiler hands to the library YNNPACK. By default those are
# convolutions too, which it computes on one core where they have under 128 channels.
_YNN_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
_YNN_SETTING = f'{_YNN_FLAG}=LIBRARY_FUSION_TYPE_REDUCE'
# XLA aborts the process at a flag it does not know; these releases know this one.
_YNN_RELEASES = ((0, 10), (0, 11), (0, 12))


def use_all_cores() -> None:
  """Has convolutions computed on all cores where JAX runs on the CPU.

  It adds to the environment variable XLA_FLAGS, unless it already says something of the
  same setting, or an accelerator's own compiler would read it.
  """
  release = tuple(int(part) for part in jaxlib.__version__.split('.')[:2])
  flags = os.environ.get('XLA_FLAGS', '')
  if release in _YNN_RELEASES and _YNN_FLAG not in flags and _on_cpu():
    os.environ['XLA_FLAGS'] = f'{flags} {_YNN_SETTING}'.strip()


def keep_programs() -> None:
  """Keeps compiled programs in the user's cache folder, so that restarts are fast."""
  if jax.config.jax_compilation_cache_dir:
    return  # the user's own choice
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  jax.config.update('jax_compilation_cache_dir', os.path.join(home, 'sam_jax', 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def _on_cpu() -> bool:
  """Whether JAX is told to use the CPU, or has no other platform installed."""
  if jax.config.jax_platforms:
    return jax.config.jax_platforms == 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return not plugins and importlib.util.find_spec('libtpu') is None
