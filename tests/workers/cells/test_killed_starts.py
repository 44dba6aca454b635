"""Cells and zygotes that are lost before they are ready: by their own doing, and by others'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crumplezone import Batch, Decoder, Llama
from crumplezone.errors import CrumplezoneError, ModelError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from crumplezone.workers.cells.factory import Start
from crumplezone.workers.cells.targets import SEEDS, Kind
from crumplezone.workers.incidents import deaths
from crumplezone.workers.incidents.deaths import KILLS_MAX
from tests.support.decoders import Open, Plant, kill, reports_of
from tests.support.native import mortal

BATCH = Batch.of([[4, 5, 6], [7, 8]])
Mortal = Callable[[Kind], Path]


@pytest.fixture
def mortality(tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Mortal:
    """Have cells of a kind die while they start, as the file says that this returns."""
    file = tmp_path / "mortality"
    file.write_text("0 kill")
    monkeypatch.setenv(mortal.VARIABLE, str(file))

    def of(kind: Kind) -> Path:
        plant(kind, f"tests.support.native.mortal:{kind}")
        return file

    return of


@pytest.mark.parametrize("start", ["zygote", "spawn"])
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_kill_while_a_cell_starts_costs_no_job(
    start: Start, how: str, tiny: Path, make: Open, mortality: Mortal, store: Store
) -> None:
    file = mortality("decode")
    decoder = make(tiny, 2, start=start, spares=0)
    (whole,) = decoder.generate(["abc"], max_tokens=8)
    kill(decoder.processes["lanes"][0])
    file.write_text(f"2 {how}")
    (completion,) = decoder.generate(["abc"], max_tokens=8)
    assert completion.error is None
    assert completion.tokens == whole.tokens
    assert file.read_text() == f"0 {how}"
    starting = [each for each in reports_of(decoder, store) if each.evidence.phase == "start"]
    assert [each.evidence.exit for each in starting] == [Exit.KILLED] * 2
    assert {each.result for each in starting} == {"another process was started in its place"}


def test_a_zygote_that_is_killed_while_it_loads(
    tiny: Path, mortality: Mortal, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    file = mortality("decode")
    monkeypatch.setitem(SEEDS, "context", "tests.support.native.mortal:seed")
    file.write_text("2 kill")
    with Decoder(tiny, n_ctx=512, n_threads=1, reports=store.directory, start="zygote") as decoder:
        assert decoder.decode(BATCH).errors == {}
        assert len(decoder.processes["zygote"]) == 1
    assert file.read_text() == "0 kill"


def test_starts_that_are_killed_again_and_again_blame_no_model(
    tiny: Path, mortality: Mortal, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deaths, "_STARTING", 0.0)
    monkeypatch.setattr(deaths, "_PAUSE", 0.01)
    file = mortality("decode")
    file.write_text("1000 kill")
    with pytest.raises(
        CrumplezoneError, match=f"{KILLS_MAX + 1} in a row were lost before they were"
    ) as caught:
        Decoder(tiny, n_ctx=512, n_threads=1, reports=store.directory, start="spawn")
    assert not isinstance(caught.value, ModelError)
    assert file.read_text() == f"{1000 - KILLS_MAX - 1} kill"


def test_a_loader_that_crashes_by_itself_is_tried_once(tiny: Path, mortality: Mortal, store: Store) -> None:
    file = mortality("decode")
    file.write_text("1000 segv")
    with pytest.raises(ModelError, match="died while loading it"):
        Decoder(tiny, n_ctx=512, n_threads=1, reports=store.directory, start="spawn")
    assert file.read_text() == "999 segv"


def test_the_embedder_starts_again(tiny: Path, make: Open, mortality: Mortal) -> None:
    file = mortality("embed")
    decoder = make(tiny, 2, spares=0)
    whole = decoder.embed(["abc", "defg"]).vectors
    kill(decoder.processes["embeddings"][0])
    file.write_text("2 kill")
    found = decoder.embed(["abc", "defg"])
    assert found.errors == {}
    assert (found.vectors == whole).all()
    assert file.read_text() == "0 kill"


def test_the_width_is_measured_all_the_same(tiny: Path, mortality: Mortal, store: Store) -> None:
    file = mortality("width")
    file.write_text("2 kill")
    with Decoder(tiny, n_ctx=1024, reports=store.directory) as decoder:
        (completion,) = decoder.generate(["abc"], max_tokens=4)
    assert completion.error is None
    assert file.read_text() == "0 kill"


def test_a_llama_starts_again_in_the_middle_of_a_stream(
    smollm: Path, mortality: Mortal, store: Store
) -> None:
    file = mortality("llama")
    llama = Llama(str(smollm), n_ctx=256, n_threads=1, verbose=False, spares=0, reports=store.directory)
    try:
        whole: Any = llama.create_completion("One, two,", max_tokens=12, temperature=0.0)
        pieces = []
        stream: Any = llama.create_completion("One, two,", max_tokens=12, temperature=0.0, stream=True)
        for piece in stream:
            pieces.append(piece["choices"][0]["text"])
            if len(pieces) == 3:
                assert llama.pid is not None
                file.write_text("3 kill")
                kill(llama.pid)
        assert "".join(pieces) == whole["choices"][0]["text"]
        assert file.read_text() == "0 kill"
    finally:
        llama.close()
