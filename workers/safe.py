"""`SafeBatchProcessor`: the slow and careful way to run what the native batch could not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from crumplezone.errors import CellDied, CrumplezoneError, SequenceError
from crumplezone.reports.schema import BatchRecord, Outcome
from crumplezone.reports.store import default_directory
from crumplezone.workers.batch import Batch, Entry, record
from crumplezone.workers.incident import Case, Reporter
from crumplezone.workers.protocol import CellConfig
from crumplezone.workers.results import Result, Rung, SequenceResult
from crumplezone.workers.runner import Ask, Limits, RefusedError, Runner
from crumplezone.workers.settings import configure

_T = TypeVar("_T")


class Descent:
    """The safe rungs of one ladder: split at n_batch, then token by token, each in a cell of their own.

    Args:
        config: Of the native rung; this one has a single sequence of the same length.
        limits: Of every call and cell.
        reporter: Where crashes go.
    """

    def __init__(self, config: CellConfig, limits: Limits, reporter: Reporter) -> None:
        one = msgspec.structs.replace(config, n_seq_max=1, n_ctx=max(1, config.n_ctx // config.n_seq_max))
        self.runner = Runner(one, limits, reporter)
        self._reporter = reporter

    def attempt(
        self, seq_id: int, case: Case, work: Callable[[Runner, int], _T], batch: Callable[[int], BatchRecord]
    ) -> tuple[_T | None, Rung, SequenceError | None]:
        """Try one sequence on each safe rung in turn.

        Args:
            seq_id: The sequence's id for its caller.
            case: The job that this belongs to.
            work: Called with the runner and the most tokens per native call.
            batch: Called with the same number after a crash: what was being decoded.
        """
        if no_cell := self._no_cell(case):
            case.step(Rung.SAFE, Outcome.REFUSED, [seq_id], no_cell)
            return None, Rung.SAFE, SequenceError(seq_id, no_cell)
        problem, report = "", None
        for rung, chunk in ((Rung.SAFE, self.runner.n_batch), (Rung.TOKEN, 1)):
            start = time.perf_counter()
            try:
                done = work(self.runner, chunk)
            except CellDied as died:
                report = self._reporter.add(case, died.incident, rung, batch(chunk), self.runner.config)
                problem, outcome = str(died), Outcome.CRASHED
            except (RefusedError, CrumplezoneError, OSError) as refused:  # also: no second cell could be had
                problem, outcome = str(refused), Outcome.REFUSED
            else:
                case.step(rung, Outcome.OK, [seq_id], ms=(time.perf_counter() - start) * 1000)
                return done, rung, None
            case.step(rung, outcome, [seq_id], problem, (time.perf_counter() - start) * 1000)
        if report:
            case.blamed.append(seq_id)
        return None, Rung.TOKEN, SequenceError(seq_id, problem, report)

    def _no_cell(self, case: Case) -> str:
        """Why no safe cell can be had, or an empty string. A job that was refused one asks no more."""
        if not case.no_cell:
            try:
                self.runner.start()
            except CrumplezoneError as error:
                case.no_cell = str(error)
        return case.no_cell

    def decode(self, entry: Entry, ask: Ask, case: Case) -> SequenceResult:
        """One sequence of a batch. Without an encoder, encoding is decoding, with a row per token."""
        alone = Entry(0, entry.tokens, entry.outputs)
        operation = "encode" if ask.encode and self.runner.has_encoder else "decode"
        ask = Ask(ask.logits, ask.embeddings, encode=operation == "encode")
        rows, rung, error = self.attempt(
            entry.seq_id,
            case,
            lambda runner, chunk: runner.decode([alone], ask, chunk),
            lambda chunk: record([alone], operation, chunk=chunk, embeddings=ask.embeddings),
        )
        return SequenceResult(entry, rows, rung, error)


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
        self._descent = Descent(self._config, limits, self._reporter)

    def decode(self, batch: Batch, *, embeddings: bool = False) -> Result:
        """Decode each sequence from empty memory; a sequence that crashes alone fails alone.

        Raises:
            InputError: A token or length is out of range.
            ModelError: The model could not be loaded.
        """
        info = self._descent.runner.info
        batch.check(info.n_vocab, batch.n_seq_max, info.n_ctx_seq)
        case = Case()
        ask = Ask(embeddings=embeddings)
        sequences = [self._descent.decode(entry, ask, case) for entry in batch.entries]
        done = sum(not each.error for each in sequences)
        case.result = f"{done} of {len(sequences)} sequences decoded one at a time"
        self._reporter.file(case, self._config, info)
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
