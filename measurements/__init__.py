"""How sharp a trained network is: one file a measurement, and what all share."""

from measurements.eigenvalues import lambda_max as lambda_max
from measurements.files import FOLDER as FOLDER
from measurements.files import read as read
from measurements.measurement import Measurement as Measurement
from measurements.network import Network as Network
from measurements.network import restore as restore
from measurements.registry import choose as choose
from measurements.registry import find as find
from measurements.registry import options_class as options_class
from measurements.runner import Measurer as Measurer
from measurements.runner import measure as measure
from measurements.while_training import adjustable as adjustable
from measurements.while_training import check_hook as check_hook
from measurements.while_training import check_tracker as check_tracker
from measurements.while_training import hook as hook
from measurements.while_training import hooks as hooks
from measurements.while_training import tracker as tracker
from measurements.while_training import trackers as trackers

# The options of all measurements, each a flag of eval_hessian.py.
Options = options_class()
