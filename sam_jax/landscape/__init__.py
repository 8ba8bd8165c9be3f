"""Loss landscapes: the loss along directions through the parameters."""

from sam_jax.landscape.directions import Trajectory as Trajectory
from sam_jax.landscape.directions import difference as difference
from sam_jax.landscape.directions import random_directions as random_directions
from sam_jax.landscape.directions import trajectory as trajectory
from sam_jax.landscape.grid import line as line
from sam_jax.landscape.grid import surface as surface
from sam_jax.landscape.ratio import EIGEN_RATIO as EIGEN_RATIO
from sam_jax.landscape.ratio import eigen_ratio as eigen_ratio
from sam_jax.landscape.result import Landscape as Landscape
from sam_jax.landscape.result import load as load
