"""Table I of the paper, ours beside the published one.

  python -m benchmarks.table_one --manual_dir=DIR [--out=OUT] [--rows=wrn,attention,gcn]
      [--seeds=3] [--epochs=N] [--dtype=bfloat16] [--hessian_examples=N] [--dry_run]

Trains WRN-22-8 on CIFAR-10 (SGD, ASAM rho 2), the attention network on MIT-BIH (SGD,
ASAM rho 1) and the graph network on Mutagenicity (Adam, SAM), measures Hessian and
landscape of each, and writes OUT/table_one.md, and for each network the figures and the
comparison of both optimizers. It may be stopped at any moment: the same command goes on
where it was. DIR holds the publishers' archives. A dry run trains small networks for an
epoch on a few hundred of the real examples.

A machine without tensorflow-datasets, wfdb and jraph can run the first two networks
from npz files, which --pack=OTHER_DIR writes where those packages are.
"""

import argparse
import math
import pathlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import measurements
from input_pipelines import DataError, cifar10, labelled_arrays, mitbih
from input_pipelines.labelled_arrays import LabelledArrays
from training import cli, metrics, summary

_ROOT = pathlib.Path(__file__).parents[1]


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    network: wrn, attention or gcn.
    name: of the row.
    flags: of train.py.
    published: train loss, train accuracy %, test loss, test accuracy % and the ratio
      lambda_max / |lambda_min| of one batch.
  """

  network: str
  name: str
  flags: tuple[str, ...]
  published: tuple[float, ...]


_TASKS = {
  'wrn': 'cifar10_wrn',
  'attention': 'mitbih_attention',
  'gcn': 'mutagenicity_gcn',
}
_ROWS = (
  Row('wrn', 'SGD', ('--optimizer=momentum',), (0.0367, 98.57, 0.1095, 95.43, 21.7)),
  Row(
    'wrn',
    'ASAM rho 2',
    ('--optimizer=asam', '--rho=2'),
    (0.0459, 98.64, 0.0961, 95.97, 4.8),
  ),
  Row(
    'attention', 'SGD', ('--optimizer=momentum',), (0.0770, 96.31, 0.1204, 94.64, 16.8)
  ),
  Row(
    'attention',
    'ASAM rho 1',
    ('--optimizer=asam', '--rho=1'),
    (0.0836, 95.94, 0.1223, 94.26, 12.2),
  ),
  Row('gcn', 'Adam', ('--optimizer=adam',), (0.1754, 86.46, 0.2406, 80.41, 289)),
  Row(
    'gcn',
    'SAM rho .005',
    ('--optimizer=sam', '--rho=0.005'),
    (0.1719, 87.05, 0.2457, 81.11, 65),
  ),
)
_NOTE = (
  'Published rows are one seed each; their SAM is the one named here, by the published '
  "logs. Training loss and accuracy are means over the last epoch's batches in "
  'training mode, as published; test loss and accuracy are those of the last epoch. '
  'The ratio lambda_max / |lambda_min| of one batch is the median over batches, - if '
  'lambda_min is 0 within its residual; the published files have 14.7, not 4.8, for '
  'WRN with SAM. lambda_max and the last ratio are those of the whole training split, '
  'or of as many examples as the title says. ± is the standard error over seeds.'
)

# A dry run: examples of each part, networks, and what is measured of them.
_DRY_EXAMPLES = 600
_DRY_TRAIN = {
  'wrn': ('--model=depth=10,width=1',),
  'attention': ('--model=features=8,hidden_features=8,head_features=(16,)',),
  'gcn': (),
}
_DRY_HESSIAN = (
  '--num_examples=64',
  '--top_k=1',
  '--tol=1e-1',
  '--num_matvecs=3',
  '--num_probes=1',
  '--trace_matvecs=2',
  '--landscape_points=3',
  '--one_batch_repeats=1',
  '--average_case_samples=2',
  '--worst_case_rho=0',
)


def workdir(out: pathlib.Path, row: Row, seed: int) -> pathlib.Path:
  """The folder of a run."""
  name = row.name.lower().replace(' ', '_')
  return out / row.network / name / f'seed_{seed}'


def train(arguments: argparse.Namespace, row: Row, seed: int) -> None:
  """Trains a run, or what is left of it."""
  flags = [f'--task={_TASKS[row.network]}', *row.flags, f'--seed={seed}']
  flags += [f'--workdir={workdir(arguments.out, row, seed)}', *_data(arguments)]
  if arguments.epochs:
    flags += [f'--epochs={arguments.epochs}']
  if arguments.dtype:
    flags += [f'--dtype={arguments.dtype}']
  if arguments.dry_run:
    flags += _DRY_TRAIN[row.network]
  _run('train.py', flags)


def measure(arguments: argparse.Namespace, network: str, rows: list[Row]) -> None:
  """Measures and compares all runs of a network."""
  runs = [
    str(workdir(arguments.out, row, seed))
    for row in rows
    for seed in range(arguments.seeds)
  ]
  flags = [f'--workdir={",".join(runs)}', *_data(arguments)]
  flags += [f'--out={arguments.out / network / "compare"}']
  flags += _DRY_HESSIAN if arguments.dry_run else ()
  if arguments.hessian_examples:
    flags += [f'--num_examples={arguments.hessian_examples}']
  _run('eval_hessian.py', flags)


def _data(arguments: argparse.Namespace) -> list[str]:
  return [
    f'--{name}={value}'
    for name in ('manual_dir', 'data_dir')
    if (value := getattr(arguments, name))
  ]


def _run(script: str, flags: Sequence[str]) -> None:
  print(f'\n{script} {" ".join(flags)}', flush=True)
  code = subprocess.run([sys.executable, script, *flags], cwd=_ROOT).returncode
  if code:
    raise SystemExit(code)


def numbers(folder: pathlib.Path) -> list[float | None]:
  """The numbers of a run, those that are published first.

  Returns:
    Train loss, train accuracy %, test loss, test accuracy %, ratio of one batch,
    lambda_max, and ratio of the whole split; None for a ratio that cannot be told.
  """
  final = summary.read(folder)['final']
  last = [line for line in metrics.read(folder) if line['split'] == 'train'][-1]
  hessian = measurements.read(folder / measurements.FOLDER)
  return [
    last['loss'],
    100 * last['accuracy'],
    final['test_loss'],
    100 * final['test_accuracy'],
    hessian['one_batch']['ratio_median'],
    hessian['lambda_max'],
    hessian['lambda_max_over_abs_lambda_min'],
  ]


_COLUMNS = (
  ('train loss', '.4f'),
  ('train acc. %', '.2f'),
  ('test loss', '.4f'),
  ('test acc. %', '.2f'),
  ('ratio, one batch', '.1f'),
  ('lambda_max', '.3g'),
  ('ratio', '.1f'),
)


def table(results: dict[Row, list[list[float | None]]]) -> str:
  """The table in Markdown: a published row, and below it ours.

  Args:
    results: for each row the numbers of its seeds.
  """
  lines = [
    '| | | ' + ' | '.join(name for name, _ in _COLUMNS) + ' |',
    '|' + ' --- |' * (len(_COLUMNS) + 2),
  ]
  for row, seeds in results.items():
    label = f'{row.network} {row.name}'
    published = [
      format(value, form)
      for value, (_, form) in zip(row.published, _COLUMNS, strict=False)
    ]
    published += ['-'] * (len(_COLUMNS) - len(published))
    ours = [
      _cell(values, form)
      for values, (_, form) in zip(zip(*seeds, strict=True), _COLUMNS, strict=True)
    ]
    lines.append(f'| {label} | published | {" | ".join(published)} |')
    count = f'{len(seeds)} seed{"s" * (len(seeds) > 1)}'
    lines.append(f'| {label} | ours, {count} | {" | ".join(ours)} |')
  return '\n'.join(lines)


def _cell(values: Sequence[float | None], form: str) -> str:
  if None in values:
    return '-'
  text = format(statistics.fmean(values), form)
  if len(values) < 2:
    return text
  error = statistics.stdev(values) / math.sqrt(len(values))
  return f'{text} ± {format(error, form)}'


def pack(arguments: argparse.Namespace, folder: pathlib.Path, limit: int = 0) -> None:
  """Writes CIFAR-10 and MIT-BIH as npz files.

  Args:
    arguments: where the data are, and of which networks.
    folder: where to write.
    limit: examples to take of each part, at random; 0 for all.
  """
  folder.mkdir(parents=True, exist_ok=True)
  loaders = {'wrn': cifar10.load_arrays, 'attention': mitbih.load_arrays}
  for network, load in loaders.items():
    path = folder / f'{_TASKS[network].partition("_")[0]}.npz'
    if network not in arguments.rows or path.exists():
      continue
    data = load(manual_dir=arguments.manual_dir, data_dir=arguments.data_dir)
    temporary = path.with_name(f'new_{path.name}')
    labelled_arrays.save(temporary, _some(data, limit) if limit else data)
    temporary.rename(path)
    print(f'wrote {path}', flush=True)


def _some(data: LabelledArrays, limit: int) -> LabelledArrays:
  """A few examples of each part, drawn so that the classes come evenly."""
  generator = np.random.default_rng(0)
  parts = {}
  for name, part in data.parts.items():
    labels = part['labels']
    chosen = [
      generator.permutation(np.flatnonzero(labels == label))[
        : limit // len(data.classes)
      ]
      for label in range(len(data.classes))
    ]
    rows = np.sort(np.concatenate(chosen))
    parts[name] = {key: array[rows] for key, array in part.items()}
  return LabelledArrays(parts, data.classes)


def make(arguments: argparse.Namespace) -> None:
  """Trains, measures, and writes the table."""
  rows = [row for row in _ROWS if row.network in arguments.rows]
  if arguments.dry_run:
    arguments.epochs = 1
    data = arguments.out / 'data'
    pack(arguments, data, _DRY_EXAMPLES)
    molecules = pathlib.Path(arguments.manual_dir) / 'Mutagenicity.zip'
    if 'gcn' in arguments.rows and molecules.exists():
      shutil.copy(molecules, data)
    arguments.manual_dir, arguments.data_dir = str(data), str(data / 'prepared')
  for row in rows:
    for seed in range(arguments.seeds):
      train(arguments, row, seed)
  for network in dict.fromkeys(row.network for row in rows):
    measure(arguments, network, [row for row in rows if row.network == network])
  results = {
    row: [numbers(workdir(arguments.out, row, seed)) for seed in range(arguments.seeds)]
    for row in rows
  }
  text = table(results)
  path = arguments.out / 'table_one.md'
  path.write_text(f'# {_title(arguments)}\n\n{text}\n\n{_NOTE}\n')
  print(f'\n{text}\n\n{path}')


def _title(arguments: argparse.Namespace) -> str:
  """What was made, with what the recipes do not say."""
  if arguments.dry_run:
    return 'Table I, dry run: small networks, one epoch, few examples'
  changes = [
    f'{name} {value}'
    for name in ('epochs', 'dtype', 'hessian_examples')
    if (value := getattr(arguments, name))
  ]
  return ', '.join(['Table I', *changes])


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and makes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--manual_dir', default='', help="the publishers' archives")
  parser.add_argument('--data_dir', default='', help='prepared data sets')
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('runs/table_one')
  )
  parser.add_argument(
    '--rows',
    type=lambda text: text.split(','),
    default=list(_TASKS),
    help='networks, by comma: wrn,attention,gcn',
  )
  parser.add_argument('--seeds', type=int, default=1, help='runs of each row')
  parser.add_argument('--epochs', type=int, default=0, help="0: the recipe's")
  parser.add_argument('--dtype', default='', help="float32 or bfloat16; '': float32")
  parser.add_argument(
    '--hessian_examples', type=int, default=0, help='of the Hessian; 0: all'
  )
  parser.add_argument(
    '--dry_run', action='store_true', help='small and short, in minutes'
  )
  parser.add_argument(
    '--pack',
    type=pathlib.Path,
    help='only write the data as npz there, for --manual_dir',
  )
  arguments = parser.parse_args(argv)
  unknown = set(arguments.rows) - set(_TASKS)
  if unknown:
    parser.error(f'--rows has {min(unknown)}: choose from {", ".join(_TASKS)}')
  arguments.out = arguments.out.absolute()
  for name in ('manual_dir', 'data_dir'):
    if getattr(arguments, name):
      setattr(arguments, name, str(pathlib.Path(getattr(arguments, name)).absolute()))
  if arguments.pack:
    pack(arguments, arguments.pack)
  else:
    make(arguments)


if __name__ == '__main__':
  sys.exit(cli.run(lambda argv: main(argv[1:]), sys.argv, errors=(DataError,)))
