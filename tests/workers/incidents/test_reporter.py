"""When reports are written, and what becomes of one whose store or process goes away."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
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
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.protocol.config import CellConfig
from tests.support.decoders import batch_of
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
