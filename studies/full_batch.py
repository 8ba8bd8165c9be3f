"""What the studies share: a task's loss over all its examples, and lines that survive.

A study follows plain full-batch gradient descent. It writes a line for each step that
it compares, with the state from which it goes on, so that it may be killed at any
moment: the same command goes on, and writes the same lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import tasks
from sam_jax import curvature
from training import cli, compiler, curves, step
from training import config as config_lib
from training import problem as problem_lib
from training.config import Config
from training.errors import TrainingDiverged, UsageError
from training.ticker import Ticker, clock

CONFIG, LINES, STATE = 'config.json', 'lines.jsonl', 'state.npz'
RESULT, FIGURE = 'result.json', 'figure.png'
_LOCK = '.lock'
DTYPES = ('float32', 'float64')
# The fields of a run that decide its loss, its start and its learning rate.
_FIELDS = (
  'task',
  'dataset',
  'scale',
  'model',
  'learning_rate',
  'label_smoothing',
  'seed',
  'split_seed',
  'manual_dir',
  'data_dir',
)
_TOL = 1e-3  # Residual of an eigenpair over its eigenvalue, at which a search ends.
_DRAW_SECONDS = 60.0


def define_flags(out: str) -> cli.Flags:
  """The flags that every study has; out is the folder where none is given."""
  flags = cli.Flags()
  flags.heading('The task; what is not given is its own')
  fields = {field.name: field for field in dataclasses.fields(Config)}
  for name in _FIELDS:
    kind = str(fields[name].type)
    default = 'digits_mlp' if name == 'task' else None
    flags.define(name, kind, fields[name].metadata['help'], default)
  flags.heading('The study')
  flags.define('steps', 'int', 'steps of gradient descent', 1000)
  flags.define('every', 'int', 'steps between two comparisons', 20)
  flags.define('dtype', 'str', 'of all computations, float32 or float64', 'float32')
  flags.define('out', 'str', 'folder of the files', out)
  flags.define('cache', 'bool', 'keep compiled programs in ~/.cache/sam_jax', True)
  return flags


def check(flags: Any) -> Config:
  """The configuration of the descent that the flags describe.

  Raises:
    UsageError: a value that no study takes.
  """
  if flags.steps < 1:
    raise UsageError(f'--steps={flags.steps}: must be at least 1.')
  if not 1 <= flags.every <= flags.steps:
    raise UsageError(
      f'--every={flags.every}: must be at least 1, and at most --steps={flags.steps}.'
    )
  if flags.steps % flags.every:
    raise UsageError(
      f'--steps={flags.steps}: must be a multiple of --every={flags.every}.'
    )
  config_lib.require_choice('dtype', flags.dtype, DTYPES)
  if not flags.out:
    raise UsageError('--out= is empty: give a folder.')
  given = {name: flags[name].value for name in _FIELDS if name != 'task'}
  config = tasks.resolve(flags.task, optimizer='sgd', **given)
  if not config.learning_rate > 0:
    raise UsageError(f'--learning_rate={config.learning_rate}: must be above 0.')
  return config


def facts(config: Config, flags: Any, names: Sequence[str]) -> dict[str, Any]:
  """What decides the lines of a study, by the name of its flag.

  Args:
    config: of `check`.
    flags: the study's flags.
    names: those of the flags that only this study has.
  """
  of_task = {
    name: getattr(config, name)
    for name in _FIELDS
    if name not in ('manual_dir', 'data_dir')
  }
  return {**of_task, **{name: flags[name].value for name in ('every', 'dtype', *names)}}


class FullBatch:
  """A task's loss over the whole training split, and where train.py would start.

  The loss is that of evaluation mode, without dropout and without weight decay.

  Attributes:
    params: parameters at the start, those of train.py for the same seed, in the dtype.
    batch: all examples of the training split, on the device.
    num_examples: how many.
    num_parameters: the network's.
    loss_name: the loss and its unit, for readers.
  """

  def __init__(self, config: Config, dtype: str = 'float32'):
    """Reads the data.

    Raises:
      UsageError: the loss over all examples is not a function of the parameters alone.
      DataError: the data cannot be found or read.
    """
    problem = tasks.build(config)
    if problem.augment is not None:
      raise UsageError(
        f'--task={config.task} trains on examples that are augmented at random, which '
        'have no full batch: choose another task.'
      )
    stepper = step.Stepper(problem, config, 1)
    with jax.enable_x64(False):  # The same numbers whatever the study computes in.
      state = jax.device_get(jax.jit(stepper.init)(config.seed))
    if jax.tree.leaves(state.batch_stats):
      raise UsageError(
        f'--task={config.task}: its network keeps statistics of batches, so its loss '
        'is no function of the parameters alone: choose a network without, as '
        '--model=norm=none where it has that.'
      )
    self.num_examples = problem.train.num_examples
    (batch,) = problem.train.batches(self.num_examples).epoch(0)
    self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    self.loss_name = problem.loss_name
    self._problem = problem
    cast = lambda tree: jax.tree.map(
      lambda leaf: (
        np.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
      ),
      tree,
    )
    self.params, self.batch = cast(state.params), jax.device_put(cast(batch))

  def describe(self) -> str:
    """What is followed, in a few words."""
    return (
      f'{self.num_examples:,} examples in one batch, {self.num_parameters:,} '
      f'parameters, {self.loss_name}'
    )

  def loss(self, params: Any, batch: Any) -> jax.Array:
    """The mean loss of the examples."""
    return problem_lib.loss(self._problem, params, {}, batch)[0]


@functools.partial(jax.jit, static_argnums=0)
def sharpness(
  loss_fn: Any, params: Any, batch: Any, block: Any, number: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
  """The largest eigenvalue of the Hessian, searched from where a search ended.

  Args:
    loss_fn: of parameters and batch.
    params: where.
    batch: the examples.
    block: the last one's, None for none.
    number: tells the random vectors of the searches apart.

  Returns:
    The loss, the eigenvalue, its residual, and the block for the next search.
  """
  product = curvature.hessian_product(loss_fn)
  found = curvature.top_eigenpairs(
    lambda vector: product(params, batch, vector),
    params,
    start=block,
    key=jax.random.fold_in(jax.random.key(0), number),
    tol=_TOL,
    max_num_matvecs=400,
  )
  with jax.default_matmul_precision('highest'):
    value = loss_fn(params, batch)
  return value, found.eigenvalues[0], found.residuals[0], found.block


class Journal:
  """The lines of a study and the state after the last of them, in a folder.

  Attributes:
    folder: of the files.
    lines: so far, by step.
    state: nested dictionaries of arrays and numbers after the last line; None at the
      start.
  """

  def __init__(self, folder: pathlib.Path, facts: Mapping[str, Any]):
    """Opens a folder, or makes it; what no state belongs to is cut off.

    Args:
      folder: of the study.
      facts: what decides the lines; JSON.

    Raises:
      UsageError: the folder holds another study or other files, its state is damaged,
        or another process works in it.
    """
    self.folder = folder
    _check(folder, facts)
    folder.mkdir(parents=True, exist_ok=True)
    self._lock = (folder / _LOCK).open('w')
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._lock.close()
      raise UsageError(
        f'--out={folder}: another process works there; wait for its end, or choose '
        'another folder.'
      ) from error
    try:
      self._start(facts)
    except BaseException:
      self._lock.close()
      raise

  def _start(self, facts: Mapping[str, Any]) -> None:
    """Reads what is there, and cuts it back to the state."""
    folder = self.folder
    if not (folder / CONFIG).exists():
      versions = config_lib.versions()
      config_lib.write_json(folder / CONFIG, {'study': facts, 'versions': versions})
    self.state = self._read_state()
    last = -1 if self.state is None else int(self.state['line'])
    self.lines = _read_lines(folder / LINES)[: last + 1]
    if len(self.lines) != last + 1:
      raise UsageError(
        f'{folder / LINES} lacks lines that {STATE} follows: choose another --out.'
      )
    temporary = folder / f'{LINES}.tmp'
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in self.lines))
    os.replace(temporary, folder / LINES)
    self._file = (folder / LINES).open('a')

  def _read_state(self) -> dict[str, Any] | None:
    path = self.folder / STATE
    if not path.exists():
      return None
    try:
      with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        state = {name: arrays[name] for name in arrays.files}
      return traverse_util.unflatten_dict(state, sep='/')
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
      raise UsageError(
        f'{path} is damaged ({error}): remove {self.folder}, or choose another --out.'
      ) from error

  def add(self, line: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes a line and the state after it, the line first."""
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    os.fsync(self._file.fileno())
    self.lines.append(line)
    self.state = {**state, 'line': len(self.lines) - 1}
    arrays = traverse_util.flatten_dict(self.state, sep='/')
    path, temporary = self.folder / STATE, self.folder / f'{STATE}.tmp'
    with temporary.open('wb') as file:
      np.savez(file, **{name: np.asarray(leaf) for name, leaf in arrays.items()})
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)

  def write_result(self, result: Mapping[str, Any]) -> None:
    """Writes `result.json`, with what it is the result of."""
    about = json.loads((self.folder / CONFIG).read_text())
    config_lib.write_json(self.folder / RESULT, {**about, 'result': result})

  def close(self) -> None:
    """Lets another process work in the folder."""
    self._file.close()
    self._lock.close()


def _check(folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
  """Checks that a folder is this study's own, or free; changes nothing."""
  if folder.exists() and not folder.is_dir():
    raise UsageError(f'--out={folder} is not a folder: choose another.')
  path = folder / CONFIG
  if path.exists():
    try:
      before = json.loads(path.read_text())['study']
      differing = [
        f'{name} is {before.get(name)!r} there and {value!r} here'
        for name, value in facts.items()
        if before.get(name) != value
      ]
    except (ValueError, KeyError, TypeError, AttributeError):
      differing = [f'its {CONFIG} is none of a study']
    if differing:
      raise UsageError(
        f'--out={folder} belongs to another study ({"; ".join(differing)}): choose '
        'another folder, or the same flags.'
      )
  elif folder.exists():
    own = (_LOCK, f'{CONFIG}.tmp')
    strangers = [p.name for p in folder.iterdir() if p.name not in own]
    if strangers:
      raise UsageError(
        f'--out={folder} is not empty and holds no {CONFIG} (but {min(strangers)}): '
        'choose a new or empty folder.'
      )


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The whole lines of a file; a half one at the end is what a kill leaves."""
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(errors='replace').split('\n'):
    try:
      lines.append(json.loads(text))
    except ValueError:
      break
  return lines


def follow(
  journal: Journal,
  found: Iterator[tuple[dict[str, Any], dict[str, Any]]],
  last: int,
  tell: Any,
  draw: Any,
) -> None:
  """Takes a study to its end: writes, tells and draws each line.

  Args:
    journal: where the lines go.
    found: lines with the states after them, from the journal's own on.
    last: the last line's step.
    tell: a line in a few words.
    draw: draws the journal's lines.

  Raises:
    TrainingDiverged: the descent or the flow is no longer finite.
  """
  ticker, drawn = Ticker(), time.monotonic()
  if journal.lines:
    at = journal.lines[-1]['step']
    ticker.show(f'going on after step {at} of {journal.folder}/', always=True)
    ticker.keep()
  start = first = None
  try:
    for line, state in found:
      if not all(np.isfinite(x) for x in line.values() if isinstance(x, float)):
        raise TrainingDiverged(
          f'the descent is no longer finite at step {line["step"]}: try a lower '
          '--learning_rate, in another --out.'
        )
      journal.add(line, state)
      now, left = time.monotonic(), ''
      if start is None:
        start, first = now, line['step']  # What compiles does not count.
      elif line['step'] > first:
        seconds = (now - start) / (line['step'] - first) * (last - line['step'])
        left = f'  {clock(seconds)} left'
      ending = line['step'] == last
      ticker.show(f'step {line["step"]}/{last}  {tell(line)}{left}', always=ending)
      if now - drawn > _DRAW_SECONDS and not ending:
        draw()
        drawn = time.monotonic()
  except FloatingPointError as error:
    raise TrainingDiverged(f'{error}: try a lower --learning_rate.') from error
  finally:
    ticker.keep()


class Study(NamedTuple):
  """What one study does with its lines.

  Attributes:
    name: of the study.
    title: above its figure.
    first: step of the first line.
    compare: ``compare(full, steps, state)`` yields lines with the states after them.
    tell: a line in a few words.
    draw: ``draw(lines, title)``, the figure.
    summarize: the result from all lines, with a `text`.
  """

  name: str
  title: str
  first: int
  compare: Callable[..., Iterator[tuple[dict[str, Any], dict[str, Any]]]]
  tell: Callable[[dict[str, Any]], str]
  draw: Callable[..., Any]
  summarize: Callable[..., dict[str, Any]]


def run(study: Study, config: Config, flags: Any, facts: Mapping[str, Any]) -> None:
  """Takes a study of flags that `check` has seen to its end, and tells the result.

  The facts are what decides its lines, see `facts`.
  """
  folder = pathlib.Path(flags.out)
  journal = Journal(folder, {'name': study.name, **facts})
  with contextlib.closing(journal):
    done = journal.lines[-1]['step'] if journal.lines else study.first - 1
    figure = lambda: study.draw(journal.lines, study.title)
    show = lambda: curves.save_whole(figure(), folder / FIGURE)
    steps = [s for s in range(0, flags.steps + 1, flags.every) if s > done]
    if steps:
      with computing(flags.dtype, flags.cache):
        full = FullBatch(config, flags.dtype)
        print(full.describe(), flush=True)
        found = study.compare(full, steps, journal.state)
        follow(journal, found, flags.steps, study.tell, show)
    show()
    result = study.summarize(journal.lines)
    journal.write_result(result)
  print(f'{result["text"]}\n  {folder}/')


@contextlib.contextmanager
def computing(dtype: str, cache: bool) -> Iterator[None]:
  """Sets what the compiler has to know."""
  compiler.use_all_cores()
  if cache:
    compiler.keep_programs()
  with jax.enable_x64(dtype == 'float64'):
    yield
