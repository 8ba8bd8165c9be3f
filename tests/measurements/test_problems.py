"""Problems that are no classification: regression, and a prediction a position."""

import flax.linen as nn
import numpy as np
import pytest

import measurements
import training
from input_pipelines import ArraySplit
from training import scores


class Network(nn.Module):
  """A hidden layer; outputs of a shape an example."""

  shape: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x, *, train=False):
    size = int(np.prod(self.shape, dtype=int))
    x = nn.Dense(size)(nn.tanh(nn.Dense(3)(x)))
    return x.reshape(len(x), *self.shape)


def _problem(shape, labels, losses, kind):
  def split(number, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(number, 4)).astype(np.float32)
    return ArraySplit(inputs, labels(rng, inputs))

  return training.Problem(
    model=Network(shape),
    train=split(15, 0),
    test=split(9, 1),
    example_losses=losses,
    scores=kind,
    example_inputs=np.zeros((1, 4), np.float32),
  )


_PROBLEMS = {
  'regression': _problem(
    (),
    lambda rng, x: (x[:, 0] ** 2 + 0.1 * rng.normal(size=len(x))).astype(np.float32),
    scores.squared_error,
    scores.SquaredError(),
  ),
  'language': _problem(
    (2, 3),
    lambda rng, x: rng.integers(0, 3, (len(x), 2)),
    scores.next_token_loss,
    scores.NextToken(),
  ),
}


@pytest.mark.parametrize('operator', ['hessian', 'gauss_newton', 'fisher'])
@pytest.mark.parametrize('kind', list(_PROBLEMS))
def test_every_operator_of_every_loss(fast, tmp_path, kind, operator):
  network = fast.trained(_PROBLEMS[kind])
  each = fast.dense(network)[operator]
  options = fast.but(operator=operator)
  summary = measurements.measure(network, tmp_path, options, ['eigenvalues'])
  values, vectors = np.linalg.eigh(each.mean(0))
  scale = np.abs(values).max()
  assert summary['lambda_max'] == pytest.approx(values[-1], abs=1e-6 * scale)
  assert summary['lambda_min'] == pytest.approx(values[0], abs=1e-6 * scale)
  parts = np.einsum('i,nij,j->n', vectors[:, -1], each, vectors[:, -1])
  error = parts.std() / np.sqrt(len(parts))
  assert summary['lambda_max_standard_error'] == pytest.approx(error, rel=0.2)


@pytest.mark.slow
def test_everything_is_measured_of_a_regression(fast, tmp_path):
  network = fast.trained(_PROBLEMS['regression'])
  options = fast.but(
    worst_case_rho=0.1,
    average_case_sigma=0.1,
    landscape_points=2,
    eigen_ratio_points=2,
    per_layer=True,
    one_batch_repeats=1,
  )
  summary = measurements.measure(network, tmp_path, options)
  assert summary['measurements'] == list(measurements.find())
  names = ('worst_case_sharpness', 'average_case_sharpness', 'layers', 'one_batch')
  assert all(summary[name] for name in names)


@pytest.mark.parametrize(
  ('kind', 'name', 'heading'),
  [
    ('regression', 'absolute_error', 'absolute error'),
    ('language', 'token_accuracy', 'token accuracy %'),
  ],
)
def test_scores_are_those_of_the_problem(fast, tmp_path, kind, name, heading):
  from reports import comparison

  network = fast.trained(_PROBLEMS[kind])
  summary = measurements.measure(network, tmp_path, fast.options, ['evaluation'])
  evaluation = summary['evaluation']
  test = next(network.problem.test.batches(100).epoch(0))
  found = np.asarray(
    network.problem.model.apply({'params': network.params}, test['inputs'])
  )
  if kind == 'regression':
    each = np.abs(found - test['labels'])
  else:
    each = (found.argmax(-1) == test['labels']).mean(1)
  assert evaluation[f'test_{name}'] == pytest.approx(each.mean(), rel=1e-5)
  error = each.std(ddof=1) / np.sqrt(len(each))
  assert evaluation[f'test_{name}_standard_error'] == pytest.approx(error, rel=1e-4)
  run = comparison.Run(tmp_path, network.config, summary)
  table = comparison.write([run], tmp_path / 'out')
  assert f'| test {heading} ' in table and 'acc.' not in table
