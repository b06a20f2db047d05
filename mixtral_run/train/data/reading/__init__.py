"""Readers of data files: records of any format, shapes of examples."""
