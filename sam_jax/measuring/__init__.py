"""A network measured in one call: summary, files, figures and report."""
