"""The safe rungs: one sequence at a time, and again token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from crumplezone.errors import CellDied, CrumplezoneError, SequenceError
from crumplezone.reports.records.report import BatchRecord, Outcome
from crumplezone.workers.batch.results import Rung, SequenceResult
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.deaths import KILLS_MAX, by_itself, was_killed
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.calls import LadderCall

_T = TypeVar("_T")
_SAFE = (Rung.SAFE, Rung.TOKEN)


@dataclass(frozen=True)
class Failure:
    """Why a sequence failed on every rung.

    Attributes:
        report: Where that of its latest crash will be, or None.
        rc: What llama.cpp returned, if that was how the last rung failed.
        poison: It crashed on each of the safe rungs, and nothing else is to blame.
    """

    seq_id: int
    problem: str
    report: str | None = None
    rc: int | None = None
    poison: bool = False

    def error(self, report: str | None) -> SequenceError:
        """For its caller; names the report if that is there."""
        return SequenceError(self.seq_id, self.problem, report, self.rc)


class SafeRungs:
    """The safe rungs of a ladder: one sequence at a time, split at n_batch, then token by token.

    Args:
        client: The cell, a new one after each crash.
        reporter: Where crashes go.
    """

    def __init__(self, client: DecodeClient, reporter: Reporter) -> None:
        self.client = client
        self._reporter = reporter

    def each(self, call: LadderCall, job: JobRecord) -> list[SequenceResult]:
        """The sequences of a batch, one by one."""
        results = []
        for seq_id in call.columns.sequences:
            alone = call.alone(seq_id)
            rows, rung, failure = self.attempt(seq_id, job, alone.run, alone.record)
            error = failure.error(self._reporter.written(failure.report)) if failure else None
            positions = alone.columns.positions[alone.columns.outputs]
            results.append(SequenceResult(seq_id, positions, rows, rung, error))
        return results

    def attempt(
        self, seq_id: int, job: JobRecord, work: Callable[[int], _T], batch: Callable[[int], BatchRecord]
    ) -> tuple[_T | None, Rung, Failure | None]:
        """Try one sequence on each safe rung in turn, and again if it failed where cells were killed.

        Args:
            seq_id: The sequence's id for its caller.
            job: That this belongs to.
            work: Called with the most tokens per native call.
            batch: Called with the same number after a crash: what was being decoded.
        """
        if no_cell := self._no_cell(job):
            job.step(Rung.SAFE, Outcome.REFUSED, [seq_id], no_cell)
            return None, Rung.SAFE, Failure(seq_id, no_cell)
        for _ in range(KILLS_MAX):
            deaths: list[CellDied] = []
            done, rung, failure = self._descend(seq_id, job, work, batch, deaths)
            # Asked only of one that failed: until then, autopsies run beside the work.
            if failure is None or not any(was_killed(died) for died in deaths):
                break
        if failure and deaths:
            job.blamed.append(seq_id)
            failure = replace(failure, poison=len(deaths) == len(_SAFE) and all(map(by_itself, deaths)))
        return done, rung, failure

    def _descend(
        self,
        seq_id: int,
        job: JobRecord,
        work: Callable[[int], _T],
        batch: Callable[[int], BatchRecord],
        deaths: list[CellDied],
    ) -> tuple[_T | None, Rung, Failure | None]:
        """`attempt`, once; ``deaths`` is given those of the cells."""
        report = None
        for rung in _SAFE:
            chunk = self.client.n_batch if rung is Rung.SAFE else 1
            kept = partial(batch, chunk)
            with Attempt(self._reporter, job, self.client, rung, [seq_id], kept) as tried:
                done = work(chunk)
            if tried.ok:
                return done, rung, None
            deaths += [tried.died] if tried.died else []
            report = tried.report or report
        return None, Rung.TOKEN, Failure(seq_id, tried.problem, report, tried.rc)

    def _no_cell(self, job: JobRecord) -> str:
        """Why no safe cell can be had, or an empty string. A job that was refused one asks no more."""
        if not job.no_cell:
            try:
                self.client.start()
            except CrumplezoneError as error:
                job.no_cell = str(error)
        return job.no_cell
