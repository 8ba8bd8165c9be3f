"""Curvature of a loss: operators, eigenpairs, spectral density, traces."""

from sam_jax.curvature.basis import NonFiniteError as NonFiniteError
from sam_jax.curvature.density import SpectralDensity as SpectralDensity
from sam_jax.curvature.density import spectral_density as spectral_density
from sam_jax.curvature.eigen import Eigenpairs as Eigenpairs
from sam_jax.curvature.eigen import Progress as Progress
from sam_jax.curvature.eigen import eigenpairs as eigenpairs
from sam_jax.curvature.eigen import load_eigenpairs as load_eigenpairs
from sam_jax.curvature.estimates import DiagonalEstimate as DiagonalEstimate
from sam_jax.curvature.estimates import Estimate as Estimate
from sam_jax.curvature.estimates import diagonal as diagonal
from sam_jax.curvature.estimates import squared_frobenius_norm as squared_frobenius_norm
from sam_jax.curvature.estimates import trace as trace
from sam_jax.curvature.gram import empirical_fisher as empirical_fisher
from sam_jax.curvature.gram import gauss_newton as gauss_newton
from sam_jax.curvature.journal import JournaledOperator as JournaledOperator
from sam_jax.curvature.journal import journaled as journaled
from sam_jax.curvature.operators import HessianOperator as HessianOperator
from sam_jax.curvature.operators import Operator as Operator
from sam_jax.curvature.operators import hessian as hessian
from sam_jax.curvature.operators import hvp as hvp
from sam_jax.curvature.operators import operator as operator
from sam_jax.curvature.transforms import adam_preconditioner as adam_preconditioner
from sam_jax.curvature.transforms import paths as paths
from sam_jax.curvature.transforms import preconditioned as preconditioned
from sam_jax.curvature.transforms import restricted as restricted
