"""`Llama`s that are closed after the test, and cells of theirs that die."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crumplezone import Llama
from crumplezone.reports.store.store import Store
from tests.support.decoders import OpenLlama, Plant
from tests.support.native import llama_poison
from tests.support.native.llama_poison import Poison
from tests.support.reference.llama_original import OPTIONS


@pytest.fixture
def open_llama(smollm: Path, store: Store) -> Iterator[OpenLlama]:
    made: list[Llama] = []

    def one(model: Path = smollm, **options: Any) -> Llama:
        made.append(Llama(str(model), **OPTIONS | {"reports": store.directory} | options))
        return made[-1]

    yield one
    for llama in made:
        llama.close()


@pytest.fixture
def dose(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Callable[[Poison], None]:
    """Make every cell that starts from now on a poisoned one."""

    def give(given: Poison) -> None:
        plant("llama", llama_poison.TARGET)
        monkeypatch.setenv(llama_poison.VARIABLE, msgspec.json.encode(given).decode())

    return give
