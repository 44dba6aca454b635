"""`SafeBatchProcessor`: the slow and careful way to run what the native batch could not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from crumplezone.errors import CellDied, CrumplezoneError, MemoryLostError, SequenceError
from crumplezone.reports.records.report import BatchRecord, Evidence, Exit, Outcome
from crumplezone.workers.batch.call import DecodeOptions, RefusedError, Rows
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.results import Rung, SequenceResult
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.record import batch_record
from crumplezone.workers.memory.journal import Journal

KILLS_MAX = 8  # in a row, for one sequence: what is killed that often will be killed again

_T = TypeVar("_T")


def was_killed(died: CellDied) -> bool:
    """Whether somebody else killed a cell: that says nothing of its work. Waits for the autopsy."""
    evidence: Evidence = died.incident.evidence.result()
    return evidence.exit == Exit.KILLED


class SafeRungs:
    """The safe rungs of a ladder: one sequence at a time, split at n_batch, then token by token.

    Args:
        runner: The cell, a new one after each crash.
        reporter: Where crashes go.
    """

    def __init__(self, runner: DecodeClient, reporter: Reporter) -> None:
        self.runner = runner
        self._reporter = reporter

    def attempt(
        self, seq_id: int, case: JobRecord, work: Callable[[int], _T], batch: Callable[[int], BatchRecord]
    ) -> tuple[_T | None, Rung, SequenceError | None]:
        """Try one sequence on each safe rung in turn, and again if it failed where cells were killed.

        Args:
            seq_id: The sequence's id for its caller.
            case: The job that this belongs to.
            work: Called with the most tokens per native call.
            batch: Called with the same number after a crash: what was being decoded.
        """
        if no_cell := self._no_cell(case):
            case.step(Rung.SAFE, Outcome.REFUSED, [seq_id], no_cell)
            return None, Rung.SAFE, SequenceError(seq_id, no_cell)
        for _ in range(KILLS_MAX):
            deaths: list[CellDied] = []
            done, rung, error = self._descend(seq_id, case, work, batch, deaths)
            # Asked only of one that failed: until then, autopsies run beside the work.
            if error is None or not any(was_killed(died) for died in deaths):
                break
        if error and error.report:
            case.blamed.append(seq_id)
        return done, rung, error

    def _descend(
        self,
        seq_id: int,
        case: JobRecord,
        work: Callable[[int], _T],
        batch: Callable[[int], BatchRecord],
        deaths: list[CellDied],
    ) -> tuple[_T | None, Rung, SequenceError | None]:
        """`attempt`, once; ``deaths`` is given those of the cells."""
        problem, report, rc = "", None, None
        for rung, chunk in ((Rung.SAFE, self.runner.n_batch), (Rung.TOKEN, 1)):
            start = time.perf_counter()
            try:
                done = work(chunk)
            except CellDied as died:
                deaths.append(died)
                config, info = self.runner.config, self.runner.known
                report = self._reporter.add(case, died.incident, rung, batch(chunk), config, info)
                problem, outcome, rc = str(died), Outcome.CRASHED, None
            except MemoryLostError:  # there is nothing left to append to
                raise
            except (RefusedError, CrumplezoneError, OSError) as refused:  # also: no cell could be had
                problem, outcome, rc = str(refused), Outcome.REFUSED, getattr(refused, "rc", None)
            else:
                case.step(rung, Outcome.OK, [seq_id], ms=(time.perf_counter() - start) * 1000)
                return done, rung, None
            case.step(rung, outcome, [seq_id], problem, (time.perf_counter() - start) * 1000)
        return None, Rung.TOKEN, SequenceError(seq_id, problem, report, rc)

    def _no_cell(self, case: JobRecord) -> str:
        """Why no safe cell can be had, or an empty string. A job that was refused one asks no more."""
        if not case.no_cell:
            try:
                self.runner.start()
            except CrumplezoneError as error:
                case.no_cell = str(error)
        return case.no_cell

    def decode(self, columns: Columns, ask: DecodeOptions, case: JobRecord) -> list[SequenceResult]:
        """Each sequence from empty memory. Without an encoder, encoding is decoding, with a row per token."""
        operation = "encode" if ask.encode and self.runner.info.has_encoder else "decode"
        ask = DecodeOptions(ask.logits, ask.embeddings, encode=operation == "encode")

        def send(alone: Columns, chunk: int) -> Rows:
            return self.runner.send(alone, ask, chunk)

        return self.each(columns, ask, case, operation, send)

    def each(
        self,
        columns: Columns,
        ask: DecodeOptions,
        case: JobRecord,
        operation: str,
        send: Callable[[Columns, int], Rows],
        journal: Journal | None = None,
    ) -> list[SequenceResult]:
        """Give the sequences of a batch to ``send``, one by one, with the most tokens per native call."""

        def one(seq_id: int) -> SequenceResult:
            alone = columns.alone(seq_id)

            def kept(chunk: int) -> BatchRecord:
                return batch_record(alone, operation, chunk=chunk, embeddings=ask.embeddings, journal=journal)

            rows, rung, error = self.attempt(seq_id, case, lambda chunk: send(alone, chunk), kept)
            return SequenceResult(seq_id, alone.positions[alone.outputs], rows, rung, error)

        return [one(seq_id) for seq_id in columns.sequences]
