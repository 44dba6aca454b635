"""A directory that `crumplezone exec` puts on a program's PYTHONPATH."""
