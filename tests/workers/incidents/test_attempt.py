"""One try of one rung: what is told of it, what is raised, and when its report is there."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from crumplezone.errors import CellDied, CellRefused, MemoryLostError, UsageError
from crumplezone.reports.records.report import BatchRecord, Exit, Outcome
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.workers.batch.call import RefusedError
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from tests.support.decoders import batch_of
from tests.support.processes.cells import spec
from tests.support.services.stunts import Echo, Stunt


@dataclass
class Described:
    config: CellConfig
    known: CellInfo | None = None


@pytest.fixture
def reporter(store: Store) -> Iterator[Reporter]:
    made = Reporter(store.directory)
    yield made
    made.close()


class Tries:
    """What attempts are made of here."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter, self.job = reporter, JobRecord()
        self.config = CellConfig(
            model="none.gguf", n_ctx=512, n_batch=64, n_ubatch=64, n_seq_max=2, n_threads=1, n_gpu_layers=0
        )
        self.asked = 0  # for the batch

    def batch(self) -> BatchRecord:
        self.asked += 1
        return batch_of([1, 2], [3])

    def attempt(self, kind: type[Attempt] = Attempt) -> Attempt:
        return kind(self.reporter, self.job, Described(self.config), "safe", [7], self.batch)


@pytest.fixture
def tries(reporter: Reporter) -> Tries:
    return Tries(reporter)


def crash() -> None:
    Cell(spec()).call(Stunt("segv"), Echo, 30)


def test_a_crash_is_told_and_its_report_is_there_before_an_error(tries: Tries, store: Store) -> None:
    with tries.attempt() as tried:
        crash()
    assert not tried.ok
    assert tried.died is tried.error
    assert (tried.rc, tries.asked) == (None, 1)
    assert tries.job.reports == [tried.report]
    (step,) = tries.job.steps
    assert (step.rung, step.outcome, step.sequences, step.detail) == (
        *("safe", Outcome.CRASHED, [7], tried.problem),
    )
    assert step.ms > 0
    tries.reporter.file(tries.job, None, None, failed=True)
    (row,) = store.rows()
    report = store.read(row.id)
    assert (report.evidence.exit, report.rung, report.batch) == (Exit.SIGNAL, "safe", tries.batch())
    assert report.context["n_ctx"] == 512
    assert report.ladder == tries.job.steps


def test_what_failed_keeps_no_frame_alive(tries: Tries) -> None:
    """They hold the arrays of the dead cell."""
    with tries.attempt() as tried:
        crash()
    assert tried.error is not None
    assert tried.error.__traceback__ is None


@pytest.mark.parametrize(
    ("error", "rc"),
    [(RefusedError(-3), -3), (CellRefused("ValueError", "no"), None), (OSError("no descriptors"), None)],
    ids=lambda value: type(value).__name__,
)
def test_a_refusal_is_told(tries: Tries, store: Store, error: Exception, rc: int | None) -> None:
    with tries.attempt() as tried:
        raise error
    assert (tried.ok, tried.error, tried.rc, tried.report, tried.died) == (False, error, rc, None, None)
    (step,) = tries.job.steps
    assert (step.outcome, step.detail) == (Outcome.REFUSED, str(error))
    tries.reporter.file(tries.job, None, None, failed=True)
    assert (tries.asked, store.rows()) == (0, [])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "MemoryError: free memory"),
        (OSError(errno.EMFILE, "Too many open files"), "[Errno 24] Too many open files: close files"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_this_process_lacks_is_told_with_a_remedy(tries: Tries, error: Exception, told: str) -> None:
    with tries.attempt() as tried:
        raise error
    assert tried.problem.startswith(told)


def test_what_was_done_is_a_step(tries: Tries) -> None:
    with tries.attempt() as tried:
        pass
    assert (tried.ok, tried.problem, tried.report, tried.rc) == (True, "", None, None)
    (step,) = tries.job.steps
    assert (step.outcome, step.detail, tries.asked) == (Outcome.OK, "", 0)


@pytest.mark.parametrize(
    "error",
    [MemoryLostError("gone"), ValueError("a bug"), KeyboardInterrupt()],
    ids=lambda e: type(e).__name__,
)
def test_what_ends_the_job_is_raised(tries: Tries, error: BaseException) -> None:
    with pytest.raises(type(error)), tries.attempt():
        raise error
    assert (tries.job.steps, tries.job.crashes) == ([], [])


class _Ours(Attempt):
    """Of an owner whose cell lives."""

    def tells(self, error: BaseException) -> bool:
        return isinstance(error, UsageError)


def test_the_death_of_another_cell_is_raised_as_it_was(tries: Tries) -> None:
    with pytest.raises(CellDied) as caught, tries.attempt(_Ours):
        crash()
    assert caught.value.__traceback__ is not None
    assert Incident.of(caught.value).evidence.result(30).exit == Exit.SIGNAL
    assert (tries.job.steps, tries.job.crashes, tries.asked) == ([], [], 0)
