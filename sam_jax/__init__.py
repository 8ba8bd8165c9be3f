"""Sharpness-aware minimization and exact sharpness measurement for JAX."""

from sam_jax import perturbations as perturbations
from sam_jax.replicas import cross_replica_mean as cross_replica_mean
from sam_jax.replicas import m_sharpness as m_sharpness
from sam_jax.sam import SamState as SamState
from sam_jax.sam import asam as asam
from sam_jax.sam import sam as sam
from sam_jax.sam import usam as usam
from sam_jax.version import __version__ as __version__
