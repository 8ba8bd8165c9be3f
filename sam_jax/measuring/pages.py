"""The report of a measured network: one HTML page with tables and figures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from sam_jax.measuring import files, page

Summary = Mapping[str, Any]

# With names of options in braces.
NOTES = {
  'lambda_max': (
    'the largest eigenvalue of the Hessian; its residual |H v - lambda v| is measured, '
    'and an eigenvalue lies within it of lambda'
  ),
  'lambda_min': 'the algebraically smallest eigenvalue',
  'lambda_max_standard_error': (
    'bootstrap over {errors_over} with the eigenvector held fixed; null with one'
  ),
  'adaptive_sharpness': (
    'largest eigenvalue of T H T with T = |w| of every parameter: does not change when '
    'layers are rescaled without changing the function'
  ),
  'worst_case_sharpness': (
    'largest rise of the loss within the ball, found by gradient ascent for each '
    'batch: mean and standard error over batches'
  ),
  'average_case_sharpness': (
    'mean rise of the loss under Gaussian noise in the parameters, standard error over '
    'draws'
  ),
}
_QUANTITIES = (
  ('lambda_max', 'lambda_max'),
  ('lambda_min', 'lambda_min'),
  ('lambda_max / |lambda_min|', 'lambda_max_over_abs_lambda_min'),
  ('lambda_1 / lambda_5', 'lambda_1_over_lambda_5'),
  ('adaptive sharpness', 'adaptive_sharpness'),
  ('trace', 'trace'),
  ('squared Frobenius norm', 'squared_frobenius_norm'),
  ('worst-case sharpness', 'worst_case_sharpness'),
  ('average-case sharpness', 'average_case_sharpness'),
)


def write(folder: pathlib.Path, summary: Summary, title: str) -> None:
  """Writes `report.html` with the figures that lie in the folder."""
  names = (files.DENSITY_FIGURE, files.LANDSCAPE_FIGURE)
  figures = {name: folder / name for name in names}
  (folder / files.REPORT).write_text(page.html(title, sections(summary), figures))


def sections(summary: Summary) -> list[page.Section]:
  """The tables of a summary, of what was measured."""
  found = [page.Section('', _quantities(summary), _reading(summary))]
  if 'top' in summary:
    found.append(page.Section('Eigenvalues', _eigenvalues(summary), _CERTIFICATE))
  return found


def _quantities(summary: Summary) -> page.Rows:
  flat = {**summary, **summary.get('evaluation', {})}
  rows = [['quantity', 'value', 'standard error', 'residual']]
  for heading, name in (('loss', 'train_loss'), *_QUANTITIES):
    if flat.get(name) is not None:
      rows.append(
        [
          heading,
          page.number(flat[name], '.6g'),
          page.number(flat.get(f'{name}_standard_error'), '.2g'),
          page.number(flat.get(f'{name}_residual'), '.1e'),
        ]
      )
  return rows


def _eigenvalues(summary: Summary) -> page.Rows:
  rows = [['of the Hessian', 'eigenvalue', 'residual', 'converged']]
  for end, listed in (
    ('largest', summary['top']),
    ('smallest', summary['bottom'][::-1]),
  ):
    for number, entry in enumerate(listed, 1):
      rows.append(
        [
          f'{number}. {end}',
          page.number(entry['eigenvalue'], '.6g'),
          page.number(entry['residual'], '.1e'),
          'yes' if entry['converged'] else 'NO',
        ]
      )
  return rows


def _reading(summary: Summary) -> str:
  options = summary['options']
  sentences = [
    f'Of the loss averaged over {summary["num_examples"]:,} examples, at '
    f'{summary["num_parameters"]:,} parameters; {summary["num_matvecs"]:,} products '
    f'with its Hessian.',
    'Standard errors of the loss and of eigenvalues are over '
    f'{options["errors_over"]}, of the worst case over batches, of the trace and the '
    'norm over probes, of the average case over draws; - where there is none.',
  ]
  if 'adaptive_sharpness' in summary:
    sentences.append(
      'The adaptive sharpness is the largest eigenvalue of T H T with T = |w|, which '
      'does not change when layers are rescaled without changing the function.'
    )
  if 'worst_case_sharpness' in summary:
    sentences.append(
      'The worst case is the largest rise of the loss within l2 distance '
      f'{options["worst_case_rho"]:g}, found for each batch by gradient ascent.'
    )
  if 'average_case_sharpness' in summary:
    sentences.append(
      'The average case is its mean rise under Gaussian noise of standard deviation '
      f'{options["average_case_sigma"]:g}.'
    )
  return ' '.join(sentences)


_CERTIFICATE = (
  'A residual |H v - lambda v| is measured: an eigenvalue of the Hessian lies within '
  'it. A pair has converged if it is at most the tolerance times the largest '
  '|eigenvalue|.'
)
