"""Data sets whose examples are equal-sized arrays, as they are prepared and read."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class LabelledArrays(NamedTuple):
  """The parts of a set.

  Attributes:
    parts: by name, `inputs` of shape `(n, ...)`, int64 `labels` `(n,)` and, where a set
      has them, further arrays of n rows. All parts have the same arrays.
    classes: name of each class.
  """

  parts: Mapping[str, Mapping[str, np.ndarray]]
  classes: tuple[str, ...]
