"""Our side of the comparison with PyTorch, and a peer that only counts."""

import sys

import pytest

from benchmarks import networks_against_torch

_PEER = """
import json, sys
print(json.dumps({'torch': '0', 'parameters': %d}), flush=True)
for line in sys.stdin:
  what, steps = line.split()
  print(json.dumps({'seconds': 2.0 * int(steps)}), flush=True)
"""


def _arguments():
  defaults = {'network': 'wrn', 'depth': 10, 'width': 1, 'batch_size': 2}
  defaults |= {'turns': 1, 'steps': 1, 'peer_python': sys.executable}
  return [f'--{name}={value}' for name, value in defaults.items()]


@pytest.mark.slow
def test_a_row_each_and_equal_networks_only(tmp_path, monkeypatch, capsys):
  peer = tmp_path / 'peer.py'
  peer.write_text(_PEER % 77_850)
  monkeypatch.setattr(networks_against_torch, '_PEER', peer)
  networks_against_torch.main([*_arguments(), '--compile'])
  lines = capsys.readouterr().out.splitlines()
  assert '77,850 parameters, batch 2, float32' in lines[0]
  assert [line.split()[:2] for line in lines[1:]] == [
    [what, name]
    for what in ('gradient', 'sam')
    for name in ('sam_jax', 'torch', 'torch.compile')
  ]
  # A peer's step of two seconds is one example a second.
  assert ' 1 examples/s' in lines[2] and ' 1 examples/s' in lines[6]
  assert lines[1].endswith('x1.00')
  peer.write_text(_PEER % 7)
  with pytest.raises(SystemExit, match='77,850 parameters and 7 in PyTorch'):
    networks_against_torch.main(_arguments())


def test_a_peer_that_ends_is_named(tmp_path, monkeypatch):
  peer = tmp_path / 'peer.py'
  peer.write_text('')
  monkeypatch.setattr(networks_against_torch, '_PEER', peer)
  with pytest.raises(SystemExit, match='--peer_python=.* ended'):
    networks_against_torch.main(_arguments())
