"""Cells of a `Llama` that were taken over: what cannot be costs them, and no call."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from crumplezone import Llama
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import OpenLlama, Plant, read_all
from tests.support.native import llama_liars

Tell = Callable[[str], object]


@pytest.fixture
def tell(plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tell:
    """Let the cells that start from now on tell a lie."""
    file = tmp_path / "lie"
    plant("llama", llama_liars.TARGET)
    monkeypatch.setenv(llama_liars.VARIABLE, str(file))
    file.write_text("")
    return lambda lie: file.write_text(lie)


@pytest.fixture
def llama(open_llama: OpenLlama, tiny: Path, tell: Tell) -> Llama:
    tell("")
    return open_llama(tiny, n_ctx=256, spares=0, deadline=30)


def details(llama: Llama, store: Store) -> list[str]:
    llama.flush_reports()
    reports = read_all(store)
    assert {report.evidence.exit for report in reports} <= {Exit.PROTOCOL}
    return [report.evidence.detail for report in reports]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_who_asks_for_ever_is_ended(llama: Llama, store: Store, tell: Tell) -> None:
    before = peak()
    tell("questions")
    llama.eval([4, 5, 6])
    assert list(llama.eval_tokens) == [4, 5, 6]
    (detail,) = details(llama, store)
    assert "questions" in detail
    assert peak() < before + 50_000


def test_a_value_that_the_cell_does_not_have(llama: Llama, store: Store, tell: Tell) -> None:
    llama.eval([4, 5, 6])
    before = peak()
    tell("value")
    state = llama.save_state()
    assert state.llama_state_size == len(state.llama_state) < 2**20
    (detail,) = details(llama, store)
    assert "tells of a value of 8589934591 bytes, and has " in detail
    assert peak() < before + 50_000


def test_a_context_that_nobody_asked_for(llama: Llama, store: Store, tell: Tell) -> None:
    llama.eval([4, 5])
    tell("questions context")  # so that there is another cell
    llama.eval([6])
    assert list(llama.eval_tokens) == [4, 5, 6]
    assert "has a context of 16777216 tokens" in details(llama, store)[-1]
