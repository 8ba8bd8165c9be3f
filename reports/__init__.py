"""Tables, figures and pages from result files; nothing here computes a result."""

from reports import comparison as comparison
from reports import over_training as over_training
from reports import sweep as sweep
