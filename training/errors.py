"""Errors that are the user's to mend; the scripts print them as one sentence."""


class UsageError(ValueError):
  """A flag, workdir or checkpoint that cannot be used; the message says what to do."""


class TrainingDiverged(RuntimeError):
  """A loss, gradient or parameter is no longer finite; the message names the step."""
