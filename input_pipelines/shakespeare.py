"""Tiny Shakespeare: 1.1 million characters of plays, cut into sequences of tokens.

Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015, from
whose char-rnn the one text file comes.
"""

import pathlib
import shutil

import numpy as np

from input_pipelines import batching, sources
from input_pipelines.errors import DataError

VOCABULARY = 128  # ASCII; a token is a character's code

_FILES = ('tinyshakespeare.txt', 'input.txt')
