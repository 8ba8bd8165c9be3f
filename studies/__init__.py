"""Claims of the field, one module each, run as `python -m studies.NAME`."""
