"""`SafeBatchProcessor`: batches, one sequence at a time, in a supervised cell."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from crumplezone.reports.store.store import directory_of
from crumplezone.workers.batch.batch import Batch
from crumplezone.workers.batch.call import DecodeOptions
from crumplezone.workers.batch.results import Result
from crumplezone.workers.batch.validate import MemoryState, validate
from crumplezone.workers.cells.factory import Cells, Start
from crumplezone.workers.cells.turn import Turn, in_turn
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.calls import SingleCall
from crumplezone.workers.ladder.rungs import SafeRungs
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import capacity, configure


class SafeBatchProcessor:
    """Decode batches one sequence at a time in a supervised cell. Also the second rung of `Decoder`.

    Calls are serialised: several threads may use one.

    Args:
        model: Path of a GGUF file.
        n_ctx: Tokens of context for a sequence; 0 for 1024.
        n_batch: Most tokens per native call.
        n_threads: Threads of the cell; 0 for one per available core.
        deadline: Seconds until a native call counts as hung, or None.
        reports: The report store; None for the default place.
        redact: Keep token ids, prompt text and paths out of the reports.
        start: How cells are started: "zygote" (forked from a process that has loaded the model), "spawn"
            (each loads it), or "auto": forked where that is safe.
        spares: Warm cells that wait to take over from one that dies. None: 1, or 0 if each would load the
            model again.

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
        start: Start = "auto",
        spares: int | None = None,
    ) -> None:
        self._turn = Turn("SafeBatchProcessor")
        self._config = configure(model, n_ctx=n_ctx, n_batch=n_batch, n_threads=n_threads)
        self._reporter = Reporter(directory_of(reports), redacted=redact)
        self._cells = Cells.of(self._config, Limits(deadline, None), self._reporter, start, spares)
        self._safe_rungs = SafeRungs(
            self._cells.decode_client(self._config, "SafeBatchProcessor"), self._reporter
        )

    @in_turn
    def decode(self, batch: Batch, *, embeddings: bool = False) -> Result:
        """Decode each sequence from empty memory; a sequence that crashes alone fails alone.

        Raises:
            InputError: A token or length is out of range.
            ModelError: The model could not be loaded.
            UsageError: It is closed, or this thread is in the middle of another call.
        """
        return self._decode(batch, embeddings=embeddings)

    def _decode(self, batch: Batch, *, embeddings: bool) -> Result:
        client = self._safe_rungs.client
        columns, ask = batch.columns(), DecodeOptions(embeddings=embeddings)
        # A cell of one sequence takes them in turn, each by itself.
        limits = msgspec.structs.replace(client.config, n_seq_max=batch.n_seq_max)
        validate(
            columns, capacity(client.info, limits, embeddings=embeddings), MemoryState.empty(batch.n_seq_max)
        )
        job = JobRecord()
        sequences = self._safe_rungs.each(SingleCall(client, columns, ask), job)
        done = sum(not each.error for each in sequences)
        job.result = f"{done} of {len(sequences)} sequences decoded one at a time"
        self._reporter.file(job, self._config, client.info, failed=bool(job.blamed))
        return Result(sequences, job.reports)

    def close(self) -> None:
        """End the cell and finish the reports. Idempotent, and from within a call as `Decoder.close`."""
        self._turn.close(self._release)

    def _release(self) -> None:
        with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
            stack.callback(self._cells.close)  # it reaps those that are being examined
            stack.callback(self._reporter.close)
            stack.callback(self._safe_rungs.client.close)
            stack.callback(self._cells.stop)  # before its cells are reaped, which it might not answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
