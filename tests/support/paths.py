"""Where the checkout is, and the code under test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import crumplezone
import tests

ROOT = Path(tests.__file__).parent.parent
"""The folder of pyproject.toml, tests, docs, examples and benchmarks, in a checkout or an unpacked sdist."""

PACKAGE = Path(crumplezone.__file__).parent
"""The package as it is imported. The rooms are below it: links in a checkout, folders elsewhere."""

ROOMS = ("reports", "sandbox", "workers", "diagnostics")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package: its name within it ("workers.batch.validate"), and its file."""
    for folder, folders, files in os.walk(PACKAGE, followlinks=True):  # the rooms of a checkout are links
        folders[:] = sorted(set(folders) - {"__pycache__"})
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = path.relative_to(PACKAGE).with_suffix("").parts
                yield ".".join(parts), path
