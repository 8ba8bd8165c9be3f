r"""The stochastic edge of stability: odd or even digits, one output, small batches.

python train.py --task=eos_stochastic --scale=small --batch_size=32 \
    --track=edges,batch_sharpness,noise --track_every=1000 --track_on=train \
    --manual_dir=DIR

Odd digits of MNIST have the target 1, even ones -1; a perceptron of one output and half
its squared error. With this loss and one output an example the noise kernel norm of
Agarwala and Pennington (arXiv 2404.19261) has its plain form, K = eta (1/B - 1/D) sum_a
l_a / (2 - eta l_a) over the eigenvalues l_a of the tangent kernel J J^T / D, and
descent with batches of B is unstable where K = 1; `sam_jax.edges` computes it, and
batch sharpness, which SGD is reported to hold at 2 / eta; docs/edge_of_stability.md
says what the lines of the trackers hold. Agarwala and Pennington find that sharpness
rises more slowly the smaller the batches are. Network and number of images are this
project's choice: two hidden layers of 200 tanh, and the first 10,000 images of the
training set, tested on the first 1,000 test images. Images are divided by 256, less
their mean. DIR holds the publisher's four files; without them they are downloaded.
--scale=small has the first 1,000 test images, tested on the next 1,000, and needs the
two files of the test images only.
"""

import numpy as np

import models
import training
from input_pipelines import ArraySplit, mnist
from tasks import edges
from training import scores

RECIPE = training.Config(
  task='eos_stochastic',
  optimizer='sgd',
  base_optimizer='sgd',
  epochs=320,
  batch_size=32,
  learning_rate=0.05,
  schedule='constant',
  label_smoothing=0.0,
)
METHODS = {'sam': {'rho': 0.1}}
SCALES = {'small': {}}
HEEDS = ()
NETWORK = models.MLP(
  features=(200, 200), num_classes=1, activation='tanh', initial='glorot_normal'
)
LEARNING_RATES = {'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The perceptron and the digits."""
  folders = {'data_dir': config.data_dir, 'manual_dir': config.manual_dir}
  if config.scale == 'small':
    parts = edges.cut(mnist.load_test(**folders).arrays, 1000, 1000)
  else:
    train, test = mnist.load(**folders)
    parts = [*edges.cut(train.arrays, 10_000), *edges.cut(test.arrays, 1000)]
  train, test = (_signed(split) for split in edges.less_mean(*parts))
  return training.Problem(
    model=NETWORK,
    train=train,
    test=test,
    example_losses=scores.squared_error,
    scores=scores.SquaredError(),
    example_inputs=train.arrays['inputs'][:1],
    loss_name='half the squared error',
  )


def _signed(split: ArraySplit) -> ArraySplit:
  """Targets (n, 1): 1 for odd digits, -1 for even ones."""
  digits = split.arrays['labels']
  targets = np.where(digits % 2, 1.0, -1.0)[:, None]
  return ArraySplit(split.arrays['inputs'], targets)
