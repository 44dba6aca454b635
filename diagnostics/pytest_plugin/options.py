"""What the modules of the plugin keep in pytest's stash."""

from __future__ import annotations

import pytest

TIMEOUT = pytest.StashKey[float]()
"""Of an item: the limit that pytest-timeout has for it, seconds."""
