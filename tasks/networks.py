"""Changes to a task's network that the command line asks for."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import jax

from training.errors import UsageError

# Of every flax module, or given by the data.
_FIXED = ('parent', 'name', 'num_classes', 'pixel_mean', 'pixel_std')


def attributes(model: Any) -> dict[str, Any]:
  """What may be changed of a network, with its values.

  >>> import models
  >>> attributes(models.GCN(num_classes=2))['dropout_rate']
  0.8
  """
  return {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in _FIXED
  }


def described(model: Any) -> str:
  """What may be changed of a network, as the command line would give it.

  >>> import models
  >>> described(models.MLP(features=(32, 32)))
  'features=(32,32), activation=relu, initial=lecun_normal'
  """
  plain = (int, float, str, tuple)
  values = attributes(model).items()
  shown = (f'{name}={x}' for name, x in values if isinstance(x, plain))
  return ', '.join(text.replace(' ', '') for text in shown)


def parse(model: Any, text: str) -> dict[str, Any]:
  """The attributes that a text changes, checked by name and type.

  Args:
    model: a flax.linen module that has them.
    text: the attributes, as `depth=16,width=2,norm=none` or `features=(32,32)`; '' for
      none.

  Raises:
    UsageError: an attribute that the network does not have, or a value of another type.
  """
  current, values = attributes(model), _parse(text) if text else {}
  for name, value in values.items():
    if name not in current:
      raise UsageError(
        f'--model={text}: the network has no {name!r}; choose from '
        f'{", ".join(current)}.'
      )
    kinds = (int, float) if isinstance(current[name], float) else type(current[name])
    if kinds is tuple and not isinstance(value, tuple):
      raise UsageError(
        f'--model={text}: {name} is a tuple, written in brackets and quotes, as '
        f"--model='{name}=(20,)' or --model='{name}=(20,30)'."
      )
    if not isinstance(value, kinds) or type(value) is bool is not type(current[name]):
      raise UsageError(
        f'--model={text}: {name} is like {current[name]!r}, which {value!r} is not.'
      )
  return values


def change(model: Any, text: str, example_inputs: Any) -> Any:
  """A network with some of its attributes changed.

  Args:
    model: a flax.linen module.
    text: the attributes, see `parse`.
    example_inputs: inputs that the changed network has to accept.

  Raises:
    UsageError: an attribute, its value, or a network that cannot be.

  >>> import jax.numpy as jnp
  >>> import models
  >>> change(models.MLP(), 'features=(8,)', jnp.zeros((1, 4))).features
  (8,)
  """
  if not text:
    return model
  changed = model.clone(**parse(model, text))
  try:
    jax.eval_shape(changed.init, jax.random.key(0), example_inputs)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise UsageError(f'--model={text}: there is no such network ({error})') from error
  return changed


def _parse(text: str) -> dict[str, Any]:
  """Reads `name=value,...` with values as in Python; a bare word is a string."""
  try:
    call = ast.parse(f'f({text})', mode='eval').body
    if not isinstance(call, ast.Call) or call.args:
      raise ValueError
    pairs = [
      (
        keyword.arg,
        keyword.value.id
        if isinstance(keyword.value, ast.Name)
        else ast.literal_eval(keyword.value),
      )
      for keyword in call.keywords
    ]
  except (SyntaxError, ValueError):
    raise UsageError(
      f'--model={text}: give name=value pairs, as depth=16,width=2, and tuples in '
      "brackets and quotes, as --model='features=(20,30)'."
    ) from None
  names = [name for name, _ in pairs]
  if twice := [name for name in names if names.count(name) > 1]:
    raise UsageError(
      f'--model={text} has {twice[0]} twice: give one value; a sweep cannot go over '
      'networks, so start a run of each.'
    )
  return dict(pairs)
