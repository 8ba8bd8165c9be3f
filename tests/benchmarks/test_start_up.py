"""Timing whole processes: what counts as the first step, and what is compared."""

import pytest

from benchmarks import start_up

_TRAIN = """
import pathlib, sys, time
flags = dict(flag.removeprefix('--').split('=', 1) for flag in sys.argv[1:])
pathlib.Path(flags['workdir']).mkdir(parents=True)
print('loading', flush=True)
time.sleep(%g)
print('epoch 1/1  step 1/9', flush=True)
time.sleep(60)
"""


def test_ends_at_the_first_line_of_progress(tmp_path, capsys):
  trees = []
  for name, seconds in (('a', 0.1), ('b', 1.1)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'train.py').write_text(_TRAIN % seconds)
    trees.append(str(tmp_path / name))
  start_up.main([f'--tree={",".join(trees)}', '--repeats=1'])
  first, second = (line.split() for line in capsys.readouterr().out.splitlines())
  assert first[4] == 'x1.000' and [first[-1], second[-1]] == trees
  assert 1.1 <= float(second[2]) < 30
  assert float(first[2]) < float(second[2])


def test_a_tree_that_fails_is_named(tmp_path):
  (tmp_path / 'train.py').write_text('raise SystemExit(1)')
  with pytest.raises(SystemExit, match=f'--tree={tmp_path}: train.py ended'):
    start_up.main([f'--tree={tmp_path}'])
