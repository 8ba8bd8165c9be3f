"""What the ImageNet tasks share: images of one size, their loss and scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import training
from input_pipelines import imagenet
from training import scores


def problem(
  config: training.Config,
  network: Any,
  small: Mapping[str, Any],
) -> training.Problem:
  """A network and the images.

  Args:
    config: a resolved configuration.
    network: takes the number of classes as ``num_classes``.
    small: what else is changed of it at --scale=small, where images have 32 pixels.
  """
  size = 32 if config.scale == 'small' else 224
  train, test, classes = imagenet.load(
    config.dataset,
    data_dir=config.data_dir,
    manual_dir=config.manual_dir,
    size=size,
    num_workers=config.data_workers,
  )
  changes = small if config.scale == 'small' else {}
  return training.Problem(
    model=network.clone(num_classes=len(classes), **changes),
    train=train,
    test=test,
    example_losses=scores.smoothed_kl(config.label_smoothing),
    scores=scores.TopClasses(len(classes), tuple(classes)),
    example_inputs=np.zeros((1, size, size, 3), np.uint8),
    loss_name='loss (nats)',
  )
