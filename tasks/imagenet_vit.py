r"""ImageNet with vision transformers, ViT-S/16 or ViT-B/16: a workload for a pod.

python train.py --task=imagenet_vit --dataset=DIR                        ViT-S/16, AdamW
python train.py --task=imagenet_vit --dataset=DIR --optimizer=sam --m_sharpness=64
python train.py --task=imagenet_vit --dataset=DIR --optimizer=gsam --m_sharpness=64
python train.py --task=imagenet_vit --dataset=DIR \
    --model=width=768,num_heads=12 --optimizer=sam --rho=.2 --m_sharpness=64   ViT-B/16
python train.py --task=imagenet_vit --dataset=DIR --scale=small             for a CPU

DIR holds train/CLASS/IMAGE and val/CLASS/IMAGE, or the array_record shards that
tensorflow-datasets prepares (input_pipelines/imagenet.py); the classes are those that
are there. Images are decoded and augmented while the network trains, by threads or, as
--data_workers says, by processes; each process of a run reads its own share only.

Recipe: AdamW .003, weight decay .3, batch 4096, 300 epochs of which 32 (10,000 steps)
are warm-up, linear to a hundredth, gradients clipped at norm 1, no dropout, 8 to 100 %
of each image scaled to 224 x 224 pixels, mirroring, values from -1 to 1. GSAM takes
rho .6 to 0 with alpha 1; for ViT-B/16 give --rho=.6 --gsam_rho_min=.2 --gsam_alpha=.4.
Each 64 examples perturb for themselves with --m_sharpness=64, as on the 64 chips of the
authors. 22,050,664 parameters (S/16) and 86,567,656 (B/16). --scale=small is 32 x 32
pixels, width 32, two layers, batch 16 and 3 epochs.

Sources: tables 1 and 4 of the GSAM paper (arXiv:2203.08065) and its authors'
configuration (google-research/big_vision, configs/proj/gsam/vit_i1k_gsam_no_aug.py).
SAM's rho of .2 for B/16 and the 64 chips: google-research/vision_transformer, issue
153, on arXiv:2106.01548; .1 for S/16 is a first choice beside it. The authors'
loss is a sigmoid cross-entropy, their weight decay leaves out all but kernels, and the
head reads the mean of the patches (--model=pool=mean); here the loss is the
cross-entropy of a softmax, all parameters decay, and the head reads a class token.

Expected, from the paper: test accuracy in % of ViT-S/16 74.4 with AdamW, 78.1 with SAM
and 79.5 with GSAM, of ViT-B/16 74.6, 79.9 and 81.0. Not trained here.
"""

import models
import training
from tasks import imagenet

RECIPE = training.Config(
  task='imagenet_vit',
  optimizer='adamw',
  base_optimizer='adamw',
  epochs=300,
  batch_size=4096,
  learning_rate=0.003,
  schedule='linear',
  warmup_epochs=32.0,
  weight_decay=0.3,
  clip_norm=1.0,
  label_smoothing=0.0,
)
METHODS = {'sam': {'rho': 0.1}, 'gsam': {'rho': 0.6, 'rho_min': 0.0, 'alpha': 1.0}}
SCALES = {
  'small': {
    'epochs': 3,
    'batch_size': 16,
    'learning_rate': 0.001,
    'warmup_epochs': 1.0,
  }
}
HEEDS = ('dataset', 'label_smoothing')
NETWORK = models.VisionTransformer()
# First choices, not tried.
LEARNING_RATES = {'sgd': 1.0, 'momentum': 0.1, 'nesterov': 0.1}


def build(config: training.Config) -> training.Problem:
  """The transformer and the images."""
  network = NETWORK.clone(pixel_mean=(127.5,) * 3, pixel_std=(127.5,) * 3)
  return imagenet.problem(
    config, network, {'patch': 8, 'width': 32, 'depth': 2, 'num_heads': 4}
  )
