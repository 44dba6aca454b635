"""Cells that generate step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.decoders import Plant
from tests.support.native import paced
from tests.support.pace import Pace


@pytest.fixture
def pace(make: object, plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pace]:  # noqa: ARG001 - closed after this
    """Make every llama.cpp cell that starts from now on generate at this pace."""
    folder = tmp_path / "pace"
    folder.mkdir()
    plant("decode", paced.TARGET)
    monkeypatch.setenv(paced.VARIABLE, str(folder))
    made = Pace(folder)
    yield made
    made.close()
