"""The tasks at the edge of stability, on generated images and on real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import measurements
import tasks
from input_pipelines import ArraySplit, cifar10, mnist
from tasks import edges
from training import problem as problem_lib
from training import sharing, step

# Task, change of its network, examples and outputs of its small scale.
SMALL = [
  ('eos_mnist_mlp', 'features=(4,)', (1000, 10)),
  ('eos_cifar10_cnn', 'features=(4,)', (200, 10)),
  ('eos_cohen_tanh', 'features=(4,)', (1000, 10)),
  ('eos_stochastic', 'features=(4,)', (1000, 1)),
]


@pytest.fixture(scope='module')
def generated():
  """Digits, and the parts of a CIFAR-10 in the order of folders of classes."""
  rng = np.random.default_rng(0)

  def split(count, shape, order=lambda labels: labels):
    pixels = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    return ArraySplit(pixels, order(rng.integers(0, 10, count)))

  images = [split(count, (32, 32, 3), np.sort) for count in (5200, 1000)]
  return {'digits': split(1100, (28, 28)), 'images': (*images, cifar10.CLASSES)}


@pytest.fixture(autouse=True)
def _no_files(generated, monkeypatch, request):
  if 'real' not in request.node.name:
    digits = generated['digits']
    monkeypatch.setattr(mnist, 'load_test', lambda **_: digits)
    monkeypatch.setattr(mnist, 'load', lambda **_: (digits, digits))
    monkeypatch.setattr(cifar10, 'load', lambda **_: generated['images'])


_QUICK = ('eos_cifar10_cnn', 'eos_stochastic')


@pytest.mark.parametrize(
  ('name', 'model', 'sizes'),
  [
    pytest.param(*case, marks=() if case[0] in _QUICK else pytest.mark.slow)
    for case in SMALL
  ],
)
def test_a_step_and_a_tracked_line(name, model, sizes):
  flags = {'scale': 'small', 'optimizer': 'sam', 'rho': 0.1, 'learning_rate': 1e-3}
  config = tasks.resolve(name, model=model, **flags)
  problem = tasks.build(config)
  assert problem.train.num_examples == sizes[0]
  state, batch = _stepped(problem, config)
  outputs = problem.model.apply({'params': state.params}, batch['inputs'])
  assert outputs.shape == (config.batch_size, sizes[1])
  # The loss by its formula: the mean over outputs, or half the squared distance.
  targets = batch['labels']
  if sizes[1] > 1:
    targets = np.eye(10)[targets]
  squares = np.sum((np.asarray(outputs, np.float64) - targets) ** 2, axis=1)
  factor = 1 / 2 if name in ('eos_cohen_tanh', 'eos_stochastic') else 1 / 10
  loss = float(problem_lib.loss(problem, state.params, {}, batch)[0])
  assert loss == pytest.approx(factor * squares.mean(), rel=1e-5)
  line = measurements.tracker('edges', problem, config)(state, 1)
  assert line['converged'] and line['operator_norm'] > 0
  assert line['edge'] == pytest.approx(2 / config.learning_rate)
  assert 0 < line['sam_edge'] < line['edge']
  assert 0 < line['update_alignment'] <= 1


@pytest.mark.parametrize('name', [name for name, *_ in SMALL])
def test_the_published_scale(name):
  """Sizes of the recipes; the digits generated here are fewer than the task takes."""
  config = tasks.resolve(name, batch_size=32, model='')
  problem = tasks.build(config)
  recipe = tasks.load(name).RECIPE
  if 'mnist' not in name and name != 'eos_stochastic':
    assert problem.train.num_examples == recipe.batch_size
  pixels = problem.train.arrays['inputs']
  assert pixels.dtype == np.float32
  if name != 'eos_cohen_tanh':  # whose mean is over more images
    assert np.abs(pixels.mean(axis=0)).max() < 1e-4
  if name == 'eos_stochastic':
    targets = np.unique(problem.train.arrays['labels'])
    np.testing.assert_array_equal(targets, [-1, 1])


def test_pixels_are_standardised_over_the_whole_part(generated):
  train, test, _ = generated['images']
  found = edges.standardised(train.arrays, test.arrays, 30)
  pixels = train.arrays['inputs'].astype(np.float64)
  mean, deviation = pixels.mean(axis=0), pixels.std(axis=0)
  for split, part in zip(found, (train, test), strict=True):
    wanted = (part.arrays['inputs'][:30] - mean) / deviation
    np.testing.assert_allclose(split.arrays['inputs'], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(split.arrays['labels'], part.arrays['labels'][:30])


def test_a_pixel_that_never_varies_is_zero():
  arrays = {'inputs': np.full((3, 1, 2), 7, np.uint8), 'labels': np.arange(3)}
  for split in edges.standardised(arrays, arrays, 2):
    np.testing.assert_array_equal(split.arrays['inputs'], np.zeros((2, 1, 2)))


def test_the_first_images_have_all_classes(generated):
  arrays = edges.in_turn(generated['images'][0].arrays)
  counts = np.bincount(arrays['labels'][:200], minlength=10)
  assert counts.tolist() == [20] * 10
  given = generated['images'][0].arrays
  assert np.bincount(given['labels'][:200]).tolist() == [200]
  digits = generated['digits'].arrays
  assert edges.in_turn(digits) is digits


@pytest.mark.parametrize('name', ['eos_mnist_mlp', 'eos_stochastic'])
def test_real_digits(name, data_dir, tmp_path):
  folders = {'manual_dir': str(data_dir), 'data_dir': str(tmp_path)}
  problem = tasks.build(tasks.resolve(name, scale='small', **folders))
  assert problem.train.num_examples == problem.test.num_examples == 1000
  assert problem.train.arrays['inputs'].max() <= 1
  if name == 'eos_stochastic':
    # Of the digits' counts among the first 1,000 test images.
    odd = mnist.load_test(**folders).arrays['labels'][:1000] % 2
    targets = problem.train.arrays['labels'][:, 0]
    np.testing.assert_array_equal(targets, 2.0 * odd - 1)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['eos_cifar10_cnn', 'eos_cohen_tanh'])
def test_real_images(name, data_dir, tmp_path_factory):
  folder = tmp_path_factory.getbasetemp() / 'prepared'
  folders = {'manual_dir': str(data_dir), 'data_dir': str(folder)}
  problem = tasks.build(tasks.resolve(name, scale='small', **folders))
  labels = problem.train.arrays['labels']
  assert set(np.bincount(labels, minlength=10).tolist()) == {len(labels) // 10}
  assert jnp.isfinite(problem.train.arrays['inputs']).all()


def test_a_step_and_a_tracked_line_of_a_text(tmp_path):
  (tmp_path / 'input.txt').write_text('To be, or not to be. ' * 40)
  folders = {'manual_dir': str(tmp_path), 'data_dir': str(tmp_path / 'prepared')}
  model = 'features=4,num_layers=1,num_heads=1,head_features=2,vocabulary=128'
  config = tasks.resolve(
    'eos_shakespeare_transformer', scale='small', batch_size=4, model=model, **folders
  )
  problem = tasks.build(config)
  state, batch = _stepped(problem, config)
  logits = problem.model.apply({'params': state.params}, batch['inputs'])
  assert logits.shape == (4, 64, 128)
  line = measurements.tracker('edges', problem, config, on='batch')(state, 1)
  assert line['converged'] and 0 < line['sam_edge'] < line['edge'] == pytest.approx(20)


def _stepped(problem, config):
  """The state after the first step, and its batch."""
  batches = problem.train.batches(config.batch_size, seed=config.seed)
  stepper = step.Stepper(problem, config, batches.steps_per_epoch, sharing.of(config))
  batch = next(iter(batches.epoch(0)))
  state = jax.jit(stepper.init)(config.seed)
  return jax.jit(stepper.train)(state, batch)[0], batch
