"""Heartbeats of the MIT-BIH Arrhythmia Database with the paper's attention network.

python train.py --task=mitbih_attention --manual_dir=DIR                    SGD
python train.py --task=mitbih_attention --manual_dir=DIR --optimizer=asam   ASAM, rho 1
python train.py --task=mitbih_attention --dataset=inter_patient ...    other patients

DIR holds PhysioNet's mit-bih-arrhythmia-database-1.0.0.zip or the pair mitbih_train.csv
and mitbih_test.csv; without it the zip is downloaded. --dataset chooses the beats:
paper (19,659: all that are not normal, and 802 that are), full (109,446) or
inter_patient (training and testing on different patients); or it is the path of a
folder of yours with train.csv and test.csv, 187 samples and a label from 0 to 4 a line.

Recipe: SGD .01, momentum .9, L2 5e-4, batch 128, 50 epochs, label smoothing .1,
learning rate x0.2 at 30, 60 and 80 % of the epochs. 19,528,109 parameters. Expected,
from the paper: test accuracy 94.6 % with SGD and 94.3 % with ASAM.
"""

import models
import training
from input_pipelines import mitbih
from training import scores

RECIPE = training.Config(
  task='mitbih_attention',
  dataset='paper',
  optimizer='momentum',
  base_optimizer='momentum',
  epochs=50,
  batch_size=128,
  learning_rate=0.01,
  schedule='step',
  momentum=0.9,
  weight_decay=5e-4,
  label_smoothing=0.1,
)

# The paper's ASAM is that of its code: |w|, of every parameter.
METHODS = {'asam': {'rho': 1.0, 'weights': 'all', 'eta': 0.0}}

NETWORK = models.Attention()
# SGD's step without momentum is as long as the recipe's with it; Adam's rate is its
# authors' default (arXiv:1412.6980). None but the recipe's has been tried here.
LEARNING_RATES = {'sgd': 0.1, 'nesterov': 0.01, 'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The network and the selection of heartbeats that config.dataset names."""
  train, test, classes = mitbih.load(
    config.dataset,
    data_dir=config.data_dir,
    manual_dir=config.manual_dir,
    seed=config.split_seed,
  )
  return training.Problem(
    model=NETWORK.clone(num_classes=len(classes)),
    train=train,
    test=test,
    example_losses=scores.smoothed_kl(config.label_smoothing),
    scores=scores.Classification(len(classes), tuple(classes)),
    example_inputs=next(train.batches(1).epoch(0))['inputs'],
    loss_name='loss (nats)',
  )
