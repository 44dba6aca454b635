"""Whose stacks are taken when many processes die: the next cell comes first."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Exit, Fault, Frame, Thread
from crumplezone.reports.store.storm import FULL_PER_HOUR
from crumplezone.sandbox.autopsy import autopsy
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.autopsy.turns import TURNS, Familiar, Turns, crash_key
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.workers.model.file import check_file
from tests.support.decoders import descriptors
from tests.support.processes.cells import die, spec
from tests.support.processes.constrained import descriptors_used_up, every_turn_taken
from tests.support.processes.helpers import Helper, at_birth
from tests.support.services.stunts import Echo, Stunt

BOUND = 30  # seconds for anything
FAULT = Fault(11, "SIGSEGV")


def left_out(evidence: Evidence) -> str:
    """Why no stacks were taken, or an empty string."""
    assert evidence.fault is not None
    assert evidence.fault.name == "SIGSEGV"
    assert evidence.registers
    assert evidence.faulthandler
    return next(
        (step.detail for step in evidence.steps if step.name == "stacks (pystack)" and not step.ok), ""
    )


def lose() -> Incident:
    cell = Cell(spec())
    with pytest.raises(CellDied) as caught:
        cell.call(Stunt("segv"), Echo, BOUND)
    return Incident.of(caught.value)


def wait_for_line(turns: Turns, count: int) -> None:
    """Wait until so many wait for a turn."""
    end = time.monotonic() + BOUND
    while len(turns._line) != count:
        assert time.monotonic() < end
        os.sched_yield()


class Waiting:
    """One who waits for a turn, on a thread."""

    def __init__(self, turns: Turns) -> None:
        self.told = ""
        self._thread = threading.Thread(target=self._run, args=(turns,))
        self._thread.start()

    def _run(self, turns: Turns) -> None:
        with turns.turn() as self.told:
            pass

    def end(self) -> str:
        self._thread.join(BOUND)
        return self.told


def test_a_turn_is_had_in_the_order_of_coming_and_the_line_has_an_end() -> None:
    turns = Turns(1, 2, 9)
    with every_turn_taken(turns):
        first = Waiting(turns)
        wait_for_line(turns, 1)
        second = Waiting(turns)
        wait_for_line(turns, 2)
        with turns.turn() as refusal:
            assert "2 waited" in refusal
    assert (first.end(), second.end()) == ("", "")
    with turns.turn() as refusal:
        assert refusal == ""


def test_who_waits_is_sent_away_when_room_is_needed() -> None:
    turns = Turns(1, 2, 9)
    assert not turns.make_room(turns.ended)  # nobody holds anything
    with every_turn_taken(turns):
        ended = threading.Event()

        def wait_and_end() -> None:
            with turns.autopsy(), turns.turn() as refusal:
                assert "needed to start a process" in refusal
            ended.set()

        thread = threading.Thread(target=wait_and_end)
        thread.start()
        wait_for_line(turns, 1)
        assert turns.make_room(turns.ended)
        assert ended.wait(BOUND)
        thread.join()


def test_where_no_turn_can_be_had_the_evidence_is_what_takes_no_helper() -> None:
    with every_turn_taken(), contextlib.ExitStack() as waiting:
        for n in range(TURNS._waiting):
            waiting.callback(Waiting(TURNS).end)
            wait_for_line(TURNS, n + 1)
        evidence = die("segv")
        assert "waited" in left_out(evidence)
        TURNS.make_room(TURNS.ended)
    assert left_out(die("segv")) == ""


def test_where_too_many_died_at_once_the_caller_does_what_is_quick() -> None:
    with contextlib.ExitStack() as others:
        while not TURNS.crowded:
            others.enter_context(TURNS.autopsy())
        incident = lose()
        assert incident.evidence.done()
    assert "had died at once" in left_out(incident.evidence.result())


def test_how_it_ended_is_known_before_its_stacks() -> None:
    with every_turn_taken():
        incident = lose()
        assert incident.exit() is Exit.SIGNAL
        assert not incident.evidence.done()
    assert incident.evidence.result(BOUND).exit is Exit.SIGNAL


def test_what_waits_holds_no_more_than_it_needs() -> None:
    before = len(descriptors())
    with every_turn_taken():
        incident = lose()
        wait_for_line(TURNS, 1)
        # The process, its fault pipe, its socket, its parent pipe and what the map of the arena keeps.
        assert len(descriptors()) - before == 5
        assert not [t.name for t in threading.enumerate() if t.name.startswith("drain-")]
    assert left_out(incident.evidence.result(BOUND)) == ""


def test_a_start_without_a_descriptor_gets_those_of_the_dead() -> None:
    with every_turn_taken():
        incidents = []
        for n in range(TURNS._waiting):
            incidents.append(lose())
            wait_for_line(TURNS, n + 1)
        with descriptors_used_up(but=4):
            cell = Cell(spec())
            assert cell.call(Stunt("echo", 5), Echo, BOUND) == Echo("echo", 5)
        cell.close()
        told = [left_out(incident.evidence.result(BOUND)) for incident in incidents]
    assert set(told) == {"left out: what it held was needed to start a process"}


def test_what_a_start_needs_is_had_of_the_dead_too(tiny: Path) -> None:
    cell = Cell(spec())
    for need in (lambda: check_file(tiny), lambda: cell.arrays([("u1", 2**20)])):
        with every_turn_taken():
            incident = lose()
            wait_for_line(TURNS, 1)
            with descriptors_used_up(but=0):
                need()
            told = left_out(incident.evidence.result(BOUND))
        assert told == "left out: what it held was needed to start a process"
    cell.close()


def test_a_dead_process_counts_before_its_autopsy_runs() -> None:
    asked_for = threading.Event()

    def hold(frame: FrameType, event: str, _: object) -> None:
        end = time.monotonic() + BOUND
        while frame.f_code is autopsy._autopsy.__code__ and event == "call" and not asked_for.is_set():
            if TURNS._let_go._waiters or time.monotonic() > end:  # type: ignore[attr-defined]
                asked_for.set()
            os.sched_yield()

    threading.setprofile(hold)  # of threads that are started from here on
    try:
        incident = lose()
    finally:
        threading.setprofile(None)
    with descriptors_used_up(but=8):
        cell = Cell(spec())
    cell.close()
    assert asked_for.is_set()
    assert incident.evidence.result(BOUND).exit == Exit.SIGNAL


def test_room_that_was_made_meanwhile_is_room() -> None:
    turns = Turns(1, 2, 9)
    before = turns.ended
    with turns.autopsy():
        pass
    assert turns.make_room(before)
    assert not turns.make_room(turns.ended)


def test_a_fork_has_every_turn() -> None:
    turns = Turns(1, 0, 9)
    with every_turn_taken(turns), turns.autopsy():
        turns.reset()
        with turns.turn() as refusal:
            assert refusal == ""
        assert not turns.make_room(turns.ended)
        turns.reset()


def crashed(*offsets: str, module: str = "libllama.so") -> list[Thread]:
    frames = [Frame(module=module, build_id="12ab", offset=offset) for offset in offsets]
    return [Thread(1), Thread(2, crashed=True, native=frames)]


def test_a_crash_is_known_again_by_where_it_was_called_from() -> None:
    key = crash_key(FAULT, crashed("0x1", "0x2"))
    assert key is not None
    assert key == crash_key(FAULT, crashed("0x1", "0x2"))
    assert key != crash_key(FAULT, crashed("0x1", "0x3"))
    assert key != crash_key(Fault(6, "SIGABRT"), crashed("0x1", "0x2"))
    # Of the place alone there may be many: every abort() is in one function of libc.
    assert crash_key(FAULT, crashed("0x1")) is None
    assert crash_key(FAULT, []) is None
    assert crash_key(None, crashed("0x1", "0x2")) is None


def test_what_was_taken_often_is_not_taken_again_within_the_hour() -> None:
    now = 0.0
    familiar = Familiar(lambda: now)
    key, other = crash_key(FAULT, crashed("0x1", "0x2")), crash_key(FAULT, crashed("0x1", "0x3"))
    for n in range(FULL_PER_HOUR):
        assert familiar.refusal(key) == ""
        now = float(n)
        familiar.count(key)
    assert "within the hour" in familiar.refusal(key)
    assert familiar.refusal(other) == familiar.refusal(None) == ""
    now = 3600.0 + 1
    assert familiar.refusal(key) == ""
    familiar.count(key)
    now += 1
    assert familiar.refusal(key) == ""  # the second of them is an hour ago by now
    familiar.forget()
    familiar.count(None)
    assert familiar._seen == {}


def test_a_helper_that_fails_is_not_started_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Helper] = []

    def kill(helper: Helper) -> None:
        started.append(helper)
        helper.kill()

    at_birth(monkeypatch, kill)
    for _ in range(FULL_PER_HOUR):
        assert "ended with -9" in left_out(die("segv"))
    before = len(started)
    assert before >= FULL_PER_HOUR
    assert "within the hour" in left_out(die("segv"))
    assert len(started) == before


STORM = """
import resource, sys, threading
from pathlib import Path
import psutil
from crumplezone import Batch, Decoder

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    batch = Batch.of([[1, 5], [1, 6]])
    decoders = [
        Decoder(sys.argv[1], n_seq_max=2, n_ctx=512, n_threads=1, preflight=False, reports=sys.argv[2])
        for _ in range(4)
    ]
    errors = []

    def crash(decoder):
        for _ in range(12):
            errors.extend(decoder.encode(batch).errors.values())

    threads = [threading.Thread(target=crash, args=(decoder,)) for decoder in decoders]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(psutil.Process().children(recursive=True)))
        threads[0].join(0.05)
    for decoder in decoders:
        decoder.close()
    print(len(errors), errors[:3], most)
"""


def test_in_a_storm_every_sequence_gets_its_result(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STORM, str(tiny), str(tmp_path / "reports")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr[-2000:]
    lost, *_, most = done.stdout.split()
    assert int(lost) == 0, done.stdout
    assert int(most) < 60


def test_a_strangers_kill_is_told_at_once() -> None:
    with every_turn_taken():
        assert die("kill").exit == Exit.KILLED
