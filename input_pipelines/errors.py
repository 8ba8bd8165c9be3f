"""The one error of the input pipelines."""


class DataError(ValueError):
  """A fault in the user's data: one sentence that names the thing and the fix."""
