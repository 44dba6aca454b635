"""When reports are written, and what becomes of one whose store or process goes away."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from crumplezone.errors import CellDied
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.records.report import Exit, Outcome, VerdictKind
from crumplezone.reports.store import index
from crumplezone.reports.store.store import Store
from crumplezone.reports.store.storm import FULL_PER_HOUR
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.host.errands import DELIVERY
from crumplezone.workers.incidents import reporter as module
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.protocol.config import CellConfig
from tests.support.decoders import batch_of, kill, read_all
from tests.support.processes.cells import spec
from tests.support.services.stunts import Echo, Stunt

BATCH = batch_of([1, 2], [3])
CONFIG = CellConfig(
    model="/models/none.gguf", n_ctx=512, n_batch=64, n_ubatch=64, n_seq_max=2, n_threads=1, n_gpu_layers=0
)


@pytest.fixture
def reporter(store: Store) -> Iterator[Reporter]:
    made = Reporter(store.directory)
    yield made
    made.close()


def lose(stunt: str = "segv") -> Incident:
    cell = Cell(spec())
    with pytest.raises(CellDied) as caught:
        cell.call(Stunt(stunt), Echo, 30)
    return Incident.of(caught.value)


def end(case: JobRecord) -> None:
    case.step("safe", Outcome.OK, [0, 1])
    case.result = "cured"


def test_a_report_is_there_before_its_job_has_ended(
    reporter: Reporter, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "crumplezone")
    case = JobRecord()
    path = Path(reporter.add(case, lose(), "native", BATCH, CONFIG))
    case.step("native", Outcome.CRASHED, [0, 1])
    reporter.flush()
    early = store.read(path.name)
    assert (early.result, early.verdict, early.batch) == ("the job goes on", None, BATCH)
    assert early.signature == sign(early)
    assert early.model is not None
    assert caplog.messages == []

    end(case)
    reporter.file(case, CONFIG, None)
    reporter.flush()
    (row,) = store.rows()
    late = store.read(path.name)
    assert (row.result, row.verdict) == (late.result, VerdictKind.BATCH_ONLY)
    assert late.written_at == early.written_at
    assert [step.outcome for step in late.ladder] == [Outcome.CRASHED, Outcome.OK]
    assert late.evidence == early.evidence
    assert "result: cured" in (path / "report.txt").read_text()
    assert DELIVERY.wait(30)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(f"Result: cured. Report: {path}")


def test_only_the_exit_is_judged_while_the_job_goes_on(reporter: Reporter, store: Store) -> None:
    case = JobRecord()
    end(case)  # another sequence's end, which says nothing of this crash
    case.step("native", Outcome.CRASHED, [0, 1])
    ids = [Path(reporter.add(case, lose(stunt), "safe", BATCH)).name for stunt in ("segv", "exit_native")]
    reporter.flush()
    assert [store.read(name).verdict for name in ids] == [None, None]
    assert [store.read(name).evidence.exit for name in ids] == [Exit.SIGNAL, Exit.NATIVE_EXIT]


KILLED = """
import os, signal, sys
from pathlib import Path
from crumplezone.workers.incidents import reporter as module
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from tests.workers.incidents.test_reporter import BATCH, lose
if __name__ == "__main__":
    reporter = Reporter(Path(sys.argv[1]))
    reporter.add(JobRecord(), lose(), "native", BATCH)
    reporter.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_supervisor_killed_meanwhile_leaves_its_report(store: Store) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, store.directory], timeout=60, check=False)
    assert done.returncode == -9
    (row,) = store.rows()
    assert (row.result, row.signal, row.problem) == ("the job goes on", "SIGSEGV", "")


def test_a_job_that_ended_first_is_written_once(reporter: Reporter, store: Store) -> None:
    case, incident = JobRecord(result="done"), lose()
    slow = dataclasses.replace(incident, evidence=Future())
    reporter.add(case, slow, "native", BATCH)
    reporter.file(case, CONFIG, None)
    slow.evidence.set_result(incident.evidence.result())
    reporter.flush()
    (row,) = store.rows()
    assert row.result == "done"
    assert len((store.directory / index.NAME).read_text().split("\n")) == 2  # each line after its line feed


def report_one(reporter: Reporter, incident: Incident) -> str:
    path = reporter.file_lone(incident, "tokenize", "failed", CONFIG, None)
    reporter.flush()
    return Path(path).name


def test_a_storm_never_refers_to_what_is_not_there(
    reporter: Reporter, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    incident = lose()
    for _ in range(FULL_PER_HOUR):
        report_one(reporter, incident)
    assert store.read(report_one(reporter, incident)).same_as

    shutil.rmtree(store.directory)
    again = [report_one(reporter, incident) for _ in range(2)]
    assert [store.read(name).same_as for name in again] == ["", ""]

    shutil.rmtree(store.directory)
    store.directory.write_text("in the way")  # root may write anywhere, but not here
    caplog.clear()
    for _ in range(FULL_PER_HOUR + 1):
        report_one(reporter, incident)
    assert DELIVERY.wait(30)
    assert len([each for each in caplog.messages if "could not be written" in each]) == FULL_PER_HOUR + 1
    store.directory.unlink()
    assert store.read(report_one(reporter, incident)).same_as == ""


def test_a_store_that_goes_away_in_the_middle_of_a_job_gets_its_report(
    reporter: Reporter, store: Store
) -> None:
    case = JobRecord()
    path = Path(reporter.add(case, lose(), "native", BATCH))
    reporter.flush()
    shutil.rmtree(store.directory)
    end(case)
    reporter.file(case, CONFIG, None)
    reporter.flush()
    assert store.read(path.name).result == "cured"


def test_redacted_from_the_first_writing_on(store: Store) -> None:
    reporter = Reporter(store.directory, redacted=True)
    case = JobRecord()
    path = Path(reporter.add(case, lose(), "native", BATCH, CONFIG))
    reporter.flush()
    early = store.read(path.name)
    case.step("safe", Outcome.REFUSED, [0], "it said 'a secret'")
    reporter.file(case, CONFIG, None)
    reporter.close()
    late = store.read(path.name)
    for report in (early, late):
        assert report.redacted
        assert report.batch is not None
        assert not set(report.batch.tokens) & {1, 2, 3}
    assert "secret" not in (path / "report.json").read_text() + (path / "report.txt").read_text()


def test_bytes_that_are_not_utf8_lose_no_report(
    reporter: Reporter, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANG", os.fsdecode(b"caf\xe9"))
    found = store.read(report_one(reporter, lose()))
    assert found.environment.variables["LANG"] == r"caf\udce9"
    (row,) = store.rows()
    assert row.problem == ""


AFTER_MAIN = """
import sys, threading
from pathlib import Path
from crumplezone.workers.incidents import reporter as module
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from tests.workers.incidents.test_reporter import BATCH, lose

def work(reporter, incident):
    threading.main_thread().join()
    case = JobRecord()
    path = reporter.add(case, incident, "native", BATCH)
    reporter.file(case, None, None, failed=True)
    print(Path(path, "report.json").exists())

if __name__ == "__main__":
    threading.Thread(target=work, args=(Reporter(Path(sys.argv[1])), lose())).start()
"""
AT_EXIT = """
import atexit, sys
from pathlib import Path
which, place = sys.argv[1:]

def crash():
    reporter.file_lone(incident, "tokenize", "failed", CONFIG, None)

if which == "before":
    atexit.register(crash)
from crumplezone.workers.incidents.reporter import Reporter
if which == "after":
    atexit.register(crash)
from tests.workers.incidents.test_reporter import CONFIG, lose
reporter, incident = Reporter(Path(place)), lose()
"""


def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_reports_are_written_though_the_main_thread_has_ended(store: Store) -> None:
    done = run(AFTER_MAIN, store.directory)
    assert done.stdout == "True\n", done.stderr
    (row,) = store.rows()
    assert (row.signal, row.problem) == ("SIGSEGV", "")


@pytest.mark.parametrize("which", ["before", "after"])
def test_reports_are_written_until_the_process_ends(which: str, store: Store) -> None:
    """By a handler of atexit that was registered before ours, and so is called after it; and the reverse."""
    done = run(AT_EXIT, which, store.directory)
    assert "Traceback" not in done.stderr
    (row,) = store.rows()
    assert (row.result, row.signal, row.problem) == ("failed", "SIGSEGV", "")


class Stuck(logging.Handler):
    """Holds the thread that logs until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.go = threading.Event(), threading.Event()

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the signature of handlers
        self.here.set()
        self.go.wait(20)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    handler = Stuck()
    logging.getLogger("crumplezone").addHandler(handler)
    yield handler
    handler.go.set()
    assert DELIVERY.wait(30)
    logging.getLogger("crumplezone").removeHandler(handler)


def test_a_stuck_handler_delays_no_report_and_nobody_who_waits_for_one(
    reporter: Reporter, store: Store, stuck: Stuck
) -> None:
    begin = time.monotonic()
    for n in range(2):
        case = JobRecord(result=f"failed {n}")
        reporter.add(case, lose(), "native", BATCH, CONFIG)
        reporter.file(case, CONFIG, None, failed=True)
        assert stuck.here.wait(30)
    assert sorted(row.result for row in store.rows()) == ["failed 0", "failed 1"]
    reporter.close()
    assert not stuck.go.is_set()
    assert time.monotonic() - begin < 15


def test_a_logging_handler_may_wait_for_reports(reporter: Reporter, store: Store) -> None:
    told: list[int] = []

    class Asks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the signature of handlers
            reporter.flush(kept=True)
            reporter.close()
            told.append(len(store.rows()))

    handler = Asks()
    logging.getLogger("crumplezone").addHandler(handler)
    report_one(reporter, lose())
    assert DELIVERY.wait(30)
    logging.getLogger("crumplezone").removeHandler(handler)
    assert told == [1]


def killed_idle() -> Incident:
    cell = Cell(spec())
    kill(cell.pid)
    died = cell.died_idle()
    assert died is not None
    return Incident.of(died)


def file_killed(reporter: Reporter) -> None:
    reporter.file_unasked(killed_idle(), "in reserve", "another takes its place", CONFIG)
    reporter.flush()


def test_what_was_killed_with_no_job_is_reported_when_nobody_ends_us_too(
    reporter: Reporter, store: Store
) -> None:
    file_killed(reporter)
    assert store.rows() == []
    change, done = reporter._errands._change, reporter._errands.done
    with change:
        assert change.wait_for(lambda: reporter._errands.done > done, 30)
    (row,) = store.rows()
    assert (row.exit, row.result) == (Exit.KILLED, "another takes its place")


def test_what_was_killed_with_no_job_is_reported_when_it_is_asked_for(
    reporter: Reporter, store: Store
) -> None:
    file_killed(reporter)
    reporter.flush(kept=True)
    assert [row.exit for row in store.rows()] == [Exit.KILLED]


def test_what_was_killed_with_no_job_is_not_reported_when_all_is_closed(
    reporter: Reporter, store: Store
) -> None:
    file_killed(reporter)
    reporter.close()
    reporter.file_unasked(killed_idle(), "in reserve", "another takes its place", CONFIG)
    reporter.flush(kept=True)
    assert store.rows() == []


def test_what_crashed_with_no_job_is_reported_at_once(reporter: Reporter, store: Store) -> None:
    reporter.file_unasked(lose(), "in reserve", "another takes its place", CONFIG)
    reporter.close()
    assert [row.exit for row in store.rows()] == [Exit.SIGNAL]


def test_an_autopsy_that_finds_another_death_as_the_process_ends_does_not_wait_for_itself(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = threading.Event()
    monkeypatch.setattr(module, "_ending", ending)
    first = killed_idle()
    found = dataclasses.replace(first, evidence=Future())  # its autopsy is under way
    reporter.file_unasked(found, "in reserve", "another takes its place", CONFIG)
    ending.set()

    def autopsy() -> None:
        reporter.file_unasked(killed_idle(), "zygote", "it was started again", CONFIG)
        found.evidence.set_result(first.evidence.result())

    thread = threading.Thread(target=autopsy, daemon=True)
    begin = time.monotonic()
    thread.start()
    thread.join(30)
    assert time.monotonic() - begin < module._EXIT_MAX / 2
    reporter.flush()


ENDED = """
import os, signal, sys, threading
import psutil
from crumplezone import Batch, Decoder
from crumplezone.workers.incidents import reporter
how, model, place = sys.argv[1:]
reporter._KEPT = 100.0  # on a busy machine it takes longer than else until the deaths were seen
decoder = Decoder(model, n_seq_max=1, n_threads=1, reports=place)
decoder.decode(Batch.of([[4]]))
decoder._native.wait_for_spares(30)
if how == "children first":
    first = decoder.processes["zygote"]
    for child in psutil.Process().children(recursive=True):
        child.kill()
    while decoder.processes["zygote"] in (first, []):  # until it was seen
        os.sched_yield()
    os.kill(os.getpid(), signal.SIGKILL)
if how == "all at once":  # as systemd does it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for child in psutil.Process().children(recursive=True):
        child.terminate()
    os.kill(os.getpid(), signal.SIGTERM)
again = threading.Event()

def work():
    while True:
        decoder.memory.clear()
        decoder.decode(Batch.of([[4]]))
        again.set()

if how == "in the middle":
    threading.Thread(target=work, daemon=True).start()
    again.wait(30)
"""


@pytest.mark.parametrize("how", ["in the middle", "children first"])
def test_a_process_that_ends_reports_no_kill(how: str, tiny: Path, store: Store) -> None:
    done = run(ENDED, how, tiny, store.directory)
    assert done.returncode == (-9 if how == "children first" else 0), done.stderr
    assert [report.evidence for report in read_all(store)] == []


def test_a_process_that_is_ended_with_its_cells_ends(tiny: Path, store: Store) -> None:
    done = run(ENDED, "all at once", tiny, store.directory)
    assert done.returncode == 0, done.stderr
    assert [report.evidence for report in read_all(store)] == []
