"""The ladder: the native batch first, then what is slower and safer; every crash on the way is reported."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from crumplezone.errors import BatchError, CellDied, CrumplezoneError, InputError, MemoryLostError
from crumplezone.reports.records.report import BatchRecord, Outcome
from crumplezone.workers.batch.call import DecodeOptions, RefusedError, Rows
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.results import Result, Rung, SequenceResult, share_out
from crumplezone.workers.batch.ubatches import split_equal, split_seq, split_simple
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.record import batch_record
from crumplezone.workers.ladder.rungs import SafeRungs
from crumplezone.workers.memory.session import MemorySession


class Ladder:
    """Runs one batch at a time for a `Decoder`.

    Args:
        session: The native cell and its memory.
        descent: The safe rungs, or None to fail with the native one.
        reporter: Where crashes go.
        preflight: Whether to skip native calls that are known to crash.
    """

    def __init__(
        self, session: MemorySession, descent: SafeRungs | None, reporter: Reporter, *, preflight: bool
    ) -> None:
        self._session, self._descent, self._reporter = session, descent, reporter
        self._preflight = preflight

    def decode(self, columns: Columns, ask: DecodeOptions) -> Result:
        """Append a valid batch to the memory."""
        case, journal = JobRecord(), self._session.journal
        n_batch = self._session.runner.info.n_batch
        note = ""
        if self._preflight and len(columns) > n_batch:
            note = f"the batch has {len(columns)} tokens, n_batch is {n_batch}: GGML_ASSERT would abort"

        def native() -> Rows:
            return self._session.decode(columns, ask)

        def send(alone: Columns, chunk: int) -> Rows:
            return self._session.decode(alone, ask, chunk)

        def kept() -> BatchRecord:
            batch = batch_record(columns, "decode", embeddings=ask.embeddings, journal=journal)
            return msgspec.structs.replace(batch, passes=self._passes(columns, ask))

        def safely(descent: SafeRungs) -> list[SequenceResult]:
            return descent.each(columns, ask, case, "decode", send, journal)

        return self._climb_down(columns, case, note, native, kept, safely)

    def encode(self, columns: Columns, ask: DecodeOptions) -> Result:
        """Encode a valid batch from empty memory."""
        case, info = JobRecord(), self._session.runner.info
        note = ""
        if self._preflight and not info.has_encoder:
            note = "the model has no encoder: llama_encode would be a SIGSEGV"

        def native() -> Rows:
            return self._session.runner.send(columns, ask)

        def kept() -> BatchRecord:
            return batch_record(columns, "encode", embeddings=True)

        def safely(descent: SafeRungs) -> list[SequenceResult]:
            return descent.decode(columns, ask, case)

        return self._climb_down(columns, case, note, native, kept, safely)

    def _climb_down(
        self,
        columns: Columns,
        case: JobRecord,
        note: str,
        native: Callable[[], Rows],
        kept: Callable[[], BatchRecord],
        safely: Callable[[SafeRungs], list[SequenceResult]],
    ) -> Result:
        """The native rung, unless a note says why not, and the safe ones if it gave nothing."""
        rows = None if note else self._try_native(columns, native, kept, case)
        if rows is not None:
            return Result(share_out(columns, rows), [])
        return self._descend(columns, safely, case, note)

    def _passes(self, columns: Columns, ask: DecodeOptions) -> list[int]:
        """How many tokens each compute pass of the native call had."""
        config, info = self._session.runner.config, self._session.runner.info
        try:
            if info.recurrent and ask.embeddings:
                pieces = split_seq(columns, config.n_ubatch)
            elif info.recurrent or config.n_seq_max > 1:
                pieces = split_equal(columns, config.n_ubatch, sequential=not info.recurrent)
            else:
                pieces = split_simple(columns, config.n_ubatch)
        except InputError:  # llama.cpp would have returned 1
            return []
        return [len(piece) for piece in pieces]

    def _try_native(
        self, columns: Columns, native: Callable[[], Rows], kept: Callable[[], BatchRecord], case: JobRecord
    ) -> Rows | None:
        start = time.perf_counter()
        try:
            return native()
        except MemoryLostError:
            raise
        except CellDied as died:
            runner = self._session.runner
            self._reporter.add(case, died.incident, Rung.NATIVE, kept(), runner.config, runner.known)
            outcome, problem = Outcome.CRASHED, str(died)
        except (RefusedError, CrumplezoneError, OSError) as refused:  # also: no cell could be had
            outcome, problem = Outcome.REFUSED, str(refused)
            case.rc = getattr(refused, "rc", None)
        case.step(Rung.NATIVE, outcome, columns.sequences, problem, (time.perf_counter() - start) * 1000)
        return None

    def _descend(
        self,
        columns: Columns,
        safely: Callable[[SafeRungs], list[SequenceResult]],
        case: JobRecord,
        note: str,
    ) -> Result:
        if note:
            case.step(Rung.NATIVE, Outcome.SKIPPED, columns.sequences, note)
        sequences = []
        try:
            if self._descent is None:
                case.result = "safe_fallback is off: no result"
            else:
                sequences = safely(self._descent)
                case.result = _how_it_ended(sequences)
        finally:
            self._reporter.file(case, self._session.runner.config, self._session.runner.info)
        reports = case.reports
        if case.blamed or self._descent is None:
            self._reporter.flush()  # an error that names a report comes after it
        if self._descent is None:
            raise BatchError(note or case.steps[-1].detail, reports[0] if reports else None, case.rc)
        return Result(sequences, reports, note)


def _how_it_ended(sequences: list[SequenceResult]) -> str:
    rungs = sorted({each.rung for each in sequences if not each.error})
    failed = [each.seq_id for each in sequences if each.error]
    cured = f"cured by the rung {' and '.join(rungs)}" if rungs else "not cured"
    return cured + (f"; sequences {failed} failed alone" if failed else "; every sequence got its result")
