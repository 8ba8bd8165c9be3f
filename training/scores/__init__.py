"""What is told of a model's outputs besides the loss, for three kinds of task."""

from training.scores.classification import Classification as Classification
from training.scores.language import NextToken as NextToken
from training.scores.regression import SquaredError as SquaredError
