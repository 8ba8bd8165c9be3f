"""Mutagenicity (4,337 molecules) with a small graph transformer.

python train.py --task=mutagenicity_transformer [--optimizer=graphsam] --manual_dir=DIR

DIR holds the publisher's Mutagenicity.zip; without it the archive is downloaded. The
task on which GraphSAM is measured beside SAM and Adam; 68,058 parameters. Expected
accuracy and time: docs/results.md.
"""

import models
import training
from tasks import tudataset_gcn

RECIPE = training.Config(
  task='mutagenicity_transformer',
  dataset='Mutagenicity',
  optimizer='adam',
  base_optimizer='adam',
  epochs=50,
  batch_size=64,
  learning_rate=0.001,
  schedule='cosine',
  weight_decay=5e-4,
  label_smoothing=0.1,
)


def build(config: training.Config) -> training.Problem:
  """The graph transformer and a random 70/30 split of the molecules."""
  problem = tudataset_gcn.build(config)
  model = models.GraphTransformer(num_classes=problem.scores.num_classes)
  return problem._replace(model=model)
