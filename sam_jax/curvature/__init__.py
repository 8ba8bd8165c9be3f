"""Curvature of a loss: operators, eigenpairs, spectral density, trace."""

from sam_jax.curvature.basis import NonFiniteError as NonFiniteError
from sam_jax.curvature.density import SpectralDensity as SpectralDensity
from sam_jax.curvature.density import spectral_density as spectral_density
from sam_jax.curvature.eigen import Eigenpairs as Eigenpairs
from sam_jax.curvature.eigen import Progress as Progress
from sam_jax.curvature.eigen import eigenpairs as eigenpairs
from sam_jax.curvature.estimates import Estimate as Estimate
from sam_jax.curvature.estimates import trace as trace
from sam_jax.curvature.operators import HessianOperator as HessianOperator
from sam_jax.curvature.operators import Operator as Operator
from sam_jax.curvature.operators import hessian as hessian
from sam_jax.curvature.operators import hvp as hvp
from sam_jax.curvature.operators import operator as operator
from sam_jax.curvature.operators import preconditioned as preconditioned
