"""How methods are declared and found: traits, hyperparameters, a file of one's own."""

import dataclasses
import importlib.util
import inspect
import sys
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_jax
from sam_jax import methods

METHODS = methods.find()

# Every flag by method: argument, flag, kind, default, and values that are allowed and
# refused at the ends of its range.
RADIUS = (0, 1e9), (-1e-9, 'nan', 'inf', None)
ANY = (-2.0, 0, 3), ('nan', 'many', None)
SHARE = (1e-9, 1), (0, 1.001)
BELOW_ONE = (0, 0.999), (-0.001, 1)
COUNT = (1, 7), (0, 1.5, -1, True)
OPTIONAL_COUNT = (1, None), (0, 1.5)
PAIRS = ('antithetic', 'antithetic', 'bool', False, (True, 'false'), (2, 'si', None))
FLAGS = {
  'sam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('num_ascent_steps', 'num_ascent_steps', 'int', None, *OPTIONAL_COUNT),
  ],
  'asam': [
    ('rho', 'rho', 'float', 0.5, *RADIUS),
    ('eta', 'adaptive_eta', 'float', 0.01, (0, 5.0), (-0.1,)),
    ('weights', 'adaptive_rule', 'str', 'weights', ('weights', 'all'), ('none', None)),
  ],
  'usam': [('rho', 'rho', 'float', 0.05, *RADIUS)],
  'gsam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('alpha', 'gsam_alpha', 'float', 0.4, *ANY),
    ('rho_min', 'gsam_rho_min', 'float', None, (0, 0.1, None), (-0.1, 'nan')),
  ],
  'wsam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('gamma', 'wsam_gamma', 'float', 0.9, *BELOW_ONE),
  ],
  'decoupled_wsam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('gamma', 'wsam_gamma', 'float', 0.9, *BELOW_ONE),
  ],
  'looksam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('every', 'looksam_every', 'int', 5, *COUNT),
    ('alpha', 'looksam_alpha', 'float', 0.7, *ANY),
  ],
  'friendly_sam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('sigma', 'friendly_sigma', 'float', 1.0, *ANY),
    ('decay', 'friendly_decay', 'float', 0.9, *BELOW_ONE),
  ],
  'msam': [('rho', 'rho', 'float', 0.3, *RADIUS)],
  'esam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('beta', 'esam_beta', 'float', 0.5, *SHARE),
    ('gamma', 'esam_gamma', 'float', 0.5, *SHARE),
  ],
  'graphsam': [
    ('rho', 'rho', 'float', 0.05, *RADIUS),
    ('beta', 'graphsam_beta', 'float', 0.99, *BELOW_ONE),
    ('gamma', 'graphsam_gamma', 'float', 0.5, (0, 1, 2.5), (-0.1, 'nan')),
    ('epochs_per_decay', 'graphsam_epochs', 'int', 1, *COUNT),
  ],
  'trace_sam': [
    ('rho', 'rho', 'float', 0.01, *RADIUS),
    ('lam', 'universal_lam', 'float', 1.0, *ANY),
    ('num_probes', 'num_probes', 'int', None, *OPTIONAL_COUNT),
    PAIRS,
  ],
  'frob_sam': [
    ('rho', 'rho', 'float', 0.005, *RADIUS),
    ('lam', 'universal_lam', 'float', 0.005, *ANY),
    ('num_probes', 'num_probes', 'int', None, (2, None), (1, 0)),
    PAIRS,
  ],
  'det_sam': [
    ('rho', 'rho', 'float', 1.0, *RADIUS),
    ('lam', 'universal_lam', 'float', 1.0, *ANY),
    ('half_width', 'det_half_width', 'float', 0.01, (1e-9, 2.0), (0, -1.0)),
    ('num_probes', 'num_probes', 'int', None, *OPTIONAL_COUNT),
    PAIRS,
  ],
}
# What differs from: precedes its base, two gradients, every example, every update.
TRAITS = {
  'decoupled_wsam': {'wraps_base': True},
  'looksam': {'period': 'every'},
  'msam': {'wraps_base': True, 'one_gradient': True, 'needs_momentum': True},
  'esam': {'chooses_examples': True},
  'graphsam': {'one_gradient': True, 'period': 'steps_per_epoch'},
}


def test_the_methods_of_old_are_found_sam_first():
  assert set(FLAGS) <= set(METHODS)
  assert list(METHODS)[:3] == ['sam', 'asam', 'usam']
  assert 'universal_sam' not in METHODS  # it takes functions


@pytest.mark.parametrize('name', METHODS)
def test_every_method_is_exported(name):
  assert getattr(sam_jax, name) is METHODS[name]
  assert METHODS[name].__name__ == name


@pytest.mark.parametrize('name', METHODS)
def test_a_command_line_can_describe_every_method(name):
  found = methods.hyperparameters(METHODS[name])
  assert found['rho'].flag == 'rho'
  wanted = inspect.signature(METHODS[name]).parameters
  for argument, hyperparameter in found.items():
    text = hyperparameter.help
    assert text and '`' not in text and 'as in' not in text, argument
    # The default is itself a value, and the one of the signature.
    value = hyperparameter.check(hyperparameter.default)
    assert value == wanted[argument].default


@pytest.mark.parametrize('name', FLAGS)
def test_hyperparameters_are_those_of_the_table(name):
  found = methods.hyperparameters(METHODS[name])
  assert [(x.name, x.flag, x.kind, x.default) for x in found.values()] == [
    row[:4] for row in FLAGS[name]
  ]
  for argument, _, kind, _, allowed, refused in FLAGS[name]:
    of_kind = {'float': float, 'int': int, 'bool': bool}.get(kind, object)
    for value in allowed:
      converted = found[argument].check(value)
      assert converted is None or isinstance(converted, of_kind)
    for value in refused:
      with pytest.raises(ValueError, match=f'--{found[argument].flag}={value}: '):
        found[argument].check(value)


@pytest.mark.parametrize('name', FLAGS)
def test_traits_are_those_of_the_table(name):
  expected = methods.Traits(**TRAITS.get(name, {}))
  found = METHODS[name].traits
  assert dataclasses.replace(found, flags={}) == expected
  # Read off the signature, which is what the training loop calls.
  assert found.wraps_base == ('inner' in inspect.signature(METHODS[name]).parameters)


def test_values_become_those_of_the_argument():
  rule = methods.hyperparameters(sam_jax.asam)['weights']
  assert rule.check('weights') is None and rule.check('all') is True
  every = methods.hyperparameters(sam_jax.looksam)['every']
  assert every.check('3') == 3 and every.check(3.0) == 3
  pairs = methods.hyperparameters(sam_jax.det_sam)['antithetic']
  assert pairs.check('True') is True and pairs.check(False) is False
  assert methods.hyperparameters(sam_jax.sam)['rho'].check('1e-3') == 1e-3


OWN_FILE = '''
"""A method of one's own."""

from __future__ import annotations

from typing import Annotated

import optax

from sam_jax import sam
from sam_jax.methods import Bounds, Choices, Radius, method


@method(flags={'flip': 'flipped'})
def scaled_sam(
  rho: Radius = 0.07,
  factor: Annotated[float, Bounds(above=0, below=9)] = 2.0,
  flip=False,
  mode: Annotated[object, Choices({'plain': None, 'odd': 'o'})] = None,
  label: str = 'x',
  *,
  perturbation: optax.GradientTransformation | None = None,
  callback: object = print,
  axis_name: str | None = None,
):
  """Multiplies the radius.

  Args:
    rho: radius before it is
      multiplied. A number.
    factor: what multiplies ``rho`` by :math:`f`
    callback: not for a command line.

  Returns:
    A transformation.
  """
  del flip, mode, label, callback
  return sam(factor * rho, perturbation=perturbation, axis_name=axis_name)


def helper(rho: float = 0.1):
  return rho
'''


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  """A user's own file, loaded as an application does."""
  path = tmp_path_factory.mktemp('own') / 'scaled.py'
  path.write_text(OWN_FILE)
  spec = importlib.util.spec_from_file_location('scaled', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_file_of_ones_own_is_read_alike(own):
  assert 'scaled' not in sys.modules  # annotations resolve without it
  assert methods.declared(own) == {'scaled_sam': own.scaled_sam}  # sam is imported
  found = methods.hyperparameters(own.scaled_sam)
  assert {x.name: (x.flag, x.kind, x.default, x.help) for x in found.values()} == {
    'rho': ('rho', 'float', 0.07, 'radius before it is multiplied'),
    'factor': ('scaled_sam_factor', 'float', 2.0, 'what multiplies rho by f'),
    'flip': ('flipped', 'bool', False, ''),
    'mode': ('scaled_sam_mode', 'str', 'plain', ''),
    'label': ('scaled_sam_label', 'str', 'x', ''),
  }
  assert found['mode'].check('odd') == 'o'
  with pytest.raises(ValueError, match='--scaled_sam_factor=9: .*above 0 and below 9'):
    found['factor'].check(9)
  # Called as a loop calls it, it is sam at twice the radius.
  values = {name: x.check(x.default) for name, x in found.items()}
  given = {'axis_name': None}
  w = jnp.array([3.0, 4.0])
  results = [
    tx.update(w, tx.init(w), w, grad_fn=lambda at: at)[0]
    for tx in (own.scaled_sam(**values, **given), sam_jax.sam(0.14))
  ]
  np.testing.assert_allclose(*results, rtol=1e-6)


def test_mistaken_declarations_are_refused():
  def bare(rho: float = 0.1):
    return sam_jax.sam(rho)

  with pytest.raises(TypeError, match='no method'):
    methods.hyperparameters(bare)
  with pytest.raises(ValueError, match="'every'"):
    methods.method(period='every')(bare)
  with pytest.raises(ValueError, match="'alpha'"):
    methods.method(flags={'alpha': 'a'})(bare)

  @methods.method()
  def without_default(rho: float, size: Annotated[int, methods.Bounds(least=1)]):
    return sam_jax.sam(rho / size)

  with pytest.raises(TypeError, match=r'without_default\(rho\) has no default'):
    methods.hyperparameters(without_default)


def gsam_today(schedule, total, rho, rho_min):
  """The radii from the smallest and largest rate, in Python numbers."""
  rates = [float(schedule(count)) for count in range(total)]
  low, high = min(rates), max(rates)
  share = [1.0 if high == low else (rate - low) / (high - low) for rate in rates]
  return [rho_min + (rho - rho_min) * s for s in share]


@pytest.mark.parametrize(
  'schedule',
  [optax.cosine_decay_schedule(0.1, 6), optax.constant_schedule(0.1)],
  ids=['cosine', 'constant'],
)
def test_gsam_ties_rho_to_the_learning_rate(schedule):
  """Built outside jit, inside it, and with every number traced: the same radii."""
  total, rho, rho_min = 4, 0.3, 0.1

  def radii(rho, rho_min, scale):
    rate = schedule if scale is None else (lambda count: scale * schedule(count))
    tx = sam_jax.gsam(rho, rho_min=rho_min, learning_rate=rate, total_steps=total)
    w = jnp.array([3.0, 4.0])
    state, found = tx.init(w), []
    for _ in range(total):
      _, state = tx.update(w, state, w, grad_fn=lambda at: at)
      found.append(state.rho)
    return jnp.stack(found)

  expected = gsam_today(schedule, total, rho, rho_min)
  np.testing.assert_allclose(radii(rho, rho_min, None), expected, rtol=1e-6)
  static = jax.jit(lambda: radii(rho, rho_min, None))()
  np.testing.assert_array_equal(static, radii(rho, rho_min, None))
  traced = jax.jit(radii)(jnp.array(rho), jnp.array(rho_min), jnp.array(2.0))
  np.testing.assert_allclose(traced, expected, rtol=1e-5)


@pytest.mark.parametrize(
  'given',
  [
    {'total_steps': 3},
    {'learning_rate': lambda count: 0.1},
    {'learning_rate': 0.1, 'total_steps': 3},
    {'rho': lambda count: 0.1, 'learning_rate': lambda count: 0.1, 'total_steps': 3},
  ],
)
def test_gsam_needs_the_schedule_to_follow(given):
  with pytest.raises(ValueError, match='rho_min'):
    sam_jax.gsam(rho_min=0.01, **given)


def test_gsam_rho_min_above_rho_is_refused():
  with pytest.raises(ValueError, match='rho_max'):
    sam_jax.gsam(
      0.05, rho_min=0.1, learning_rate=lambda count: 0.1 * (count + 1), total_steps=3
    )


@pytest.mark.parametrize(
  ('base', 'name'), [(optax.sgd(0.1, 0.9), 'trace'), (optax.adam(0.1), 'mu')]
)
def test_msam_finds_the_momentum_buffer(base, name):
  w = jnp.array([1.0, -2.0])
  states = []
  for tx in (sam_jax.msam(base), sam_jax.msam(base, momentum=name)):
    state = tx.init(w)
    _, state = tx.update(w, state, w)
    states.append(sam_jax.gradient_point(state, w))
  np.testing.assert_array_equal(*states)
  assert np.linalg.norm(states[0] - w) == pytest.approx(0.3)


@pytest.mark.parametrize(
  ('base', 'count'),
  [
    (optax.sgd(0.1), 0),
    (optax.chain(optax.trace(0.9), optax.scale_by_adam()), 2),
  ],
)
def test_msam_wants_one_buffer(base, count):
  with pytest.raises(ValueError, match=f"'trace' or 'mu'.*found {count}"):
    sam_jax.msam(base).init(jnp.ones(2))
