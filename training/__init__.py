"""Training: what is trained, configuration, step, loop, checkpoints, metrics."""

from training.config import Config as Config
from training.errors import TrainingDiverged as TrainingDiverged
from training.errors import UsageError as UsageError
from training.problem import Problem as Problem
from training.scores import Classification as Classification
from training.scores import NextToken as NextToken
from training.scores import SquaredError as SquaredError
