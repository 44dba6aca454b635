"""Health: each cell is asked, whatever it does, and nobody's work is changed by it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from crumplezone import Batch, CellHealth, Decoder
from crumplezone.errors import UsageError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import PROMPTS, Open, kill, outcome, reports_of, wait_for_end
from tests.support.pace import Pace


def of(decoder: Decoder, role: str, timeout: float = 30) -> CellHealth:
    (found,) = [cell for cell in decoder.health(timeout) if cell.role == role]
    return found


def test_cells_that_wait_are_asked(tiny: Path, make: Open) -> None:
    decoder = make(tiny, workers=2, awake=False)
    assert [cell.role for cell in decoder.health(30)] == ["zygote"]
    decoder.tokenize("a")
    list(decoder.generate(PROMPTS, max_tokens=4))
    decoder.embed(["abc"])
    found = decoder.health(30)
    pids = decoder.processes
    assert {(cell.role, cell.pid) for cell in found} == {
        *(("memory", pid) for pid in pids["memory"]),
        *(("lane", pid) for pid in pids["lanes"]),
        *(("embeddings", pid) for pid in pids["embeddings"]),
        *(("zygote", pid) for pid in pids["zygote"]),
    }
    assert all(cell.alive and cell.answered and cell.silent < 30 for cell in found)
    assert {cell.state for cell in found if cell.role != "zygote"} == {"idle"}  # that may be forking a spare


def test_one_that_works_answers_by_its_work(tiny: Path, make: Open, pace: Pace) -> None:
    decoder = make(tiny, 2)
    stream = decoder.submit_prompt("abc", max_tokens=100)
    pace.go(1)
    next(iter(stream))
    while (stuck := of(decoder, "lane", 0.2)).state == "idle":  # until it waits in its second native call
        pass
    assert (stuck.alive, stuck.answered, stuck.state) == (True, False, "busy")
    assert stuck.silent >= 0.2
    assert of(decoder, "zygote", 2).answered  # while another does not
    threading.Timer(0.1, pace.go).start()
    moving = of(decoder, "lane")
    assert (moving.alive, moving.answered, moving.state) == (True, True, "busy")
    pace.go(200)
    assert stream.result(60).finish_reason == "length"
    assert of(decoder, "lane").state == "idle"


def test_asking_all_the_time_changes_no_text(tiny: Path, make: Open, store: Store) -> None:
    undisturbed = list(make(tiny).generate(PROMPTS, max_tokens=40))
    decoder = make(tiny)
    stop = threading.Event()
    found: list[CellHealth] = []

    def ask() -> None:
        while not stop.is_set():
            found.extend(decoder.health(30))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(3):
            assert outcome(list(decoder.generate(PROMPTS, max_tokens=40))) == outcome(undisturbed)
            decoder.tokenize("abc")
    finally:
        stop.set()
        asking.join()
    assert {cell.role for cell in found} == {"memory", "lane", "zygote"}
    assert all(cell.answered for cell in found)
    assert reports_of(decoder, store) == []


def test_one_that_is_stopped_and_then_killed_for_it(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny)
    (expected,) = decoder.generate(["abc"], max_tokens=8)
    pid = of(decoder, "lane").pid
    os.kill(pid, signal.SIGSTOP)
    stopped = of(decoder, "lane", 0.2)
    assert (stopped.pid, stopped.alive, stopped.answered, stopped.state) == (pid, True, False, "stopped")
    assert wait_for_end(pid)  # after two seconds: of no use to anybody
    ended = of(decoder, "lane")
    assert (ended.pid, ended.alive, ended.answered, ended.state) == (pid, False, False, "ended")
    (again,) = decoder.generate(["abc"], max_tokens=8)
    assert outcome([again]) == outcome([expected])
    assert of(decoder, "lane").answered
    assert [report.evidence.exit for report in reports_of(decoder, store)] == [Exit.KILLED]


def test_one_that_goes_on_after_it_did_not_answer(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny)
    (expected,) = decoder.generate(["abc"], max_tokens=8)
    pid = of(decoder, "lane").pid
    os.kill(pid, signal.SIGSTOP)
    assert not of(decoder, "lane", 0.1).answered
    os.kill(pid, signal.SIGCONT)
    (again,) = decoder.generate(["abc"], max_tokens=8)
    assert outcome([again]) == outcome([expected])
    assert of(decoder, "lane").pid == pid
    assert reports_of(decoder, store) == []


def test_one_that_was_killed_is_still_reported(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny)
    pid = of(decoder, "memory").pid
    kill(pid)
    ended = of(decoder, "memory")
    assert (ended.pid, ended.alive, ended.answered, ended.state) == (pid, False, False, "ended")
    decoder.decode(Batch.of([[4]]))
    assert of(decoder, "memory").answered
    assert [report.evidence.exit for report in reports_of(decoder, store)] == [Exit.KILLED]


def test_after_close(tiny: Path, make: Open) -> None:
    decoder = make(tiny)
    decoder.close()
    with pytest.raises(UsageError, match="closed"):
        decoder.health()
