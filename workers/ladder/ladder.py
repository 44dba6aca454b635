"""The ladder: the native batch first, then what is slower and safer; every crash on the way is reported."""

from __future__ import annotations

from crumplezone.errors import BatchError
from crumplezone.reports.records.report import Outcome
from crumplezone.workers.batch.call import DecodeOptions
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.results import Result, Rung, SequenceResult, share_out
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.calls import DecodeCall, EncodeCall
from crumplezone.workers.ladder.rungs import SafeRungs
from crumplezone.workers.memory.session import MemorySession


class Ladder:
    """Runs one batch at a time for a `Decoder`.

    Args:
        session: The native cell and its memory.
        safe_rungs: The safe rungs, or None to fail with the native one.
        reporter: Where crashes go.
        preflight: Whether to skip native calls that are known to crash.
    """

    def __init__(
        self, session: MemorySession, safe_rungs: SafeRungs | None, reporter: Reporter, *, preflight: bool
    ) -> None:
        self._session, self._safe_rungs, self._reporter = session, safe_rungs, reporter
        self._preflight = preflight

    def decode(self, columns: Columns, ask: DecodeOptions) -> Result:
        """Append a valid batch to the memory."""
        n_batch = self._session.client.info.n_batch
        note = ""
        if self._preflight and len(columns) > n_batch:
            note = f"the batch has {len(columns)} tokens, n_batch is {n_batch}: GGML_ASSERT would abort"
        return self._run(DecodeCall(self._session, columns, ask), note)

    def encode(self, columns: Columns, ask: DecodeOptions) -> Result:
        """Encode a valid batch from empty memory."""
        client = self._session.client
        note = ""
        if self._preflight and not client.info.has_encoder:
            note = "the model has no encoder: llama_encode would be a SIGSEGV"
        return self._run(EncodeCall(client, columns, ask), note)

    def _run(self, call: DecodeCall | EncodeCall, note: str) -> Result:
        """The native rung, unless a note says why not, and the safe ones if it gave nothing."""
        job, client, rc = JobRecord(), self._session.client, None
        sequences = call.columns.sequences
        if note:
            job.step(Rung.NATIVE, Outcome.SKIPPED, sequences, note)
        else:
            with Attempt(self._reporter, job, client, Rung.NATIVE, sequences, call.record) as tried:
                rows = call.run()
            if tried.ok:
                return Result(share_out(call.columns, rows), [])
            rc = tried.rc
        results = self._climb_down(call, job)
        if self._safe_rungs is None:
            report = self._reporter.written(next(iter(job.reports), None))
            raise BatchError(job.steps[-1].detail, report, rc)
        return Result(results, job.reports, note)

    def _climb_down(self, call: DecodeCall | EncodeCall, job: JobRecord) -> list[SequenceResult]:
        """The safe rungs, if there are any; the job has ended then."""
        results = []
        try:
            if self._safe_rungs is None:
                job.result = "safe_fallback is off: no result"
            else:
                results = self._safe_rungs.each(call, job)
                job.result = _how_it_ended(results)
        finally:
            client, failed = self._session.client, bool(job.blamed) or self._safe_rungs is None
            self._reporter.file(job, client.config, client.info, failed=failed)
        return results


def _how_it_ended(sequences: list[SequenceResult]) -> str:
    rungs = sorted({each.rung for each in sequences if not each.error})
    failed = [each.seq_id for each in sequences if each.error]
    cured = f"cured by the rung {' and '.join(rungs)}" if rungs else "not cured"
    return cured + (f"; sequences {failed} failed alone" if failed else "; every sequence got its result")
