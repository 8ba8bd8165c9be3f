"""Imports go one way, the library stands alone, TensorFlow stays out."""

import ast
import pathlib
import subprocess
import sys
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[2]
OURS = {
    'sam_jax', 'models', 'input_pipelines', 'training', 'measurements', 'reports',
    'tasks', 'train', 'eval_hessian'
}  # fmt: skip
MAY_IMPORT = {
  'sam_jax': set(),
  'models': set(),
  'input_pipelines': set(),
  'training': {'sam_jax'},
  'measurements': {'sam_jax', 'training'},
  'reports': {'measurements', 'training'},
  'tasks': {'sam_jax', 'models', 'input_pipelines', 'training'},
  'train': OURS - {'eval_hessian'},
  'eval_hessian': OURS - {'train'},
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


def test_flags_are_read_in_the_two_scripts_only():
  readers = [
      str(path.relative_to(ROOT))
      for part in OURS - {'train', 'eval_hessian'}
      for path in files(part)
      if 'FLAGS' in {n.id for n in ast.walk(ast.parse(path.read_text()))
                     if isinstance(n, ast.Name)}
  ]  # fmt: skip
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
print('runs')
"""
  done = subprocess.run(
    [python, '-c', program], cwd=tmp_path, check=True, capture_output=True, text=True
  )
  assert done.stdout == 'runs\n'
