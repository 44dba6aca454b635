"""The zygote, the spare and the saved state that make a `Llama`'s next cell ready soon."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from crumplezone import Llama
from crumplezone.errors import ContextError, InputError, ModelError, ShortageError
from crumplezone.reports.records.report import Exit, Phase
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.host.errands import DELIVERY
from crumplezone.workers.llama.calls import checkpoint, session
from tests.support.decoders import OpenLlama, kill, read_all
from tests.support.native.llama_poison import Poison
from tests.support.reference.llama_original import FOX

LONG = "The quick brown fox jumps over the lazy dog. " * 12


def stream(llama: Llama, *kills: int, **options: Any) -> str:
    """Text of a stream whose cell is killed after the chunks of these numbers."""
    llama.reset()
    text, arguments = "", FOX | {"prompt": LONG, "max_tokens": 24, "stream": True} | options
    for i, chunk in enumerate(llama(**arguments)):
        text += chunk["choices"][0]["text"]  # type: ignore[index]
        if i in kills:
            assert llama._session.wait_for_spares(30)
            kill(llama.pid)
    return text


def phases(llama: Llama) -> list[Phase]:
    """What the running cell did."""
    cell = llama._session.runner.client.cell
    assert cell is not None
    return cell.arena.flight(time.monotonic_ns())


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are saved as often as there is an occasion."""
    monkeypatch.setattr(checkpoint, "_FIRST", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 1e9)


def test_a_spare_takes_over(open_llama: OpenLlama) -> None:
    llama = open_llama()
    assert llama._session.wait_for_spares(30)
    before = llama.processes
    (zygote,), (spare,) = before["zygote"], before["spares"]
    assert psutil.Process(spare).ppid() == zygote == psutil.Process(llama.pid).ppid()
    undisturbed = stream(llama)
    assert stream(llama, 5) == undisturbed
    assert llama.pid == spare
    assert llama._session.wait_for_spares(30)
    assert llama.processes["spares"] != [spare]


def test_spawned_cells_have_no_spares(open_llama: OpenLlama) -> None:
    llama = open_llama(start="spawn")
    assert llama.processes == {"zygote": [], "cell": [llama.pid], "spares": []}
    assert stream(llama, max_tokens=4)


@pytest.mark.parametrize("why", ["logits_all", "context"])
def test_what_would_be_dear_is_made_for_who_asks(
    why: str, open_llama: OpenLlama, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"logits_all": True} if why == "logits_all" else {}
    if why == "context":
        monkeypatch.setattr(session, "_SPARE_MAX", 2**20)
    with caplog.at_level(logging.INFO, "crumplezone"):
        llama = open_llama(**options)
    assert llama._session.wait_for_spares(0)  # for none
    assert llama.processes["spares"] == []
    assert DELIVERY.wait(30)
    (told,) = [record.message for record in caplog.records if "no spare cell" in record.message]
    assert "spares=1" in told
    assert ("logits_all" if why == "logits_all" else "MiB") in told
    asked = open_llama(spares=1, **options)
    assert asked._session.wait_for_spares(30)
    assert len(asked.processes["spares"]) == 1


def test_a_wrong_start_or_number_of_spares_is_refused(open_llama: OpenLlama) -> None:
    with pytest.raises(InputError, match="start is 'fork'"):
        open_llama(start="fork")
    with pytest.raises(InputError, match="spares is -1"):
        open_llama(spares=-1)
    with pytest.raises(InputError, match="must be spawn or auto"):
        open_llama(start="zygote", n_gpu_layers=1)


def test_a_model_that_does_not_load_is_refused_by_the_zygote(
    tmp_path: Path, tiny: Path, open_llama: OpenLlama
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:3000])
    with pytest.raises(ModelError, match="cannot load it"):
        open_llama(broken)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}])
def test_a_saved_state_takes_the_place_of_the_prompt(open_llama: OpenLlama, options: dict[str, Any]) -> None:
    llama = open_llama()
    n_prompt = len(llama.tokenize(LONG.encode()))
    undisturbed = stream(llama, **options)
    assert stream(llama, 9, **options) == undisturbed
    done = phases(llama)
    assert [each.count for each in done if each.name == "restore"][-1] > n_prompt
    assert max(each.count for each in done if each.name == "decode") < n_prompt
    assert stream(llama, 4, 11, 18, **options) == undisturbed


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("mode", [1, 2])
def test_noise_that_depends_on_all_before_it_does_without_a_state(open_llama: OpenLlama, mode: int) -> None:
    llama = open_llama()
    options = {"temperature": 1.0, "seed": 2, "mirostat_mode": mode, "max_tokens": 40}
    undisturbed = stream(llama, **options)
    assert stream(llama, 20, **options) == undisturbed
    assert "restore" not in {each.name for each in phases(llama)}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_a_generation_behind_a_history_goes_on(open_llama: OpenLlama, temp: float) -> None:
    llama = open_llama()
    tokens = llama.tokenize(LONG.encode())

    def drawn(killed_at: int) -> list[int]:
        llama.reset()
        llama.set_seed(3)
        llama.eval(tokens)
        generation, found = llama.generate([28], reset=False, temp=temp), []
        for i in range(16):
            found.append(next(generation))
            if i == killed_at:
                kill(llama.pid)
        generation.close()
        return found

    assert drawn(9) == drawn(-1)


@pytest.mark.usefixtures("often")
def test_a_history_is_restored_too(open_llama: OpenLlama) -> None:
    llama = open_llama()
    stream(llama)
    llama.reset()
    tokens = llama.tokenize(LONG.encode())
    llama.eval(tokens)
    kill(llama.pid)
    llama.eval(tokens[1:3])
    assert list(llama.eval_tokens) == [*tokens, *tokens[1:3]]
    assert "restore" in {each.name for each in phases(llama)}


@pytest.mark.usefixtures("often")
def test_a_state_that_crashes_its_cell_is_done_without(
    open_llama: OpenLlama, dose: Callable[[Poison], None], store: Store
) -> None:
    dose(Poison(how="restore"))
    llama = open_llama()
    undisturbed = stream(llama)
    assert stream(llama, 9) == undisturbed
    llama.flush_reports()
    assert [report.evidence.exit for report in read_all(store)] == [Exit.KILLED, Exit.SIGNAL]


@pytest.mark.usefixtures("often")
def test_so_is_one_behind_a_history(
    open_llama: OpenLlama, dose: Callable[[Poison], None], store: Store
) -> None:
    dose(Poison(how="restore"))
    llama = open_llama()
    text = stream(llama)
    kill(llama.pid)  # between two calls: the next one begins in a new cell, and its prompt with the state
    more: Any = llama(LONG + text + " And", max_tokens=4, temperature=0.0)
    assert more["choices"][0]["finish_reason"] == "length"
    assert more["crumplezone"]["recovered"] == 1
    llama.flush_reports()
    assert [report.evidence.exit for report in read_all(store)] == [Exit.KILLED, Exit.SIGNAL]


@pytest.mark.parametrize("start", ["zygote", "spawn"])
def test_the_constructor_has_what_the_original_has(
    open_llama: OpenLlama, start: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which opens and closes descriptors of its own, and asks a model without layers for nothing."""
    assert open_llama(start=start, vocab_only=True).tokenize(b"The sea")
    assert open_llama(start=start, numa=True, verbose=False)("The sea", max_tokens=2)
    assert capfd.readouterr().out == ""


def test_a_context_that_cannot_be_is_no_fault_of_the_file(open_llama: OpenLlama) -> None:
    with pytest.raises(ContextError, match="quantized V cache") as caught:
        open_llama(type_v=8, flash_attn=False)
    assert isinstance(caught.value, ValueError)


class Memory:
    """A cell that answers with a state, or cannot be asked."""

    def __init__(self, state: bytes | Exception) -> None:
        self._state = state

    def save(self, _: int, most: int = 0) -> bytes:
        assert most > 2**20
        if isinstance(self._state, Exception):
            raise self._state
        return self._state

    def restore(self, state: bytes) -> None:
        assert state == b"state"
        if isinstance(self._state, Exception):
            raise self._state


def test_rare_states_cost_nothing_that_shows() -> None:
    kept = checkpoint.Checkpoint()
    assert not kept.due
    with kept.computing():
        pass
    assert not kept.due
    assert not kept.serves([1] * 99)
    kept.make([1] * 20, Memory(b"state"))
    assert kept.serves([1] * 30)
    assert kept.serves([1] * 16 + [2])
    assert not kept.serves([1] * 15 + [2])
    kept.make([2] * 20, Memory(b""))  # too large to be kept
    kept.make([2] * 20, Memory(ShortageError("a state", "no memory")))
    assert kept.serves([1] * 30)
    assert kept.give(Memory(b"")) == [1] * 20
    assert kept.give(Memory(MemoryError())) == []
    kept.drop()
    assert not kept.serves([1] * 30)


def test_a_stopped_zygote_does_not_hold_close(open_llama: OpenLlama, store: Store) -> None:
    llama = open_llama()
    assert llama._session.wait_for_spares(30)
    (zygote,) = llama.processes["zygote"]
    os.kill(zygote, signal.SIGSTOP)
    llama.close()
    assert not psutil.pid_exists(zygote)
    assert read_all(store) == []  # else it waited for an answer, and called it hung


def test_a_zygote_that_is_killed_is_not_missed(open_llama: OpenLlama) -> None:
    llama = open_llama()
    undisturbed = stream(llama)
    (zygote,) = llama.processes["zygote"]
    os.kill(zygote, signal.SIGKILL)
    assert stream(llama, 3) == undisturbed
    assert llama.processes["zygote"] != [zygote]
