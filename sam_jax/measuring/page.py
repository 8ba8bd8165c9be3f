"""Tables and figures as Markdown and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html as html_lib
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Rows = list[list[str]]  # the headings first

_WIDEST = 6  # columns of a table with a single row

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
div.table { overflow-x: auto; width: max-content; max-width: calc(100vw - 3rem); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { border-bottom: 1.5px solid #1b1b1b; font-weight: 600; }
td { border-bottom: 1px solid #ddd; }
p { max-width: 48rem; } img { max-width: 100%; }
"""


class Section(NamedTuple):
  """A table of its own with what is to be said of it."""

  heading: str
  rows: Rows
  text: str


def number(value: float | None, form: str = '.4g') -> str:
  """A number for a table, '-' for none."""
  return '-' if value is None else format(value, form)


def with_error(value: float | None, error: float | None, form: str = '.4g') -> str:
  """A number and how far it is sure to."""
  return number(value, form) + ('' if error is None else f' ± {error:.2g}')


def markdown_table(rows: Rows) -> str:
  """A Markdown table, aligned to be read as plain text too."""
  if not rows[1:]:
    return 'Not measured.'
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + ' |'
    for row in rows
  ]
  lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
  return '\n'.join(lines)


def markdown(title: str, sections: Sequence[Section]) -> str:
  """Sections as a Markdown page."""
  parts = [f'# {title}']
  for section in sections:
    if section.heading:
      parts.append(f'## {section.heading}')
    parts += [markdown_table(section.rows), section.text]
  return '\n\n'.join(parts) + '\n'


def html(
  title: str, sections: Sequence[Section], figures: Mapping[str, pathlib.Path]
) -> str:
  """Sections and figures as one page.

  Args:
    title: heading of the page.
    sections: its tables.
    figures: PNG files by name; those that do not exist are left out.
  """
  escape = html_lib.escape
  parts = [
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>',
    f'<h1>{escape(title)}</h1>',
  ]
  for section in sections:
    if section.heading:
      parts.append(f'<h2>{escape(section.heading)}</h2>')
    parts += [_html_table(section.rows), f'<p>{escape(section.text)}</p>']
  for name, path in figures.items():
    if path.exists():
      caption = name.removesuffix('.png').replace('_', ' ').capitalize()
      data = base64.b64encode(path.read_bytes()).decode()
      parts.append(f'<h2>{escape(caption)}</h2>')
      parts.append(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">')
  return '\n'.join([*parts, '</body>\n</html>\n'])


def _html_table(rows: Rows) -> str:
  if not rows[1:]:
    return '<p>Not measured.</p>'
  if len(rows) == 2 and len(rows[0]) > _WIDEST:
    # A single run stands upright, a quantity a line.
    rows = [[name, value] for name, value in zip(*rows, strict=True)]
  lines = [
    '<tr>'
    + ''.join(f'<{tag}>{html_lib.escape(cell)}</{tag}>' for cell in row)
    + '</tr>'
    for tag, row in zip(['th'] + ['td'] * len(rows), rows, strict=False)
  ]
  return '<div class="table"><table>\n' + '\n'.join(lines) + '\n</table></div>'
