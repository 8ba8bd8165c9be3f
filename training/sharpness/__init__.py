"""How sharp a trained network is: what can be measured, and the files of `hessian/`."""

from training.sharpness.files import DENSITY_FIGURE as DENSITY_FIGURE
from training.sharpness.files import EIGEN_RATIO as EIGEN_RATIO
from training.sharpness.files import EIGEN_RATIO_FIGURE as EIGEN_RATIO_FIGURE
from training.sharpness.files import FIGURES as FIGURES
from training.sharpness.files import FOLDER as FOLDER
from training.sharpness.files import LANDSCAPE as LANDSCAPE
from training.sharpness.files import LANDSCAPE_FIGURE as LANDSCAPE_FIGURE
from training.sharpness.files import SPECTRUM as SPECTRUM
from training.sharpness.files import read as read
from training.sharpness.files import read_density as read_density
from training.sharpness.measurement import describe as describe
from training.sharpness.measurement import measure as measure
from training.sharpness.network import Network as Network
from training.sharpness.network import label as label
from training.sharpness.network import restore as restore
from training.sharpness.options import Options as Options
