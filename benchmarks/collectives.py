"""What a compiled program moves between devices, read from its text."""

import re
from typing import Any, NamedTuple

import numpy as np

_CALL = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
  r'(?:-start)?\('
)
_BITS = re.compile(r'\d+')


class Collective(NamedTuple):
  """One operation over devices.

  Attributes:
    kind: 'all-reduce', 'all-gather', ...
    entries: numbers that each device has of its result.
    num_bytes: their size.
  """

  kind: str
  entries: int
  num_bytes: int


def of(compiled: Any) -> list[Collective]:
  """Those of a program, in the order of its text; the body of a loop counts once.

  The results of one operation are taken together, as they travel together.
  """
  found = []
  for results, kind in _CALL.findall(compiled.as_text()):
    entries = num_bytes = 0
    for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', results):
      size = int(np.prod([int(n) for n in shape.split(',') if n]))
      bits = _BITS.search(dtype)
      entries += size
      num_bytes += size * (int(bits[0]) // 8 if bits else 1)
    found.append(Collective(kind, entries, num_bytes))
  return found
