"""The runner processes of a diagnostic run: real ones, that die and are killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from crumplezone.diagnostics.ci.case import Case
from crumplezone.diagnostics.ci.pool import run_all
from crumplezone.diagnostics.ci.runner import Do
from crumplezone.reports.records.run import CaseRecord, Ending
from tests.support.decoders import descriptors, opened_since, wait_for_end
from tests.support.paths import ROOT
from tests.support.records.cases import some


class Kept(logging.Handler):
    """What came, each with the process that said it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.processName} {record.getMessage()}")


@pytest.fixture
def log() -> Iterator[Kept]:
    handler = Kept()
    yield handler
    handler.close()


def does(do: Do) -> str:
    return f"{do.__module__}:{do.__qualname__}"


def passed(case: Case, _: Path) -> CaseRecord:
    logging.getLogger("crumplezone.ci").info("doing %s", case.id)
    return CaseRecord(case.id, case.model.name, case.shape, Ending.PASS)


def dies_at_two(case: Case, store: Path) -> CaseRecord:
    if case.id == "case 2":
        os.kill(os.getpid(), signal.SIGKILL)
    return passed(case, store)


def sends_what_is_no_record(case: Case, store: Path) -> CaseRecord:
    if case.id == "case 2":
        os.write(int(sys.argv[1]), b"\0\1\x86\xa0" + b"\x91" * 100_000)  # of a length, nested that deep
    return passed(case, store)


def raises(case: Case, _: Path) -> CaseRecord:
    raise ZeroDivisionError(case.id)


def waits(case: Case, store: Path) -> CaseRecord:
    """Tells its process id through a pipe in the store's place, and waits to be killed."""
    if case.id == "case 1":
        store.write_text(f"{os.getpid()}\n")
        signal.pause()
    return passed(case, store)


# The runners.


def test_every_case_is_run_once_and_every_record_reaches_the_log(tmp_path: Path, log: Kept) -> None:
    before = descriptors()
    found = list(run_all(some(9), 3, tmp_path, log, does(passed)))
    assert sorted(record.id for record in found) == [case.id for case in some(9)]
    said = log.said
    assert sorted(line.partition(" ")[2] for line in said if "doing" in line) == [
        f"doing case {n}" for n in range(1, 10)
    ]
    assert {line.partition(" ")[0] for line in said} <= {"runner-1", "runner-2", "runner-3"}
    assert opened_since(before) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_runner_that_dies_costs_its_case(tmp_path: Path, log: Kept, jobs: int) -> None:
    before, threads = descriptors(), set(threading.enumerate())
    found = {record.id: record for record in run_all(some(5), jobs, tmp_path, log, does(dies_at_two))}
    assert opened_since(before) == []
    assert {each for each in threading.enumerate() if each.name != "logs"} <= threads
    assert sorted(found) == [case.id for case in some(5)]
    lost = found.pop("case 2")
    assert lost.ending is Ending.ERROR
    assert re.fullmatch(r"the process \d+ that ran this case was killed by SIGKILL; .*", lost.detail)
    assert {record.ending for record in found.values()} == {Ending.PASS}
    assert jobs == 2 or "runner-2 doing case 3" in log.said  # another takes its place
    assert any(line.endswith("case 2: begins") for line in log.said)  # its last words, too


def test_a_runner_that_sends_no_record_costs_its_case(tmp_path: Path, log: Kept) -> None:
    found = {r.id: r for r in run_all(some(3), 1, tmp_path, log, does(sends_what_is_no_record))}
    assert [found[f"case {n}"].ending for n in (1, 2, 3)] == [Ending.PASS, Ending.ERROR, Ending.PASS]
    assert "was killed by SIGKILL" in found["case 2"].detail


def test_what_a_case_raises_is_an_error_of_the_infrastructure(tmp_path: Path, log: Kept) -> None:
    (record,) = run_all(some(1), 1, tmp_path, log, does(raises))
    assert (record.ending, record.detail) == (
        Ending.ERROR,
        "could not be run (ZeroDivisionError: case 1); see run.log",
    )
    assert "runner-1 case 1: could not be run" in log.said


def test_a_run_that_is_given_up_kills_its_runners(tmp_path: Path, log: Kept) -> None:
    os.mkfifo(tmp_path / "fifo")
    running = run_all(some(3), 2, tmp_path / "fifo", log, does(waits))
    assert next(running).id == "case 2"
    pid = int((tmp_path / "fifo").read_text())
    running.close()
    assert not psutil.pid_exists(pid)


def tells_and_waits(case: Case, store: Path) -> CaseRecord:
    """Tells its process id, and waits to be killed."""
    with store.open("a") as told:
        told.write(f"{os.getpid()}\n")
    signal.pause()
    return passed(case, store)


@pytest.mark.parametrize("stop", [False, True])
def test_the_runners_die_with_the_run(tmp_path: Path, *, stop: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    code = (
        "import logging, pathlib, sys, tests.diagnostics.ci.test_pool as t;"
        "do = t.does(t.tells_and_waits);"
        "list(t.run_all(t.some(3), 3, pathlib.Path(sys.argv[1]), logging.NullHandler(), do))"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "fifo"], cwd=ROOT) as run:
        pids: list[int] = []
        while len(pids) < 3:
            pids += map(int, (tmp_path / "fifo").read_text().split())
        for pid in pids:
            if stop:
                os.kill(pid, signal.SIGSTOP)
        run.kill()
    assert [wait_for_end(pid) for pid in pids] == [True] * 3


def test_the_runners_outlive_the_thread_that_started_them(tmp_path: Path, log: Kept) -> None:
    running = run_all(some(3), 1, tmp_path, log, does(passed))
    found: list[CaseRecord] = []
    thread = threading.Thread(target=lambda: found.append(next(running)))
    thread.start()
    thread.join()
    assert [record.ending for record in [*found, *running]] == [Ending.PASS] * 3
