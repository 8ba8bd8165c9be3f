"""Tables, figures and pages from result files; nothing here computes a result."""
