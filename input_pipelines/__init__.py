"""Data sets as NumPy splits: sources, parsing and batching, no model code."""

from input_pipelines.batching import ArraySplit as ArraySplit
from input_pipelines.batching import Batches as Batches
from input_pipelines.batching import GraphSplit as GraphSplit
from input_pipelines.batching import split_indices as split_indices
from input_pipelines.errors import DataError as DataError
