"""The scripts where the packages that only some data sets need are not installed."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import PIL.Image

_ABSENT = (
  'array_record',
  'grain',
  'jraph',
  'tensorflow_datasets',
  'tqdm',
  'wfdb',
)

# Runs the scripts that the arguments give as JSON, a list of words each.
_PROGRAM = f"""
import json, sys

class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in {_ABSENT}:
      raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Absent())
import eval_hessian, input_pipelines, models, train
from training import cli
scripts = {{'train.py': train.main, 'eval_hessian.py': eval_hessian.main}}
for words in map(json.loads, sys.argv[1:]):
  code = cli.run(scripts[words[0]], words, errors=(input_pipelines.DataError,))
  if code:
    sys.exit(code)
"""
_MEASURE = (
  '--top_k=1',
  '--tol=.5',
  '--num_matvecs=2',
  '--num_probes=2',
  '--trace_matvecs=2',
  '--landscape_points=0',
  '--one_batch_repeats=0',
  '--worst_case_rho=0',
  '--average_case_sigma=0',
  '--num_examples=4',
)


def _run(*scripts):
  return subprocess.run(
    [sys.executable, '-c', _PROGRAM, *map(json.dumps, scripts)],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )


def _train_and_measure(workdir, *flags):
  return (
    ['train.py', '--nocache', '--devices=1', f'--workdir={workdir}', *flags],
    ['eval_hessian.py', '--nocache', f'--workdir={workdir}', *_MEASURE]
    + [f'--out={workdir}/compare'],
  )


def _write_images(path):
  """A tar of two classes, red and blue, two images of each in train and in test."""
  with tarfile.open(path, 'w:gz') as archive:
    for part in ('train', 'test'):
      for name, colour in {'cat': (255, 0, 0), 'dog': (0, 0, 255)}.items():
        for index in range(2):
          file = io.BytesIO()
          PIL.Image.new('RGB', (8, 8), colour).save(file, 'JPEG')
          member = tarfile.TarInfo(f'{part}/{name}/{index}.jpg')
          member.size = len(file.getvalue())
          archive.addfile(member, io.BytesIO(file.getvalue()))


def test_digits_and_images_are_trained_and_measured(tmp_path):
  _write_images(tmp_path / 'pets.tar.gz')
  digits, images = tmp_path / 'digits', tmp_path / 'images'
  done = _run(
    *_train_and_measure(digits, '--epochs=1', '--optimizer=sam'),
    *_train_and_measure(
      images,
      '--task=cifar10_wrn',
      '--dataset=pets',
      '--model=depth=10,width=1',
      '--epochs=1',
      '--batch_size=4',
      f'--manual_dir={tmp_path}',
      f'--data_dir={tmp_path}/data',
    ),
  )
  assert done.returncode == 0, done.stderr
  for workdir, num_examples in ((digits, 1257), (images, 4)):
    facts = json.loads((workdir / 'summary.json').read_text())
    assert facts['num_train_examples'] == num_examples
    found = json.loads((workdir / 'hessian' / 'summary.json').read_text())
    assert np.isfinite(found['evaluation']['train_loss'])
  # Nothing can be prepared there.
  assert not (tmp_path / 'data').exists()


def test_streaming_names_the_package_that_it_needs(tmp_path):
  for part in ('train', 'val'):
    for name in ('cat', 'dog'):
      (tmp_path / part / name).mkdir(parents=True)
      PIL.Image.new('RGB', (8, 8)).save(tmp_path / part / name / '1.jpg')
  command = ['train.py', '--nocache', '--task=imagenet_vit', f'--dataset={tmp_path}']
  done = _run([*command, f'--workdir={tmp_path / "run"}'])
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert done.stderr.startswith('train.py: streaming images needs the package grain: ')
