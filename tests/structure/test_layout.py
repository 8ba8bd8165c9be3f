"""Imports go one way, the library stands alone, TensorFlow stays out."""

import ast
import graphlib
import pathlib
import subprocess
import sys
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[2]
OURS = {
    'sam_jax', 'models', 'input_pipelines', 'training', 'measurements', 'reports',
    'tasks', 'studies', 'train', 'eval_hessian'
}  # fmt: skip
MAY_IMPORT = {
  'sam_jax': set(),
  'models': set(),
  'input_pipelines': set(),
  'training': {'sam_jax'},
  'measurements': {'sam_jax', 'training'},
  'reports': {'sam_jax', 'measurements', 'training'},
  'tasks': {'sam_jax', 'models', 'input_pipelines', 'training'},
  'studies': OURS - {'train', 'eval_hessian'},
  'train': OURS - {'eval_hessian', 'studies'},
  'eval_hessian': OURS - {'train', 'studies'},
}


def files(part):
  folder = ROOT / part
  return sorted(folder.rglob('*.py')) if folder.is_dir() else [ROOT / f'{part}.py']


def imports(path):
  """(line, module, whether at the top level) of every absolute import."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      modules = [node.module]
    else:
      continue
    for module in modules:
      yield node.lineno, module, node in tree.body


@pytest.mark.parametrize('part', sorted(MAY_IMPORT))
def test_imports_go_one_way(part):
  wrong = [
    f'{path.relative_to(ROOT)}:{line} imports {module}'
    for path in files(part)
    for line, module, _ in imports(path)
    if module.split('.')[0] in OURS - MAY_IMPORT[part] - {part}
  ]
  assert not wrong


def test_the_library_needs_only_jax_optax_and_numpy():
  allowed = set(sys.stdlib_module_names) | {'jax', 'optax', 'numpy', 'sam_jax'}
  wrong = [
    f'{path.relative_to(ROOT)}:{line} imports {module}'
    for path in files('sam_jax')
    for line, module, top in imports(path)
    if module.split('.')[0] not in allowed
    and not (module.split('.')[0] == 'matplotlib' and not top)
  ]
  assert not wrong


def _modules():
  """Every module of ours by its dotted name."""
  for part in sorted(OURS):
    for path in files(part):
      names = path.relative_to(ROOT).with_suffix('').parts
      yield '.'.join(names[:-1] if names[-1] == '__init__' else names), path


def _dependencies(path, known):
  """The modules of ours that a file imports, at its top or inside a function."""
  tree = ast.parse(path.read_text())
  only_for_types = {
    id(inner)
    for node in ast.walk(tree)
    if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
    for inner in ast.walk(node)
  }
  for node in (x for x in ast.walk(tree) if id(x) not in only_for_types):
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names if a.name in known)
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        if inner in known:
          yield inner
        elif node.module in known:
          yield node.module


def test_no_imports_go_in_a_circle():
  paths = dict(_modules())
  graph = {name: set(_dependencies(path, paths)) for name, path in paths.items()}
  try:
    tuple(graphlib.TopologicalSorter(graph).static_order())
  except graphlib.CycleError as error:
    pytest.fail(f'imports go in a circle: {" <- ".join(error.args[1])}')


def _readers_of_flags(text):
  """Lines that read a command line: absl's flags in any spelling, or sys.argv."""
  tree = ast.parse(text)
  names, wrong = {}, []
  for node in ast.walk(tree):  # what each name of an import stands for
    if isinstance(node, ast.Import):
      for alias in node.names:
        names[alias.asname or alias.name.split('.')[0]] = (
          alias.name if alias.asname else alias.name.split('.')[0]
        )
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      for alias in node.names:
        names[alias.asname or alias.name] = f'{node.module}.{alias.name}'
        if node.module == 'absl.flags' or f'{node.module}.{alias.name}' == 'sys.argv':
          wrong.append(node.lineno)
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and str(node.value).startswith('absl.'):
      wrong.append(node.lineno)  # import_module('absl.flags')
    if not isinstance(node, ast.Attribute):
      continue
    parts = [node.attr]
    while isinstance(node.value, ast.Attribute):
      node = node.value
      parts.append(node.attr)
    if isinstance(node.value, ast.Name):
      full = '.'.join([names.get(node.value.id, ''), *reversed(parts)])
      if full.startswith(('absl.flags.FLAGS', 'absl.app', 'sys.argv')):
        wrong.append(node.lineno)
  return sorted(set(wrong))


@pytest.mark.parametrize(
  'text',
  [
    'from absl import flags\nrho = flags.FLAGS.rho',
    'import absl.flags\nrho = absl.flags.FLAGS.rho',
    'import absl.flags as f\nrho = f.FLAGS.rho',
    'from absl.flags import FLAGS\nrho = FLAGS.rho',
    'from absl.flags import FLAGS as values\nrho = values.rho',
    'import importlib\nrho = importlib.import_module("absl.flags").FLAGS.rho',
    'import sys\nrho = sys.argv[1]',
    'from sys import argv\nrho = argv[1]',
    'def f():\n  from absl import flags as g\n  return g.FLAGS',
  ],
)
def test_every_spelling_of_reading_flags_is_seen(text):
  assert _readers_of_flags(text)


def test_flags_are_read_in_the_scripts_only():
  readers = {
    str(path.relative_to(ROOT)): lines
    for part in OURS - {'train', 'eval_hessian'}
    for path in files(part)
    if (lines := _readers_of_flags(path.read_text()))
  }
  # What parses for both scripts tells libraries that it has.
  text = (ROOT / 'training' / 'cli.py').read_text().splitlines()
  (line,) = readers.pop('training/cli.py')
  assert text[line - 1].strip() == 'flags.FLAGS.mark_as_parsed()'
  # A study is a script, too: its last line hands on the command line.
  for name in [name for name in readers if name.startswith('studies/')]:
    text = (ROOT / name).read_text().splitlines()
    assert readers.pop(name) == [len(text)]
    assert text[-2:] == [
      "if __name__ == '__main__':",
      '  sys.exit(cli.run(main, sys.argv, errors=(DataError,)))',
    ]
  assert not readers


def test_tensorflow_is_nowhere():
  wrong = [
    f'{path.relative_to(ROOT)}:{line}'
    for part in OURS
    for path in files(part)
    for line, module, _ in imports(path)
    if module.split('.')[0] == 'tensorflow'
  ]
  assert not wrong


@pytest.mark.slow
def test_the_wheel_alone_imports_and_runs(tmp_path):
  """Built, installed in an empty environment, and one SAM step and one HVP taken."""
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
  subprocess.run(
    [*pip, 'wheel', '--quiet', '--no-deps', '-w', tmp_path, ROOT], check=True
  )
  (wheel,) = tmp_path.glob('sam_jax-*.whl')
  venv.create(tmp_path / 'env', with_pip=True)
  python = tmp_path / 'env' / 'bin' / 'python'
  subprocess.run([python, '-m', 'pip', 'install', '--quiet', wheel], check=True)
  program = """
import jax, jax.numpy as jnp, optax, sam_jax, sam_jax.curvature, sam_jax.landscape
import sam_jax.plotting
loss = lambda w: jnp.sum(w ** 4)
tx = optax.chain(sam_jax.sam(0.05), optax.sgd(0.1))
w = jnp.ones(2)
updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
assert updates.shape == (2,)
assert sam_jax.hvp(loss, w, w).tolist() == [12.0, 12.0]
found = sam_jax.measure(lambda w, x: x.mean() * loss(w), w, [jnp.ones(3)], 'out',
                        k=1, landscape_points=2, figures=False)
assert abs(found['lambda_max'] - 12) < 1e-3
print('runs')
"""
  done = subprocess.run(
    [python, '-c', program], cwd=tmp_path, check=True, capture_output=True, text=True
  )
  assert done.stdout == 'runs\n'
