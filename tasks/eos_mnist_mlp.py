r"""MNIST at the edge of stability: a perceptron, squared error, full batch (SAM).

python train.py --task=eos_mnist_mlp --scale=small --rho=0.1 --track=edges \
    --track_every=50 --manual_dir=DIR                                     SAM
python train.py --task=eos_mnist_mlp --scale=small --optimizer=sgd \
    --learning_rate=0.6 --track=edges --track_every=50 --manual_dir=DIR   plain descent

The experiment of Long and Bartlett (arXiv 2309.12488): three hidden layers of 1,000
ReLU, Glorot's normal initialisation, images / 256 minus their mean, the mean squared
error from one-hot targets over images and outputs, the whole training set in one step,
learning rate .01. DIR holds the publisher's four files; without them they are
downloaded. --scale=small is for two cores: three layers of 200 on the first 1,000 test
images (tested on the next 1,000), learning rate .4 and 2,000 steps, about a minute and
a half; it needs the two files of the test images only. docs/edge_of_stability.md tells
what is seen.
"""

import models
import training
from input_pipelines import mnist
from tasks import edges
from training import scores

RECIPE = training.Config(
  task='eos_mnist_mlp',
  optimizer='sam',
  base_optimizer='sgd',
  epochs=10_000,
  batch_size=60_000,
  learning_rate=0.01,
  schedule='constant',
  label_smoothing=0.0,
  evaluate_every=100,
)
METHODS = {'sam': {'rho': 0.1}}
SCALES = {'small': {'epochs': 2000, 'batch_size': 1000, 'learning_rate': 0.4}}
HEEDS = ()
NETWORK = models.MLP(features=(1000,) * 3, initial='glorot_normal')
LEARNING_RATES = {'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The perceptron and the digits."""
  folders = {'data_dir': config.data_dir, 'manual_dir': config.manual_dir}
  if config.scale == 'small':
    train, test = edges.cut(mnist.load_test(**folders).arrays, 1000, 1000)
    network = NETWORK.clone(features=(200,) * 3)
  else:
    train, test = (split.arrays for split in mnist.load(**folders))
    network = NETWORK
  train, test = edges.less_mean(train, test)
  return training.Problem(
    model=network,
    train=train,
    test=test,
    example_losses=scores.one_hot_error(1 / 10),
    scores=scores.Classification(10, logits=False),
    example_inputs=train.arrays['inputs'][:1],
    loss_name='mean squared error',
  )
