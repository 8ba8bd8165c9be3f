"""Any graph classification set of the TUDataset collection, with the paper's network.

python train.py --task=tudataset_gcn --dataset=PROTEINS [--manual_dir=DIR]

DIR holds the publisher's PROTEINS.zip; without it the archive is downloaded. The recipe
is that of mutagenicity_gcn with half the epochs.
"""

import models
import training
from input_pipelines import tudataset
from training import scores
from training.errors import UsageError

RECIPE = training.Config(
  task='tudataset_gcn',
  optimizer='adam',
  base_optimizer='adam',
  epochs=100,
  batch_size=64,
  learning_rate=0.01,
  schedule='step',
  weight_decay=5e-4,
  label_smoothing=0.1,
)

METHODS = {'sam': {'rho': 0.005}, 'asam': {'rho': 0.05}}

NETWORK = models.GCN()
# Adam's is the recipe's. None is published for SGD on this network: these are usual
# first choices, a tenth as large with momentum, and have not been tried here.
LEARNING_RATES = {'sgd': 0.1, 'momentum': 0.01, 'nesterov': 0.01, 'adamw': 0.01}


def build(config: training.Config) -> training.Problem:
  """The graph network and a random 70/30 split of the data set."""
  if not config.dataset:
    raise UsageError(
      f'--task={config.task} needs the name of a data set: give --dataset=PROTEINS '
      'or another name of the TUDataset collection.'
    )
  train, test, num_classes, _ = tudataset.load(
    config.dataset,
    data_dir=config.data_dir,
    manual_dir=config.manual_dir,
    seed=config.split_seed,
  )
  batch = next(train.batches(config.batch_size).epoch(0))
  return training.Problem(
    model=NETWORK.clone(num_classes=num_classes),
    train=train,
    test=test,
    example_losses=scores.smoothed_kl(config.label_smoothing),
    scores=scores.Classification(num_classes),
    example_inputs=batch['inputs'],
    loss_name='loss (nats)',
  )
