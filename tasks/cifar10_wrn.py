r"""CIFAR-10, or a folder of images, with the paper's wide residual network, WRN-22-8.

python train.py --task=cifar10_wrn --manual_dir=DIR                    SGD
python train.py --task=cifar10_wrn --manual_dir=DIR --optimizer=asam   ASAM, rho 2
python train.py --task=cifar10_wrn --manual_dir=DIR \
    --model=depth=16,width=2 --epochs=3                                for a CPU
python train.py --task=cifar10_wrn --dataset=/home/me/pets             own images

DIR holds the publisher's archive or a tree of images (input_pipelines/cifar10.py);
without it the archive is downloaded. Own images are a tree pets/CLASS/IMAGE, or that in
a tar or zip, with train and test (or val) folders around the classes; without those
they are split at random 70/30. Their central squares are scaled to 32 x 32. They are
named by their path, or by their name alone if they lie in DIR.

Recipe: SGD .1, momentum .9, L2 5e-4, batch 128, 50 epochs, label smoothing .1, learning
rate x0.2 at 30, 60 and 80 % of the epochs; shifts of 4 pixels, mirroring, and Cutout of
16 pixels for half of the images. 17,158,106 parameters. Expected, from the paper: test
accuracy 95.4 % with SGD and 96.0 % with ASAM.
"""

import models
import training
from input_pipelines import augmentation, cifar10, image_folder
from training import scores

RECIPE = training.Config(
  task='cifar10_wrn',
  optimizer='momentum',
  base_optimizer='momentum',
  epochs=50,
  batch_size=128,
  learning_rate=0.1,
  schedule='step',
  momentum=0.9,
  weight_decay=5e-4,
  label_smoothing=0.1,
)

# The paper's ASAM is that of its code: |w|, of every parameter.
METHODS = {'asam': {'rho': 2.0, 'weights': 'all', 'eta': 0.0}}

NETWORK = models.WideResNet()
# SGD's is that of Zagoruyko and Komodakis 2016 (arXiv:1605.07146), Adam's its authors'
# default (arXiv:1412.6980). None but the recipe's has been tried here.
LEARNING_RATES = {'sgd': 0.1, 'nesterov': 0.1, 'adam': 0.001, 'adamw': 0.001}


def build(config: training.Config) -> training.Problem:
  """The network and CIFAR-10, or the images that config.dataset names."""
  folders = {'data_dir': config.data_dir, 'manual_dir': config.manual_dir}
  if config.dataset:
    found = image_folder.load(config.dataset, seed=config.split_seed, **folders)
  else:
    found = cifar10.load(**folders)
  train, test, classes = found
  mean, std = augmentation.channel_statistics(train)
  return training.Problem(
    model=NETWORK.clone(num_classes=len(classes), pixel_mean=mean, pixel_std=std),
    train=train,
    test=test,
    example_losses=scores.smoothed_kl(config.label_smoothing),
    scores=scores.Classification(len(classes), tuple(classes)),
    example_inputs=next(train.batches(1).epoch(0))['inputs'],
    augment=augmentation.crop_flip_cutout(cutout_fill=mean),
    loss_name='loss (nats)',
  )
