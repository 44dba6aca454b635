"""`Decoder`: the front of the package. Batches and prompts go in, results come out, crashes do not."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from crumplezone.errors import (
    BatchError,
    CellDied,
    CrumplezoneError,
    InputError,
    UsageError,
    check_integer,
)
from crumplezone.reports.schema import Outcome
from crumplezone.reports.store import default_directory
from crumplezone.workers.batch import Batch, Entry, record
from crumplezone.workers.generation import Generation
from crumplezone.workers.incident import Case, Reporter
from crumplezone.workers.protocol import CellInfo
from crumplezone.workers.results import Completion, Result, Rung, Sampling, SequenceResult
from crumplezone.workers.runner import Ask, Limits, RefusedError, Rows, Runner
from crumplezone.workers.safe import Descent
from crumplezone.workers.settings import INT32_MAX, N_UBATCH, check_number, configure


class Decoder:
    """Native batch decoding in a supervised cell, with a safe fallback and crash reports.

    Calls are serialised: several threads may use one decoder. Close it, or use it as a context manager.

    Args:
        model: Path of a GGUF file.
        n_ctx: Tokens of context over all sequences; 0 for 1024 per sequence. Divided evenly.
        n_batch: Most tokens per native call, at least ``n_seq_max``.
        n_ubatch: Most tokens per compute pass.
        n_seq_max: Most sequences per batch, up to 256.
        n_threads: Threads of a cell; 0 for one per available core.
        n_gpu_layers: Layers to offload.
        safe_fallback: Whether a job that the native rung cannot do goes down the ladder.
        preflight: Whether to skip native calls that are known to crash.
        deadline: Seconds until a native call counts as hung, or None.
        memory_limit: Bytes of resident memory above which a cell is killed, or None.
        reports: The report store; None for ``$CRUMPLEZONE_REPORTS`` or the XDG state directory.
        redact: Keep token ids, prompt text and paths out of the reports (hashes and base names instead).

    Raises:
        ModelError: The model cannot be loaded.
        InputError: A parameter is out of range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        n_ctx: int = 0,
        n_batch: int = 2048,
        n_ubatch: int = N_UBATCH,
        n_seq_max: int = 4,
        n_threads: int = 0,
        n_gpu_layers: int = 0,
        safe_fallback: bool = True,
        preflight: bool = True,
        deadline: float | None = 300.0,
        memory_limit: int | None = None,
        reports: str | Path | None = None,
        redact: bool = False,
    ) -> None:
        config = configure(
            model,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
        )
        limits = Limits(deadline, memory_limit)
        self._owner = os.getpid()
        self._busy = threading.Lock()
        self._busy_thread = 0
        self._closed = False
        self._running: Generator[Completion, None, None] | None = None
        self._preflight_on = preflight
        self._reporter = Reporter(Path(reports) if reports else default_directory(), redacted=redact)
        self._native = Runner(config, limits, self._reporter)
        self._descent = Descent(config, limits, self._reporter) if safe_fallback else None
        self._native.start()

    @property
    def info(self) -> CellInfo:
        """Facts of the model and the context: n_vocab, n_embd, n_ctx_seq, has_encoder, ..."""
        return self._native.info

    @property
    def pid(self) -> int | None:
        """Process id of the native cell, or None while there is none."""
        return self._native.pid

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a text, int32, shape (n,), with the model's special tokens.

        Raises:
            CellDied: The tokenizer crashed.
            ModelError: The cell had died and the model cannot be loaded again.
        """
        with self._turn():
            try:
                return self._native.tokenize(text)
            except CellDied as died:
                config, info = self._native.config, self._native.info
                self._reporter.file_lone(died.incident, "tokenize", "the tokenizer failed", config, info)
                raise

    def decode(self, batch: Batch, *, embeddings: bool = False) -> Result:
        """Decode every sequence of a batch from empty memory.

        Args:
            batch: The sequences; logits are returned for the tokens marked as output.
            embeddings: Also return the hidden states of those tokens.

        Raises:
            InputError: The batch does not fit the model or the context.
            BatchError: The native rung failed and ``safe_fallback`` is off.
        """
        return self._run(batch, Ask(embeddings=embeddings))

    def encode(self, batch: Batch) -> Result:
        """Hidden states of every token of a batch, from `llama_encode` if the model has an encoder.

        On a decoder-only model `llama_encode` is a SIGSEGV inside llama.cpp (seen in 0.3.16 and 0.3.36);
        preflight knows it and goes straight to the safe rung, which decodes sequence by sequence.

        Raises:
            InputError: The batch does not fit the model or the context.
            BatchError: The native rung failed and ``safe_fallback`` is off.
        """
        return self._run(batch, Ask(logits=False, embeddings=True, encode=True))

    def generate(
        self,
        prompts: Iterable[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        ordered: bool = True,
    ) -> Iterator[Completion]:
        """Complete prompts, ``n_seq_max`` at a time; a place that falls free is taken by the next prompt.

        Args:
            prompts: Texts, none of them empty.
            max_tokens: Most tokens to add to each.
            temperature: 0 is greedy.
            seed: For temperatures above 0: the same seed gives the same text, crash or no crash.
            ordered: Yield in the order of the prompts, else as they finish.

        Yields:
            One `Completion` per prompt. What fails alone has its ``error`` set.

        Raises:
            InputError: A prompt is no text or empty, or a parameter is out of range.
        """
        if isinstance(prompts, str | bytes):
            raise InputError("prompts", prompts, "must be a list of texts, not one text")
        finished = self.complete(dict(enumerate(prompts)), Sampling(max_tokens, temperature, seed))
        return _in_order(finished) if ordered else finished

    def complete(self, prompts: Mapping[int, str], sampling: Sampling) -> Generator[Completion, None, None]:
        """`generate` for prompts that keep numbers of their own; yields as they finish.

        Raises:
            InputError: A prompt is no text or empty, or a parameter is out of range.
        """
        check_integer("max_tokens", sampling.max_tokens, 1, INT32_MAX)
        check_number("temperature", sampling.temperature, 0, 100)
        check_integer("seed", sampling.seed, 0, 2**63 - 1)
        for index, prompt in prompts.items():
            if not isinstance(prompt, str) or not prompt:
                raise InputError(f"prompts[{index}]", prompt, "must be a text of at least one character")
        return self._completions(prompts, sampling)

    def _completions(
        self, prompts: Mapping[int, str], sampling: Sampling
    ) -> Generator[Completion, None, None]:
        with self._turn():
            generation = Generation(self._native, self._descent, self._reporter, sampling)
            self._running = generation.run(list(prompts.items()))
            try:
                yield from self._running
            finally:
                self._running = None

    def flush_reports(self) -> None:
        """Wait until the reports of all crashes so far are on disk."""
        self._reporter.flush()

    def close(self) -> None:
        """End the cells and finish the reports. Waits for a call of another thread. Idempotent."""
        if os.getpid() != self._owner:
            return
        mine = self._busy_thread == threading.get_ident()  # a generate() of this thread, suspended
        with contextlib.nullcontext() if mine else self._busy:
            if self._closed:
                return
            self._closed = True
            if self._running is not None:
                self._running.close()  # it still has reports to file
            self._native.shut()
            if self._descent:
                self._descent.runner.shut()
            self._reporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if os.getpid() != self._owner:
            raise UsageError("this decoder was made before a fork: make a new one in this process")
        if self._busy_thread == threading.get_ident():
            raise UsageError("a generate() of this thread is still running: finish it or close() it first")
        with self._busy:
            if self._closed:
                raise UsageError("this decoder is closed: make a new one")
            self._busy_thread = threading.get_ident()
            try:
                yield
            finally:
                self._busy_thread = 0

    def _run(self, batch: Batch, ask: Ask) -> Result:
        with self._turn():
            info = self._native.info
            batch.check(info.n_vocab, self._native.config.n_seq_max, info.n_ctx_seq)
            entries = batch.entries
            if ask.encode:  # every token has a hidden state
                entries = [Entry(e.seq_id, e.tokens, np.ones(len(e.tokens), np.bool_)) for e in entries]
            case = Case()
            note = self._preflight(batch, ask) if self._preflight_on else ""
            rows = None if note else self._try_native(entries, ask, case)
            if rows is not None:
                return Result(_share_out(entries, rows), [])
            return self._descend(entries, ask, case, note)

    def _preflight(self, batch: Batch, ask: Ask) -> str:
        """Why the native call would certainly crash, or an empty string."""
        info = self._native.info
        if ask.encode and not info.has_encoder:
            return "the model has no encoder: llama_encode would be a SIGSEGV"
        if len(batch) > info.n_batch:
            return f"the batch has {len(batch)} tokens, n_batch is {info.n_batch}: GGML_ASSERT would abort"
        return ""

    def _try_native(self, entries: list[Entry], ask: Ask, case: Case) -> Rows | None:
        seq_ids = [entry.seq_id for entry in entries]
        start = time.perf_counter()
        try:
            return self._native.decode(entries, ask)
        except CellDied as died:
            operation = "encode" if ask.encode else "decode"
            batch = record(entries, operation, embeddings=ask.embeddings)
            self._reporter.add(case, died.incident, Rung.NATIVE, batch)
            outcome, problem = Outcome.CRASHED, str(died)
        except (RefusedError, CrumplezoneError, OSError) as refused:  # also: no cell could be had
            outcome, problem = Outcome.REFUSED, str(refused)
        case.step(Rung.NATIVE, outcome, seq_ids, problem, (time.perf_counter() - start) * 1000)
        return None

    def _descend(self, entries: list[Entry], ask: Ask, case: Case, note: str) -> Result:
        if note:
            case.step(Rung.NATIVE, Outcome.SKIPPED, [entry.seq_id for entry in entries], note)
        sequences = []
        try:
            if self._descent is None:
                case.result = "safe_fallback is off: no result"
            else:
                sequences = [self._descent.decode(entry, ask, case) for entry in entries]
                case.result = _how_it_ended(sequences)
        finally:
            self._reporter.file(case, self._native.config, self._native.info)
        reports = case.reports
        if case.blamed or self._descent is None:
            self._reporter.flush()  # an error that names a report comes after it
        if self._descent is None:
            raise BatchError(note or case.steps[-1].detail, reports[0] if reports else None)
        return Result(sequences, reports, note)


def _in_order(finished: Iterator[Completion]) -> Iterator[Completion]:
    waiting: dict[int, Completion] = {}
    due = 0
    for completion in finished:
        waiting[completion.index] = completion
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _share_out(entries: list[Entry], rows: Rows) -> list[SequenceResult]:
    """Cut the rows of a whole batch into those of its sequences (views of one array)."""
    results, row = [], 0
    for entry in entries:
        end = row + int(entry.outputs.sum())
        cut = Rows(*(None if each is None else each[row:end] for each in (rows.logits, rows.embeddings)))
        results.append(SequenceResult(entry, cut, Rung.NATIVE))
        row = end
    return results


def _how_it_ended(sequences: list[SequenceResult]) -> str:
    rungs = sorted({each.rung for each in sequences if not each.error})
    failed = [each.entry.seq_id for each in sequences if each.error]
    cured = f"cured by the rung {' and '.join(rungs)}" if rungs else "not cured"
    return cured + (f"; sequences {failed} failed alone" if failed else "; every sequence got its result")
