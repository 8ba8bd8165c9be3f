"""Sharpness-aware minimization and exact sharpness measurement for JAX."""

from sam_jax import perturbations as perturbations
from sam_jax import probes as probes
from sam_jax.esam import esam as esam
from sam_jax.friendly_sam import friendly_sam as friendly_sam
from sam_jax.graphsam import graphsam as graphsam
from sam_jax.gsam import gsam as gsam
from sam_jax.gsam import gsam_rho as gsam_rho
from sam_jax.looksam import looksam as looksam
from sam_jax.msam import gradient_point as gradient_point
from sam_jax.msam import msam as msam
from sam_jax.periodic import periodic as periodic
from sam_jax.replicas import cross_replica_mean as cross_replica_mean
from sam_jax.replicas import m_sharpness as m_sharpness
from sam_jax.sam import asam as asam
from sam_jax.sam import sam as sam
from sam_jax.sam import usam as usam
from sam_jax.universal_sam import det_sam as det_sam
from sam_jax.universal_sam import frob_sam as frob_sam
from sam_jax.universal_sam import trace_sam as trace_sam
from sam_jax.universal_sam import universal_sam as universal_sam
from sam_jax.version import __version__ as __version__
from sam_jax.wsam import decoupled_wsam as decoupled_wsam
from sam_jax.wsam import wsam as wsam
