"""Who shares a perturbation: decided by the recipe, never by the number of devices."""

from __future__ import annotations

from typing import NamedTuple

from training import methods
from training.config import Config
from training.errors import UsageError


class Sharing(NamedTuple):
  """How a batch is dealt out to replicas, and who perturbs with whom.

  Attributes:
    num_replicas: replicas over which a batch is dealt out.
    whole: whether the whole batch shares one perturbation: then every gradient is
      averaged over the replicas as soon as it is taken.
    groups: groups of m-sharpness on each replica, a leading axis of its batches; 0 if
      the replica's share is one group, or the whole batch is.
    microbatches: parts in which a replica takes its share, or each of its groups, one
      after the other.
  """

  num_replicas: int = 1
  whole: bool = True
  groups: int = 0
  microbatches: int = 1

  @property
  def axes(self) -> tuple[int, ...]:
    """Leading axes of a replica's batch."""
    return (self.groups,) if self.groups else ()


def of(config: Config, num_replicas: int = 1) -> Sharing:
  """The sharing that a configuration asks for on some replicas.

  Raises:
    UsageError: its groups span some devices but not all, or do not divide a device's
      share of the batch; or its microbatches divide neither a share nor a group.
  """
  size, count = config.batch_size, config.m_sharpness or config.batch_size
  if not methods.is_method(config.optimizer) or count == size:
    found = Sharing(num_replicas)
  else:
    found = _in_groups(size, count, num_replicas)
  num = config.grad_accum_steps
  parts = num_replicas * max(found.groups, 1)
  if num > 1 and size % (parts * num):
    whose = (
      'a group of --m_sharpness' if found.groups else f'one of {num_replicas} devices'
    )
    raise UsageError(
      f'--grad_accum_steps={num} does not divide the {size / parts:g} examples of '
      f'{whose} with --batch_size={size}: give a divisor of them.'
    )
  return found._replace(microbatches=num)


def _in_groups(size: int, count: int, num_replicas: int) -> Sharing:
  """The sharing of a batch of some size in groups of some count of examples."""
  share, rest = divmod(size, num_replicas)
  if rest or share % count:
    raise UsageError(
      f'--m_sharpness={count} does not fit {num_replicas} devices with '
      f'--batch_size={size}: a group has to lie within one device, whose share is '
      f'{size / num_replicas:g} examples; give a divisor of that, or {size} for one '
      'group of all.'
    )
  groups = share // count
  return Sharing(num_replicas, whole=False, groups=groups if groups > 1 else 0)
