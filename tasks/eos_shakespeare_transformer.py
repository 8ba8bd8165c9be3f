r"""Tiny Shakespeare at the edge of stability: a causal transformer in batches (SAM).

python train.py --task=eos_shakespeare_transformer --scale=small --rho=0.1 \
    --track=edges --track_every=100 --track_on=256 --manual_dir=DIR

The third experiment of Long and Bartlett (arXiv 2309.12488): six pre-normalized layers
of 8 heads of 32 features, width 128, dense parts of 512 with GELU, sequences of 64
characters, ASCII as the vocabulary, cross-entropy of the next character, batches of
128 sequences, learning rate .1. Sequences follow one another in the text, the first
90 % are for training (15,685), the rest for testing: the project's own choice, as is
the number of epochs. DIR holds tinyshakespeare.txt; without it the publisher's file is
downloaded. --scale=small is for two cores: 2 layers of 4 heads of 16, width 64, batches
of 32 and 5 epochs.

Expected, as the paper reports: with batches the operator norm of the Hessian is below
2 / eta, and near the SAM-edge.
"""

import models
import training
from input_pipelines import shakespeare
from training import scores

RECIPE = training.Config(
  task='eos_shakespeare_transformer',
  optimizer='sam',
  base_optimizer='sgd',
  epochs=50,
  batch_size=128,
  learning_rate=0.1,
  schedule='constant',
  label_smoothing=0.0,
)
METHODS = {'sam': {'rho': 0.1}}
SCALES = {'small': {'epochs': 5, 'batch_size': 32}}
HEEDS = ()
NETWORK = models.LanguageModel()
LEARNING_RATES = {'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The transformer and the text."""
  train, test = shakespeare.load(data_dir=config.data_dir, manual_dir=config.manual_dir)
  network = NETWORK
  if config.scale == 'small':
    network = NETWORK.clone(features=64, num_layers=2, num_heads=4, head_features=16)
  return training.Problem(
    model=network,
    train=train,
    test=test,
    example_losses=scores.next_token_loss,
    scores=scores.NextToken(),
    example_inputs=train.arrays['inputs'][:1],
    loss_name='loss (nats)',
  )
