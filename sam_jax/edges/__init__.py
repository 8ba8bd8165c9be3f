"""Edges of stability, and the quantities that training holds at them."""

from sam_jax.edges.batch_sharpness import BatchSharpness as BatchSharpness
from sam_jax.edges.batch_sharpness import batch_sharpness as batch_sharpness
from sam_jax.edges.batch_sharpness import perturbed_direction as perturbed_direction
from sam_jax.edges.central_flow import CentralState as CentralState
from sam_jax.edges.central_flow import central_flow as central_flow
from sam_jax.edges.central_flow import solve_complementarity as solve_complementarity
from sam_jax.edges.flow import Departure as Departure
from sam_jax.edges.flow import FlowState as FlowState
from sam_jax.edges.flow import departure_from_flow as departure_from_flow
from sam_jax.edges.flow import gradient_flow as gradient_flow
from sam_jax.edges.formulas import Plateaus as Plateaus
from sam_jax.edges.formulas import adam_edge as adam_edge
from sam_jax.edges.formulas import alignment as alignment
from sam_jax.edges.formulas import batch_sharpness_plateaus as batch_sharpness_plateaus
from sam_jax.edges.formulas import gd_edge as gd_edge
from sam_jax.edges.formulas import heavy_ball_edge as heavy_ball_edge
from sam_jax.edges.formulas import nesterov_edge as nesterov_edge
from sam_jax.edges.formulas import sam_edge as sam_edge
from sam_jax.edges.formulas import usam_edge as usam_edge
from sam_jax.edges.noise import SquaredError as SquaredError
from sam_jax.edges.noise import noise_kernel_norm as noise_kernel_norm
from sam_jax.edges.noise import (
  noise_kernel_norm_of_spectrum as noise_kernel_norm_of_spectrum,
)
from sam_jax.edges.noise import squared_error as squared_error
