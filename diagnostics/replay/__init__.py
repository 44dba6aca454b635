"""A report, run again: replayed, minimised, as a script."""
