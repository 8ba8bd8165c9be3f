"""Losses and scores of three kinds of task: classes, real targets, next tokens."""

from training.scores.classification import Classification as Classification
from training.scores.classification import one_hot_error as one_hot_error
from training.scores.classification import smoothed_kl as smoothed_kl
from training.scores.language import NextToken as NextToken
from training.scores.language import next_token_loss as next_token_loss
from training.scores.regression import SquaredError as SquaredError
from training.scores.regression import squared_error as squared_error
from training.scores.top_classes import TopClasses as TopClasses
