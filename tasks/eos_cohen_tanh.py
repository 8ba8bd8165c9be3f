r"""CIFAR-10 at the edge of stability: a tanh network under plain full-batch descent.

python train.py --task=eos_cohen_tanh --track=edges --track_every=50 --manual_dir=DIR
python train.py --task=eos_cohen_tanh --scale=small --track=edges --track_every=50 \
    --manual_dir=DIR                                          1,000 images

The first experiment of Cohen et al. (arXiv 2103.00065): the first 5,000 images of
CIFAR-10, each pixel standardised over the training set, two hidden layers of 200 tanh,
weights and biases at first uniform in +-1/sqrt(fan_in), half the squared distance from
one-hot targets, the mean over images, all images in one step, learning rate .01. They
report a sharpness of about 77 at the start, a dip to 70, a crossing of 2 / eta = 200
near step 4,450, and values of 200 to 212 from then on; 9,000 steps end at a training
accuracy of 99 %. DIR holds CIFAR-10 in one of the forms that input_pipelines/cifar10.py
reads, without it the publisher's archive is downloaded; numbers of images that were
compressed as JPEG differ. --scale=small has the first 1,000 images, the learning rate
.02 and 3,000 steps.
"""

import models
import training
from input_pipelines import cifar10
from tasks import edges
from training import scores

RECIPE = training.Config(
  task='eos_cohen_tanh',
  optimizer='sgd',
  base_optimizer='sgd',
  epochs=9000,
  batch_size=5000,
  learning_rate=0.01,
  schedule='constant',
  label_smoothing=0.0,
  evaluate_every=100,
)
METHODS = {'sam': {'rho': 0.1}}
SCALES = {'small': {'epochs': 3000, 'batch_size': 1000, 'learning_rate': 0.02}}
HEEDS = ()
NETWORK = models.MLP(features=(200, 200), activation='tanh', initial='uniform')
LEARNING_RATES = {'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The perceptron and the images."""
  *splits, classes = cifar10.load(
    data_dir=config.data_dir, manual_dir=config.manual_dir
  )
  first = 1000 if config.scale == 'small' else 5000
  parts = [edges.in_turn(split.arrays) for split in splits]
  train, test = edges.standardised(*parts, first)
  return training.Problem(
    model=NETWORK,
    train=train,
    test=test,
    example_losses=scores.one_hot_error(1 / 2),
    scores=scores.Classification(10, tuple(classes), logits=False),
    example_inputs=train.arrays['inputs'][:1],
    loss_name='half the squared error',
  )
