"""The methods, one file each, and how a method is declared and found."""

from sam_jax.methods._declare import PROVIDED as PROVIDED
from sam_jax.methods._declare import Bounds as Bounds
from sam_jax.methods._declare import Choices as Choices
from sam_jax.methods._declare import Hyperparameter as Hyperparameter
from sam_jax.methods._declare import Radius as Radius
from sam_jax.methods._declare import Traits as Traits
from sam_jax.methods._declare import declared as declared
from sam_jax.methods._declare import find as find
from sam_jax.methods._declare import hyperparameters as hyperparameters
from sam_jax.methods._declare import is_method as is_method
from sam_jax.methods._declare import lost_in_float32 as lost_in_float32
from sam_jax.methods._declare import method as method
