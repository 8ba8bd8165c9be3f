"""Packages that are not installed."""

import sys

import pytest

import input_pipelines


@pytest.fixture
def hide(monkeypatch):
  """Makes packages seem not to be installed, as `hide('wfdb', 'tqdm')`."""

  def hide_all(*packages):
    for name in list(sys.modules):
      if name.startswith('input_pipelines.') and name.endswith(
        ('_builder', '.prepared')
      ):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(input_pipelines, name.split('.')[1])
    for name in packages:
      monkeypatch.setitem(sys.modules, name, None)

  return hide_all
