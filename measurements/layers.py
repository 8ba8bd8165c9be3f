"""Each layer by itself: the block of the operator that belongs to its parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from measurements.context import Context
from measurements.measurement import Measurement, Section, Summary, option, with_error
from sam_jax import curvature


@dataclasses.dataclass(frozen=True)
class Options:
  """Whether."""

  per_layer: bool = option(
    False, 'also the trace and the largest eigenvalue of the block of each layer'
  )


def _run(context: Context) -> dict[str, Any]:
  if not context.options.per_layer:
    return {'layers': None}
  total = context.options.trace_matvecs
  with context.counted('layers', context.operator, total) as products:
    estimate = curvature.diagonal(products, total, key=context.key(6))
  layers: dict[str, list[str]] = {}
  for path in estimate.leaf_traces:
    layers.setdefault(path.rpartition('/')[0] or path, []).append(path)
  found = []
  for number, (layer, paths) in enumerate(layers.items()):
    context.count(number, len(layers))
    found.append(_layer(context, f'layers_{number}', layer, paths, estimate))
  return {'layers': found}


def _layer(context, name, layer, paths, estimate) -> dict[str, Any]:
  regex = '^(' + '|'.join(re.escape(path) for path in paths) + ')$'
  block = context.restrict(context.operator, regex)
  pairs = context.search(name, block, 1, 'largest', layer, verify=False)
  traces = [estimate.leaf_traces[path] for path in paths]
  return {
    'layer': layer,
    'num_parameters': block.size,
    'trace': sum(t.value for t in traces),
    # The leaves share their probes: at most the sum, reached if all go together.
    'trace_standard_error': sum(t.standard_error for t in traces),
    'lambda_max': pairs.eigenvalues[0],
    'lambda_max_residual': pairs.residuals[0],
    'converged': pairs.converged[0],
  }


def _sections(summaries: Mapping[str, Summary]) -> list[Section]:
  return [
    Section(f'Layers of {name}', _rows(summary['layers']), _TEXT)
    for name, summary in summaries.items()
    if summary.get('layers')
  ]


def _rows(layers: list[dict[str, Any]]) -> list[list[str]]:
  return [
    ['layer', 'parameters', 'trace', 'lambda_max', 'residual'],
    *(
      [
        layer['layer'],
        f'{layer["num_parameters"]:,}',
        with_error(layer['trace'], layer['trace_standard_error']),
        f'{layer["lambda_max"]:.5g}',
        f'{layer["lambda_max_residual"]:.1e}',
      ]
      for layer in layers
    ),
  ]


_TEXT = (
  'Each layer by itself: the block of the operator that belongs to its parameters. '
  'The traces add up to that of the whole; no lambda_max exceeds the whole one.'
)

MEASUREMENT = Measurement(
  run=_run,
  options=Options,
  order=80,
  switch='per_layer',
  sections=_sections,
)
