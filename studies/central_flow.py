r"""The central flow against the time average of gradient descent.

  python -m studies.central_flow --task=eos_mnist_mlp --scale=small \
      --model='features=(50,50),activation=tanh' --learning_rate=0.8 --steps=1000 \
      --every=25 --window=24 --manual_dir=DIR --out=runs/central_flow

Beyond 2 / eta gradient descent oscillates along the sharpest directions, and the
central flow (Cohen et al., arXiv 2410.24206) is to be its time average: at the same
number of steps it predicts the averaged loss, which the oscillation raises, and the
sharpness at the averaged parameters. Both start where train.py does with the same seed,
on the loss over the whole training split in evaluation mode, without weight decay.

The flow takes third derivatives and the top eigenpairs at each of its substeps, so that
small networks are what it is for; those with a smooth activation, as tanh, are
differentiable three times. float64 is best: --dtype=float64.

--out gets lines.jsonl (a line a comparison), result.json (median relative differences
where the flow is at the edge) and figure.png. A study that is killed at any moment goes
on when the same command is given again and writes the same lines bit for bit; with
larger --steps one that has ended goes on, too.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from input_pipelines import DataError
from sam_jax import edges, perturbations
from studies import full_batch
from training import cli, curves
from training import config as config_lib
from training.errors import UsageError

# Arguments of `edges.central_flow` that are flags.
_OF_FLOW = ('substeps', 'num_eigenvalues', 'tol')


def _define_flags() -> cli.Flags:
  flags = full_batch.define_flags('runs/central_flow')
  flags.define(
    'window', 'int', 'steps of descent averaged around a comparison, an even number', 20
  )
  flags.define('substeps', 'int', "the flow's Euler steps for one of descent", 4)
  flags.define('num_eigenvalues', 'int', 'top eigenvalues followed; it may grow', 3)
  flags.define(
    'tol', 'float', 'residual of eigenpairs, relative to the largest eigenvalue', 1e-6
  )
  return flags


class Average(NamedTuple):
  """Gradient descent over a window of steps, its ends with half the weight.

  The weights of odd and of even steps are the same, so that an oscillation of period 2
  is averaged away.

  Attributes:
    step: the middle.
    params: mean parameters.
    loss: mean loss.
    variance: mean of |eta g|^2 / 4, which an oscillation of period 2 has as its
      variance; below the edge it is that of the steps' own length.
    descent: the parameters at the window's end.
  """

  step: int
  params: Any
  loss: float
  variance: float
  descent: Any


@functools.partial(jax.jit, static_argnums=0)
def _step(loss_fn, params, batch, learning_rate, mean, weight):
  """A step of descent; its start is added to a mean with a weight."""
  with jax.default_matmul_precision('highest'):
    value, gradient = jax.value_and_grad(loss_fn)(params, batch)
  add = lambda factor: lambda x, y: x + jnp.asarray(factor, x.dtype) * y.astype(x.dtype)
  after = jax.tree.map(add(-learning_rate), params, gradient)
  variance = (learning_rate * perturbations.norm(gradient)) ** 2 / 4
  return after, jax.tree.map(add(weight), mean, params), value, variance


def averages(
  full: full_batch.FullBatch,
  learning_rate: float,
  steps: Sequence[int],
  window: int,
  params: Any,
  done: int = 0,
) -> Iterator[Average]:
  """Follows gradient descent.

  Args:
    full: the loss.
    learning_rate: eta.
    steps: the middles of the windows, which must not overlap.
    window: steps from the first of a window to its last, even.
    params: where descent stands.
    done: after how many steps.

  Yields:
    The average around each of the steps.
  """
  for middle in steps:
    mean = jax.tree.map(jnp.zeros_like, params)
    losses, variances, weights = [], [], []
    first, last = middle - window // 2, middle + window // 2
    for step in range(done, last + 1):
      inside = step >= first
      weight = inside / window * (0.5 if step in (first, last) else 1.0)
      after, mean, loss, variance = _step(
        full.loss, params, full.batch, learning_rate, mean, weight
      )
      if inside:
        losses, variances = [*losses, loss], [*variances, variance]
        weights.append(weight)
      if step < last:
        params = after
    done = last
    sums = [float(np.dot(weights, jax.device_get(x))) for x in (losses, variances)]
    yield Average(middle, mean, *sums, params)


def compare(
  full: full_batch.FullBatch,
  learning_rate: float,
  steps: Sequence[int],
  window: int,
  state: dict[str, Any] | None = None,
  **of_flow: Any,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
  """Follows descent and the central flow.

  Args:
    full: the loss and the start.
    learning_rate: eta of gradient descent.
    steps: where to compare, at least half a window from the start and a window apart.
    window: steps that are averaged, even.
    state: one that came with an earlier line, to go on from; ``steps`` are those after
      it.
    **of_flow: arguments of `sam_jax.edges.central_flow`.

  Yields:
    A line, and the state from which the next one follows.

  Raises:
    FloatingPointError: the loss or a derivative is not finite.
    ArithmeticError: no covariance holds the eigenvalues at the edge.
  """
  flow, descent, done, block = full.params, full.params, 0, None
  if state is not None:
    flow, descent = _central(state), jax.device_put(state['descent'])
    done, block = int(state['descent_step']), state['block']
  found = zip(
    edges.central_flow(full.loss, flow, full.batch, learning_rate, steps, **of_flow),
    averages(full, learning_rate, steps, window, descent, done),
    strict=True,
  )
  for central, average in found:
    _, sharpness, residual, block = full_batch.sharpness(
      full.loss, average.params, full.batch, block, average.step
    )
    apart, moved = (
      float(perturbations.norm(jax.tree.map(jnp.subtract, average.params, other)))
      for other in (central.params, full.params)
    )
    line = {
      'step': central.step,
      'edge': float(edges.gd_edge(learning_rate)),
      'descent_loss': average.loss,
      'predicted_loss': central.predicted_loss,
      'flow_loss': central.loss,
      'descent_sharpness': float(sharpness),
      'flow_sharpness': float(central.eigenvalues[0]),
      'descent_variance': average.variance,
      'flow_variance': float(np.trace(central.covariance)),
      'at_edge': int(np.sum(np.linalg.eigvalsh(central.covariance) > 0)),
      'distance': apart,
      'relative_distance': apart / moved if moved else 0.0,
      'residual': float(residual),
    }
    yield line, _state(central, average, block, window)


def _state(central, average, block, window) -> dict[str, Any]:
  return {
    'flow': {
      'step': central.step,
      'params': central.params,
      'eigenvalues': central.eigenvalues,
      'search': central.search,
    },
    'descent': average.descent,
    'descent_step': average.step + window // 2,
    'block': block,
  }


def _central(state: dict[str, Any]) -> edges.CentralState:
  flow = state['flow']
  return edges.CentralState(
    int(flow['step']),
    jax.device_put(flow['params']),
    float('nan'),
    float('nan'),
    flow['eigenvalues'],
    np.zeros((0, 0)),
    jax.device_put(flow['search']),
  )


def _over(found: float, wanted: float) -> float:
  """A ratio less 1; that of two zeros is 0."""
  if wanted:
    return found / wanted - 1
  return math.copysign(sys.float_info.max, found) if found else 0.0


def summarize(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What the lines say of the claim.

  Args:
    lines: by step.

  Returns:
    ``edge_step``, the first compared step at which the flow oscillates, None if there
    is none; ``compared`` lines from there on (or all), and over them the medians of the
    relative differences, each |flow - descent| / descent: ``predicted_loss``, and
    ``flow_loss`` without the oscillation's share, from the averaged loss,
    ``sharpness`` and ``variance`` from those of descent; the median distance over how
    far descent has moved, ``relative_distance``; under ``of_means`` by how much the
    mean over all these lines differs for each, which counts where descent oscillates in
    bursts that are rarer than a window; and ``text``.
  """
  first = next((line['step'] for line in lines if line['at_edge']), None)
  late = [line for line in lines if first is None or line['step'] >= first]

  def median(name, of):
    return float(np.median([abs(_over(line[name], line[of])) for line in late]))

  def of_means(name, of):
    mean = lambda key: np.mean([line[key] for line in late])
    return float(_over(mean(name), mean(of)))

  pairs = {
    'predicted_loss': ('predicted_loss', 'descent_loss'),
    'flow_loss': ('flow_loss', 'descent_loss'),
    'sharpness': ('flow_sharpness', 'descent_sharpness'),
  }
  if first is not None:
    pairs['variance'] = ('flow_variance', 'descent_variance')
  found = {
    'steps': lines[-1]['step'],
    'edge': lines[-1]['edge'],
    'edge_step': first,
    'compared': len(late),
    'variance': None,
    **{name: median(*pair) for name, pair in pairs.items()},
    'relative_distance': float(np.median([x['relative_distance'] for x in late])),
    'of_means': {name: of_means(*pair) for name, pair in pairs.items()},
  }
  return {**found, 'text': _text(found)}


def _text(found: dict[str, Any]) -> str:
  share = lambda name: f'{100 * found[name]:.2f} %'
  means = {name: f'{100 * x:+.2f} %' for name, x in found['of_means'].items()}
  start = f'the flow is not at the edge in {found["steps"]} steps'
  if found['edge_step'] is not None:
    start = (
      f'from step {found["edge_step"]} on the flow is at 2 / eta = {found["edge"]:g}'
    )
  return (
    f'{start}; median differences from the average of descent: predicted loss '
    f'{share("predicted_loss")} (without the oscillation {share("flow_loss")}), '
    f'sharpness {share("sharpness")}, distance {share("relative_distance")} of the way'
    f'; of the means over all lines: predicted loss {means["predicted_loss"]} (without '
    f'the oscillation {means["flow_loss"]}), sharpness {means["sharpness"]}'
  )


def draw(lines: Sequence[dict[str, Any]], title: str) -> Any:
  """Sharpness, loss and variance of both by step.

  Args:
    lines: by step.
    title: above the figure.

  Returns:
    A `matplotlib.figure.Figure`.
  """
  from matplotlib.figure import Figure  # Slow to import.

  figure = Figure(figsize=(7.0, 7.5), layout='constrained')
  panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
  steps = [line['step'] for line in lines]
  kinds = (
    (panels[0], 'descent_sharpness', 'at the average of gradient descent', 'C0.'),
    (panels[0], 'flow_sharpness', 'central flow', 'k-'),
    (panels[1], 'descent_loss', 'average over gradient descent', 'C0.'),
    (panels[1], 'predicted_loss', 'predicted by the central flow', 'k-'),
    (panels[1], 'flow_loss', 'at the central flow itself', 'C3--'),
    (panels[2], 'descent_variance', 'of gradient descent', 'C0.'),
    (panels[2], 'flow_variance', 'predicted by the central flow', 'k-'),
  )
  for panel, name, label, style in kinds:
    values = [line[name] or None for line in lines]
    panel.plot(steps, values, style, label=label, lw=1, ms=4)
  panels[0].axhline(lines[-1]['edge'], color='0.5', ls='--', lw=1, label='2 / eta')
  panels[0].set(ylabel='sharpness')
  panels[1].set(ylabel='loss', yscale='log')
  panels[2].set(ylabel='variance of the\noscillation', yscale='log', xlabel='step')
  for panel in panels:
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
  for panel in panels[1:]:
    curves.label_plainly(panel.yaxis)
  figure.suptitle(title)
  return figure


def _tell(line: dict[str, Any]) -> str:
  return (
    f'loss {line["descent_loss"]:.5g}, predicted {line["predicted_loss"]:.5g}  '
    f'sharpness {line["descent_sharpness"]:.4g}, of the flow '
    f'{line["flow_sharpness"]:.4g}, 2/eta {line["edge"]:.4g}'
  )


def _check(flags: Any) -> None:
  if flags.window < 2 or flags.window % 2 or flags.window > flags.every:
    raise UsageError(
      f'--window={flags.window}: give an even number from 2 to --every={flags.every}.'
    )
  if flags.substeps < 2:
    raise UsageError(f'--substeps={flags.substeps}: must be at least 2.')
  if flags.num_eigenvalues < 1:
    raise UsageError(f'--num_eigenvalues={flags.num_eigenvalues}: must be at least 1.')
  if not 0 < flags.tol < 1:
    raise UsageError(f'--tol={flags.tol}: must be above 0 and below 1.')


def main(argv: Sequence[str]) -> None:
  """Compares what the flags say."""
  flags = _define_flags().parse(argv, __doc__)
  config = full_batch.check(flags)
  _check(flags)
  of_flow = {name: flags[name].value for name in _OF_FLOW}
  facts = full_batch.facts(config, flags, ['window', *_OF_FLOW])
  title = (
    f'{config_lib.short(config.task)}: gradient descent and its central flow, eta '
    f'{config.learning_rate:g}, seed {config.seed}'
  )
  follow = lambda full, steps, state: compare(
    full, config.learning_rate, steps, flags.window, state, **of_flow
  )
  study = full_batch.Study('central_flow', title, 1, follow, _tell, draw, summarize)
  full_batch.run(study, config, flags, facts)


if __name__ == '__main__':
  sys.exit(cli.run(main, sys.argv, errors=(DataError,)))
