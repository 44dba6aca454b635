"""A decoder whose text cells are asked, and ones that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from crumplezone import Decoder
from tests.support.decoders import Open, Plant
from tests.support.native import text_poison
from tests.support.native.text_poison import Poison

Dose = Callable[..., None]


@pytest.fixture
def decoder(tiny: Path, make: Open) -> Decoder:
    """Of a tiny model, whose cells compute nothing."""
    return make(tiny, 1, awake=False)


@pytest.fixture
def dose_text(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Dose:
    """Make every text cell that starts from now on a poisoned one."""

    def give(request: str, how: str = "", **when: str) -> None:
        plant("text", text_poison.TARGET)
        monkeypatch.setenv(text_poison.VARIABLE, msgspec.json.encode(Poison(request, how, **when)).decode())

    return give
