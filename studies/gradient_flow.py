r"""Gradient descent against gradient flow: together up to 2 / eta, apart from there on.

  python -m studies.gradient_flow --task=eos_mnist_mlp --scale=small \
      --learning_rate=0.6 --steps=2000 --every=20 --manual_dir=DIR --out=runs/flow

Follows both from where train.py starts with the same seed, on the loss over the whole
training split in evaluation mode, without weight decay, whatever the batches of the
task's recipe are. At every so many steps it compares them at the same time: their
distance, also relative to the length of descent's path, and the sharpness of both
beside 2 / eta. Cohen et al. (arXiv 2103.00065) find that descent stays close to the
flow until its sharpness crosses 2 / eta, and that the flow's sharpness rises on.

--out gets lines.jsonl (a line a comparison), result.json (the crossing, the largest
relative distance before it, its growth after it) and figure.png. A study that is killed
at any moment goes on when the same command is given again and writes the same lines bit
for bit; with larger --steps one that has ended goes on, too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from input_pipelines import DataError
from sam_jax import edges
from studies import full_batch
from training import cli, curves
from training import config as config_lib
from training.errors import UsageError


def _define_flags() -> cli.Flags:
  flags = full_batch.define_flags('runs/gradient_flow')
  flags.define(
    'step_times_curvature',
    'float',
    'accuracy of the flow: its Runge-Kutta steps times the largest curvature',
    0.5,
  )
  return flags


def compare(
  full: full_batch.FullBatch,
  learning_rate: float,
  steps: Sequence[int],
  step_times_curvature: float = 0.5,
  state: dict[str, Any] | None = None,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
  """Follows descent and flow.

  Args:
    full: the loss and the start.
    learning_rate: eta of gradient descent.
    steps: where to compare, not descending.
    step_times_curvature: accuracy of the flow.
    state: one that came with an earlier line, to go on from; ``steps`` are those after
      it.

  Yields:
    A line, and the state from which the next one follows.

  Raises:
    FloatingPointError: the flow or its curvature is not finite.
  """
  start, blocks = full.params, {'descent': None, 'flow': None}
  if state is not None:
    start, blocks = _departure(state), state['blocks']
  found = edges.departure_from_flow(
    full.loss,
    start,
    full.batch,
    learning_rate,
    steps,
    step_times_curvature=step_times_curvature,
  )
  for each in found:
    measured = {}
    for name, params in (('descent', each.descent), ('flow', each.flow.params)):
      *numbers, block = full_batch.sharpness(
        full.loss, params, full.batch, blocks[name], each.step
      )
      blocks = {**blocks, name: block}
      measured[name] = [float(x) for x in numbers]
    (loss, descent, residual), (flow_loss, flow, flow_residual) = measured.values()
    path = each.path_length
    line = {
      'step': each.step,
      'time': each.flow.time,
      'distance': each.distance,
      'path_length': path,
      'relative_distance': each.distance / path if path else None,
      'sharpness': descent,
      'flow_sharpness': flow,
      'edge': float(edges.gd_edge(learning_rate)),
      'loss': loss,
      'flow_loss': flow_loss,
      'residual': residual,
      'flow_residual': flow_residual,
      'flow_steps': each.flow.num_steps,
    }
    yield line, _state(each, blocks)


def _state(each: edges.Departure, blocks: dict[str, Any]) -> dict[str, Any]:
  flow = each.flow
  search = {} if flow.search is None else {'search': flow.search}
  return {
    'step': each.step,
    'distance': each.distance,
    'path_length': each.path_length,
    'descent': each.descent,
    'flow': {
      'time': flow.time,
      'params': flow.params,
      'top_eigenvalue': flow.top_eigenvalue,
      'num_steps': flow.num_steps,
      'step_size': flow.step_size,
      **search,
    },
    'blocks': blocks,
  }


def _departure(state: dict[str, Any]) -> edges.Departure:
  flow = state['flow']
  return edges.Departure(
    int(state['step']),
    float(state['distance']),
    float(state['path_length']),
    jax.device_put(state['descent']),
    edges.FlowState(
      float(flow['time']),
      jax.device_put(flow['params']),
      float(flow['top_eigenvalue']),
      int(flow['num_steps']),
      jax.device_put(flow.get('search')),
      float(flow.get('step_size', math.inf)),
    ),
  )


def summarize(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What the lines say of the claim.

  Args:
    lines: by step.

  Returns:
    ``crossing_step``, the first compared step at which the sharpness of descent is at
    2 / eta or above after it was below, and ``flow_crossing_step``, None where there is
    none; of the relative distance the largest value up to the crossing (or the end)
    and up to half of it, each with its step, the step from which it stays below 1 %
    until the crossing, the values at the crossing and at the end, and the largest after
    the crossing; how many times that at the crossing this is, ``growth``, and the same
    of the distance itself; the largest sharpness of both over 2 / eta; and ``text``.
    The first steps have a large relative distance whatever the learning rate is,
    because their path is hardly longer than the distance.
  """
  crossing, flow_crossing = (
    _crossing(lines, name) for name in ('sharpness', 'flow_sharpness')
  )
  end = lines[-1]
  at = end if crossing is None else crossing
  found = {
    'steps': end['step'],
    'edge': end['edge'],
    'crossing_step': None if crossing is None else crossing['step'],
    'flow_crossing_step': None if flow_crossing is None else flow_crossing['step'],
    'largest_before': _largest(lines, at['step']),
    'largest_before_half': _largest(lines, at['step'] / 2),
    'below_one_percent_from': _below(lines, at['step']),
    'at_crossing': None if crossing is None else crossing['relative_distance'],
    'at_end': end['relative_distance'],
    'largest_after': None,
    'growth': None,
    'distance_growth': None,
    'largest_sharpness_over_edge': max(x['sharpness'] / x['edge'] for x in lines),
    'largest_flow_sharpness_over_edge': max(
      x['flow_sharpness'] / x['edge'] for x in lines
    ),
  }
  after = [] if crossing is None else [x for x in lines if x['step'] > at['step']]
  if after and at['distance']:
    found['largest_after'] = _largest(after, end['step'])
    largest = found['largest_after']['relative_distance']
    found['growth'] = largest / at['relative_distance']
    found['distance_growth'] = max(x['distance'] for x in after) / at['distance']
  return {**found, 'text': _text(found)}


def _crossing(lines, name) -> dict[str, Any] | None:
  below = False
  for line in lines:
    if below and line[name] >= line['edge']:
      return line
    below = below or line[name] < line['edge']
  return None


def _largest(lines, until: float) -> dict[str, Any] | None:
  """The largest relative distance up to a step, and its step."""
  found = [x for x in lines if x['step'] <= until and x['relative_distance']]
  if not found:
    return None
  line = max(found, key=lambda line: line['relative_distance'])
  return {'step': line['step'], 'relative_distance': line['relative_distance']}


def _below(lines, until: float) -> int | None:
  """The step from which the relative distance is below 1 % up to another."""
  found = None
  for line in lines:
    if line['step'] <= until and line['relative_distance'] is not None:
      below = line['relative_distance'] < 0.01
      found = (line['step'] if found is None else found) if below else None
  return found


def _text(found: dict[str, Any]) -> str:
  crossing, before = found['crossing_step'], found['largest_before']
  largest = '' if before is None else f'{100 * before["relative_distance"]:.2f} %'
  if crossing is None:
    of = f', their distance at most {largest} of the path' if largest else ''
    return f'no crossing of 2 / eta = {found["edge"]:g} in {found["steps"]} steps{of}'
  text = (
    f'descent crosses 2 / eta = {found["edge"]:g} at step {crossing}; up to there the '
    f'distance is at most {largest} of the path (step {before["step"]})'
  )
  if found['below_one_percent_from'] is not None:
    text += f', below 1 % from step {found["below_one_percent_from"]} on'
  after = found['largest_after']
  if after is None:
    return text
  share = f'{100 * after["relative_distance"]:.2f} %'
  return (
    f'{text}, {100 * found["at_crossing"]:.2f} % at the crossing, then up to '
    f'{found["growth"]:.1f} times that, {share} at step {after["step"]} (the distance '
    f'itself up to {found["distance_growth"]:.1f} times)'
  )


def draw(lines: Sequence[dict[str, Any]], title: str) -> Any:
  """Sharpness of both with 2 / eta, and below their distance, by step.

  Args:
    lines: by step.
    title: above the figure.

  Returns:
    A `matplotlib.figure.Figure`.
  """
  from matplotlib.figure import Figure  # Slow to import.

  figure = Figure(figsize=(7.0, 6.5), layout='constrained')
  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
  steps = [line['step'] for line in lines]
  column = lambda name: [line[name] for line in lines]
  upper.plot(steps, column('flow_sharpness'), 'C3-', label='gradient flow')
  upper.plot(steps, column('sharpness'), 'C0.-', ms=3, lw=1, label='gradient descent')
  upper.axhline(lines[-1]['edge'], color='k', ls='--', lw=1, label='2 / eta')
  upper.set(ylabel='sharpness')
  lower.plot(steps, [x or None for x in column('distance')], 'C2-', label='distance')
  relative = column('relative_distance')
  lower.plot(steps, [x or None for x in relative], 'C1-', label='distance / path')
  lower.axhline(0.01, color='C1', ls=':', lw=1, label='1 % of the path')
  lower.set(yscale='log', ylabel='distance of the two', xlabel='step')
  curves.label_plainly(lower.yaxis)
  crossing = _crossing(lines, 'sharpness')
  for panel in (upper, lower):
    if crossing is not None:
      panel.axvline(crossing['step'], color='0.5', lw=1)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
  if crossing is not None:
    upper.annotate(
      f' step {crossing["step"]}',
      (crossing['step'], upper.get_ylim()[0]),
      xytext=(2, 4),
      textcoords='offset points',
      fontsize=8,
    )
  figure.suptitle(title)
  return figure


def _tell(line: dict[str, Any]) -> str:
  share = line['relative_distance']
  of = '' if share is None else f' ({100 * share:.2f} % of the path)'
  return (
    f'distance {line["distance"]:.4g}{of}  sharpness {line["sharpness"]:.4g}, of the '
    f'flow {line["flow_sharpness"]:.4g}, 2/eta {line["edge"]:.4g}'
  )


def main(argv: Sequence[str]) -> None:
  """Compares what the flags say."""
  flags = _define_flags().parse(argv, __doc__)
  config = full_batch.check(flags)
  if not 0 < flags.step_times_curvature <= 2.5:
    raise UsageError(
      f'--step_times_curvature={flags.step_times_curvature}: must be above 0, and at '
      'most 2.5.'
    )
  facts = full_batch.facts(config, flags, ['step_times_curvature'])
  title = (
    f'{config_lib.short(config.task)}: gradient descent and gradient flow, eta '
    f'{config.learning_rate:g}, seed {config.seed}'
  )
  follow = lambda full, steps, state: compare(
    full, config.learning_rate, steps, flags.step_times_curvature, state
  )
  study = full_batch.Study('gradient_flow', title, 0, follow, _tell, draw, summarize)
  full_batch.run(study, config, flags, facts)


if __name__ == '__main__':
  sys.exit(cli.run(main, sys.argv, errors=(DataError,)))
