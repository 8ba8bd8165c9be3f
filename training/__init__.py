"""Training: configuration, state, step, loop, checkpoints, metrics."""

from training.config import Config as Config
from training.errors import TrainingDiverged as TrainingDiverged
from training.errors import UsageError as UsageError
from training.workload import Workload as Workload
