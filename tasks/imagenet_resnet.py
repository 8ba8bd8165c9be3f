r"""ImageNet with residual networks, ResNet-50: a workload for a pod.

python train.py --task=imagenet_resnet --dataset=DIR                    ResNet-50, SGD
python train.py --task=imagenet_resnet --dataset=DIR --optimizer=sam --m_sharpness=64
python train.py --task=imagenet_resnet --dataset=DIR --optimizer=gsam --m_sharpness=64
python train.py --task=imagenet_resnet --dataset=DIR --model=depth=101      ResNet-101
python train.py --task=imagenet_resnet --dataset=DIR --scale=small          for a CPU

DIR holds train/CLASS/IMAGE and val/CLASS/IMAGE, or the array_record shards that
tensorflow-datasets prepares (input_pipelines/imagenet.py); the classes are those that
are there. Images are decoded and augmented while the network trains, by threads or, as
--data_workers says, by processes; each process of a run reads its own share only.

Recipe: SGD 1.6 (.1 for each 256 examples), momentum .9, L2 1e-4, batch 4096, 90 epochs
of which 16 (5,000 steps) are warm-up, linear to a hundredth, label smoothing .1, 8 to
100 % of each image scaled to 224 x 224 pixels, mirroring, each channel standardised.
GSAM takes rho .04 to .02 with alpha .01. 25,557,032 parameters. --scale=small is
32 x 32 pixels, ResNet-10 of width 8, batch 16 and 3 epochs.

Sources: tables 1 and 4 of the GSAM paper (arXiv:2203.08065), and the code of SAM's
authors (google-research/sam, arXiv:2010.01412: the network, the crops, the statistics
of the channels, and a cosine schedule without warm-up, which is --schedule=cosine
--warmup_epochs=0). The table's weight decay, .3, is no L2 coefficient; 1e-4 is that of
He et al. (arXiv:1512.03385) and Goyal et al. (arXiv:1706.02677). Label smoothing and
SAM's rho of .05 are usual values, which neither source tells.

Expected, from the GSAM paper: test accuracy 76.0 % with SGD, 76.9 % with SAM, 77.2 %
with GSAM. Not trained here.
"""

import models
import training
from input_pipelines.imagenet import MEAN, STD
from tasks import imagenet

RECIPE = training.Config(
  task='imagenet_resnet',
  optimizer='momentum',
  base_optimizer='momentum',
  epochs=90,
  batch_size=4096,
  learning_rate=1.6,
  schedule='linear',
  warmup_epochs=16.0,
  momentum=0.9,
  weight_decay=1e-4,
  label_smoothing=0.1,
)
METHODS = {
  'sam': {'rho': 0.05},
  'gsam': {'rho': 0.04, 'rho_min': 0.02, 'alpha': 0.01},
}
SCALES = {
  'small': {
    'epochs': 3,
    'batch_size': 16,
    'learning_rate': 0.05,
    'warmup_epochs': 1.0,
  }
}
HEEDS = ('dataset', 'label_smoothing')
NETWORK = models.ResNet()
# First choices, not tried.
LEARNING_RATES = {'adam': 0.003, 'adamw': 0.003}


def build(config: training.Config) -> training.Problem:
  """The residual network and the images."""
  network = NETWORK.clone(pixel_mean=MEAN, pixel_std=STD)
  return imagenet.problem(config, network, {'depth': 10, 'width': 8})
