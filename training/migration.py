"""Configurations of earlier versions, brought to today's fields."""

from __future__ import annotations

from typing import Any

from training import methods

# Format 1 had a field for each argument of each method; these said "the default".
_UNSET = {'num_probes': 0, 'universal_lam': None, 'gsam_rho_min': None}


def from_format_1(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields of format 2 that mean what those of format 1 meant on one device.

  The arguments of methods become one dict, of those of the run's own method. An
  m_sharpness of 0 was one group a device, and sync_perturbation one group over all.
  """
  fields = dict(fields)
  name = fields['optimizer']
  specs = methods.hyperparameters(name)
  values = {}
  for flag in methods.flags(methods.found()):
    if flag not in fields:
      continue
    value = fields.pop(flag)
    own = [s for s in specs.values() if s.flag == flag]
    if own and value != _UNSET.get(flag, object()):
      values[own[0].name] = value
  if specs:
    fields['hyperparameters'] = methods.resolve(name, values)
  else:
    fields['hyperparameters'] = {}
  for flag in _UNSET:
    fields.pop(flag, None)
  groups = fields.pop('m_sharpness', 0)
  fields.pop('sync_perturbation', None)
  fields['m_sharpness'] = (groups or fields['batch_size']) if specs else None
  return fields
