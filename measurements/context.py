"""What a measurement has to work with: a network, its loss, operators, and a place."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from measurements import network as network_lib
from measurements.files import Part, Parts
from measurements.network import Network
from measurements.objective import Objective, cast
from measurements.stages import Stages
from sam_jax import curvature
from sam_jax.measuring.entries import plain
from training import problem as problem_lib
from training.errors import UsageError
from training.problem import Batch


class Context:
  """One network that is measured.

  Attributes:
    network: what is measured.
    objective: its loss and its examples.
    options: how it is measured.
    params: its parameters on the devices, in the type of the options.
    folder: where result files go; None while a network is trained.
    parts: what a killed measurement need not repeat; None while a network is trained.
  """

  def __init__(
    self,
    network: Network,
    objective: Objective,
    *,
    folder: pathlib.Path | None = None,
    fingerprint: str = '',
    stages: Stages | None = None,
  ):
    self.network = network
    self.objective = objective
    self.options = objective.options
    self.folder = folder
    self.parts: Parts | None = None
    self.params = self._placed(network.params)
    mesh, stats = objective.mesh, cast(network.batch_stats, self.options.dtype)
    self._batch_stats = mesh.copy(stats) if mesh else jax.device_put(stats)
    self._fingerprint = fingerprint
    self._stages = stages
    self._done: dict[str, Part] = {}
    self._inner_seconds = 0.0
    self._counted: list[curvature.Operator] = []

  def show(self, message: str) -> None:
    """Says what is going on."""
    if self._stages is not None:
      self._stages.show(message)

  def count(self, done: int, total: int) -> None:
    """Tells the progress how many of its equal pieces this measurement has done."""
    if self._stages is not None:
      self._stages.count(done, total)

  def show_points(self, name: str) -> Callable[[int, int], None]:
    """A ``progress=`` for a grid."""
    return functools.partial(self._show_pieces, name, 'points')

  def _show_pieces(self, name: str, unit: str, done: int, total: int) -> None:
    self.count(done, total)
    self.show(f'{name}: {done:,} of {total:,} {unit}')

  def key(self, number: int) -> jax.Array:
    """The random key of that number; measurements with one number share it."""
    return jax.random.fold_in(jax.random.key(self.options.seed), number)

  # Examples and operators.

  def examples(self, split: str, batch_size: int, count: int) -> list[Batch]:
    """Batches as `Objective.examples` has them, for the functions of the objective."""
    drawn = self.objective.examples(split, batch_size, count)
    return [{**batch, 'batch_stats': self._batch_stats} for batch in drawn]

  @functools.cached_property
  def batches(self) -> list[Batch]:
    """The examples whose mean loss is measured."""
    options = self.options
    return self.examples(options.split, options.batch_size, options.num_examples)

  @functools.cached_property
  def operator(self) -> curvature.Operator:
    """The operator that the options name."""
    return self.finished(self._whole)

  @functools.cached_property
  def adaptive_operator(self) -> curvature.Operator:
    """The same preconditioned with the size of every parameter."""
    scaled = curvature.preconditioned(self._whole, jax.tree.map(jnp.abs, self.params))
    return self.restrict(scaled, self.options.params_regex)

  @functools.cached_property
  def _whole(self) -> curvature.Operator:
    return self.over(self.batches)

  def over(self, batches: list[Batch]) -> curvature.Operator:
    """The matrix that the options name, over batches and all parameters."""
    objective, weight = self.objective, problem_lib.num_examples
    if self.options.operator == 'gauss_newton':
      return curvature.gauss_newton(
        objective.outputs,
        objective.loss_of_outputs,
        self.params,
        batches,
        weight=weight,
      )
    if self.options.operator == 'fisher':
      return curvature.empirical_fisher(
        objective.weighted_losses, self.params, batches, weight=weight
      )
    return curvature.hessian(objective.loss, self.params, batches, weight=weight)

  def finished(self, operator: curvature.Operator) -> curvature.Operator:
    """An operator of `over`, preconditioned and restricted as the options say."""
    if self._scale is not None:
      operator = curvature.preconditioned(operator, self._scale)
    return self.restrict(operator, self.options.params_regex)

  def restrict(self, operator: curvature.Operator, regex: str) -> curvature.Operator:
    """The block of an operator of the parameters whose path has a match."""
    try:
      return curvature.restricted(operator, regex) if regex else operator
    except ValueError as error:
      reason = str(error).partition(' matches ')[2]
      raise UsageError(f'--params_regex={regex} matches {reason}.') from error

  def direction(self, vector: Any) -> Any:
    """A vector of `operator` as a direction through all parameters."""
    # A restricted vector has None where a parameter is left out.
    whole = jax.tree.map(
      lambda p, v: jnp.zeros_like(p) if v is None else v, self.params, vector
    )
    if self._scale is None:
      return whole
    return jax.tree.map(jnp.multiply, self._scale, whole)

  @functools.cached_property
  def _scale(self) -> Any:
    """The diagonal of the preconditioner, or None."""
    if self.options.preconditioner == 'adaptive':
      return jax.tree.map(jnp.abs, self.params)
    if self.options.preconditioner == 'adam':
      state = network_lib.second_moments(self.network)
      scale = curvature.adam_preconditioner(state)
      return self._placed(scale)
    return None

  def _placed(self, tree: Any) -> Any:
    """A tree like the parameters in the type of the options, on the devices."""
    tree, mesh = cast(tree, self.options.dtype), self.objective.mesh
    return mesh.spread(tree) if mesh else jax.device_put(tree)

  def search(
    self,
    name: str,
    operator: curvature.Operator,
    k: int,
    which: str,
    title: str,
    *,
    verify: bool = True,
  ) -> curvature.Eigenpairs:
    """Eigenpairs to the tolerance of the options, with progress.

    Args:
      name: under which products are recorded; one for each search.
      operator: whose pairs are wanted.
      k: how many at each end.
      which: as for `curvature.eigenpairs`.
      title: of the progress.
      verify: as for `curvature.eigenpairs`.
    """

    def show(progress: curvature.Progress) -> None:
      self.show(
        f'{title}: {progress.num_matvecs} products, {progress.num_converged} of '
        f'{progress.num_wanted} converged, residual {progress.residual:.1e}'
      )

    with self.counted(name, operator) as products:
      return curvature.eigenpairs(
        products,
        k,
        which,
        tol=self.options.tol,
        key=jax.random.key(self.options.seed),
        max_num_matvecs=self.options.max_num_matvecs,
        max_basis_gib=self.options.max_basis_gib,
        verify=verify,
        check_symmetry=False,  # Summaries say what did not converge.
        progress=show,
      )

  @contextlib.contextmanager
  def counted(
    self, name: str, operator: curvature.Operator, total: int = 0
  ) -> Iterator[curvature.Operator]:
    """An operator whose products are counted, and need not be repeated after a kill.

    Args:
      name: under which products are recorded.
      operator: that takes them.
      total: how many will be taken, for the progress; 0 is unknown.

    Raises:
      UsageError: `curvature` refuses its arguments.
    """
    title = name.replace('_', ' ')

    def matvec(vector: Any) -> Any:
      product = operator.matvec(vector)
      if total:
        self._show_pieces(title, 'products', made.num_matvecs, total)
      return product

    made = curvature.operator(matvec, operator.structure)
    if self.parts is not None:
      made = curvature.journaled(
        made,
        self.parts.journal(name),
        identity=self._fingerprint,
        max_gib=self.options.max_journal_gib,
      )
    self._counted.append(made)
    try:
      yield made
    except ValueError as error:
      # Arguments are refused before the first product; later errors are bugs.
      if made.num_matvecs or isinstance(error, UsageError):
        raise
      raise UsageError(f'--{error}.') from error

  # Parts.

  def part(self, name: str, compute: Callable[[], Any]) -> Any:
    """What a function computes, once, also over a kill; Eigenpairs, or for JSON."""
    if name not in self._done:
      part = None
      if self.parts is not None:
        part = self.parts.load(name, self.operator.structure)
      self._done[name] = part or self._computed(name, compute)
    return self._done[name].value

  def _computed(self, name: str, compute: Callable[[], Any]) -> Part:
    """Computes a part; those inside it keep their own time and products."""
    outer = self._counted, self._inner_seconds
    self._counted, self._inner_seconds = [], 0.0
    started = time.perf_counter()
    value = compute()
    if not isinstance(value, curvature.Eigenpairs):
      value = plain(value)
    seconds = time.perf_counter() - started
    products = sum(operator.num_matvecs for operator in self._counted)
    part = Part(value, seconds - self._inner_seconds, products)
    self._counted, self._inner_seconds = outer[0], outer[1] + seconds
    if self.parts is not None:
      self.parts.save(name, part)
    return part

  def costs(self) -> dict[str, Any]:
    """Products and seconds of all parts, for the summary."""
    products = {name: p.num_matvecs for name, p in self._done.items() if p.num_matvecs}
    seconds = {name: part.seconds for name, part in self._done.items()}
    return {
      'num_matvecs': sum(products.values()),
      'num_matvecs_by_part': products,
      'seconds': sum(seconds.values()),
      'seconds_by_part': seconds,
    }
