r"""CIFAR-10 at the edge of stability: a small CNN, squared error, full batch (SAM).

python train.py --task=eos_cifar10_cnn --scale=small --rho=0.1 --track=edges \
    --track_every=50 --manual_dir=DIR                                     SAM
python train.py --task=eos_cifar10_cnn --scale=small --optimizer=sgd --track=edges \
    --track_every=50 --manual_dir=DIR                                     plain descent

The second experiment of Long and Bartlett (arXiv 2309.12488): 1,000 images, two blocks
of a 3x3 convolution (16 and 32 channels), ReLU, layer normalization and 2x2
max-pooling, a dense layer, Glorot's normal initialisation, the mean squared error from
one-hot targets over images and outputs, all images in one step, learning rate .01.
Pixels are divided by 256, less the mean image. The test images are the first 1,000.
DIR holds CIFAR-10 in one of the forms that input_pipelines/cifar10.py reads; without it
the publisher's archive is downloaded. --scale=small is for two cores: 200 images of
16x16 pixels, the means of 2x2; at the learning rate .1 plain descent diverges there.

Expected, as the paper reports: under SAM the operator norm of the Hessian settles at
the SAM-edge, well below 2 / eta.
"""

import models
import training
from input_pipelines import cifar10
from tasks import edges
from training import scores

RECIPE = training.Config(
  task='eos_cifar10_cnn',
  optimizer='sam',
  base_optimizer='sgd',
  epochs=10_000,
  batch_size=1000,
  learning_rate=0.01,
  schedule='constant',
  label_smoothing=0.0,
  evaluate_every=100,
)
METHODS = {'sam': {'rho': 0.1}}
SCALES = {'small': {'epochs': 2000, 'batch_size': 200}}
HEEDS = ()
NETWORK = models.ConvNet(features=(16, 32))
LEARNING_RATES = {'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The network and the images."""
  loaded = cifar10.load(data_dir=config.data_dir, manual_dir=config.manual_dir)
  small = config.scale == 'small'
  parts = []
  for split in loaded[:2]:
    (part,) = edges.cut(edges.in_turn(split.arrays), 200 if small else 1000)
    parts.append(edges.pooled(part) if small else part)
  train, test = edges.less_mean(*parts)
  return training.Problem(
    model=NETWORK,
    train=train,
    test=test,
    example_losses=scores.one_hot_error(1 / 10),
    scores=scores.Classification(10, tuple(loaded[2]), logits=False),
    example_inputs=train.arrays['inputs'][:1],
    loss_name='mean squared error',
  )
