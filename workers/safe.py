"""`SafeBatchProcessor`: the slow and careful way to run what the native batch could not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from crumplezone.errors import CellDied, CrumplezoneError, MemoryLostError, SequenceError
from crumplezone.reports.schema import BatchRecord, Evidence, Exit, Outcome
from crumplezone.reports.store import default_directory
from crumplezone.workers.batch import Batch
from crumplezone.workers.calls import Ask, Limits, RefusedError, Rows
from crumplezone.workers.columns import Columns
from crumplezone.workers.incident import Case, Reporter, record
from crumplezone.workers.journal import Journal
from crumplezone.workers.results import Result, Rung, SequenceResult
from crumplezone.workers.runner import Runner
from crumplezone.workers.settings import capacity, configure
from crumplezone.workers.validate import Memory, validate

KILLS_MAX = 8  # in a row, for one sequence: what is killed that often will be killed again

_T = TypeVar("_T")


def was_killed(died: CellDied) -> bool:
    """Whether somebody else killed a cell: that says nothing of its work. Waits for the autopsy."""
    evidence: Evidence = died.incident.evidence.result()
    return evidence.exit == Exit.KILLED


class Descent:
    """The safe rungs of a ladder: one sequence at a time, split at n_batch, then token by token.

    Args:
        runner: The cell, a new one after each crash.
        reporter: Where crashes go.
    """

    def __init__(self, runner: Runner, reporter: Reporter) -> None:
        self.runner = runner
        self._reporter = reporter

    def attempt(
        self, seq_id: int, case: Case, work: Callable[[int], _T], batch: Callable[[int], BatchRecord]
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
        case: Case,
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

    def _no_cell(self, case: Case) -> str:
        """Why no safe cell can be had, or an empty string. A job that was refused one asks no more."""
        if not case.no_cell:
            try:
                self.runner.start()
            except CrumplezoneError as error:
                case.no_cell = str(error)
        return case.no_cell

    def decode(self, columns: Columns, ask: Ask, case: Case) -> list[SequenceResult]:
        """Each sequence from empty memory. Without an encoder, encoding is decoding, with a row per token."""
        operation = "encode" if ask.encode and self.runner.info.has_encoder else "decode"
        ask = Ask(ask.logits, ask.embeddings, encode=operation == "encode")

        def send(alone: Columns, chunk: int) -> Rows:
            return self.runner.send(alone, ask, chunk)

        return self.each(columns, ask, case, operation, send)

    def each(
        self,
        columns: Columns,
        ask: Ask,
        case: Case,
        operation: str,
        send: Callable[[Columns, int], Rows],
        journal: Journal | None = None,
    ) -> list[SequenceResult]:
        """Give the sequences of a batch to ``send``, one by one, with the most tokens per native call."""

        def one(seq_id: int) -> SequenceResult:
            alone = columns.alone(seq_id)

            def kept(chunk: int) -> BatchRecord:
                return record(alone, operation, chunk=chunk, embeddings=ask.embeddings, journal=journal)

            rows, rung, error = self.attempt(seq_id, case, lambda chunk: send(alone, chunk), kept)
            return SequenceResult(seq_id, alone.positions[alone.outputs], rows, rung, error)

        return [one(seq_id) for seq_id in columns.sequences]


class SafeBatchProcessor:
    """Decode batches one sequence at a time in a supervised cell. Also the second rung of `Decoder`.

    Args:
        model: Path of a GGUF file.
        n_ctx: Tokens of context for a sequence; 0 for 1024.
        n_batch: Most tokens per native call.
        n_threads: Threads of the cell; 0 for one per available core.
        deadline: Seconds until a native call counts as hung, or None.
        reports: The report store; None for the default place.
        redact: Keep token ids, prompt text and paths out of the reports.

    Raises:
        InputError: A parameter is out of range.
        ModelError: The file cannot be a model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        n_ctx: int = 1024,
        n_batch: int = 2048,
        n_threads: int = 2,
        deadline: float | None = 300.0,
        reports: str | Path | None = None,
        redact: bool = False,
    ) -> None:
        self._config = configure(model, n_ctx=n_ctx, n_batch=n_batch, n_threads=n_threads)
        limits = Limits(deadline, None)
        self._reporter = Reporter(Path(reports) if reports else default_directory(), redacted=redact)
        self._descent = Descent(Runner(self._config, limits, self._reporter), self._reporter)

    def decode(self, batch: Batch, *, embeddings: bool = False) -> Result:
        """Decode each sequence from empty memory; a sequence that crashes alone fails alone.

        Raises:
            InputError: A token or length is out of range.
            ModelError: The model could not be loaded.
        """
        runner = self._descent.runner
        columns, ask = batch.columns(), Ask(embeddings=embeddings)
        # A cell of one sequence takes them in turn, each by itself.
        limits = msgspec.structs.replace(runner.config, n_seq_max=batch.n_seq_max)
        validate(columns, capacity(runner.info, limits, embeddings=embeddings), Memory.empty(batch.n_seq_max))
        case = Case()

        def send(alone: Columns, chunk: int) -> Rows:
            return runner.send(alone.renamed(0), ask, chunk)

        sequences = self._descent.each(columns, ask, case, "decode", send)
        done = sum(not each.error for each in sequences)
        case.result = f"{done} of {len(sequences)} sequences decoded one at a time"
        self._reporter.file(case, self._config, runner.info)
        return Result(sequences, case.reports)

    def close(self) -> None:
        """End the cell and finish the reports."""
        self._descent.runner.shut()
        self._reporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
