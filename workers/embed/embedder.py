"""`Embedder`: a vector for each text; a text that crashes llama.cpp fails alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from crumplezone.errors import (
    CrumplezoneError,
    InputError,
    SequenceError,
    ShortageError,
    check_integer,
    check_texts,
)
from crumplezone.reports.records.report import BatchRecord
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.batch.columns import Columns, Float32, Int32
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.embed.client import EmbedClient
from crumplezone.workers.embed.packing import plan
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.deaths import Deaths
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.record import batch_record
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.protocol.embed import EmbedConfig

_BYTES_MAX = 2**24  # of one text
_TEXTS = 1024  # per request to tokenise
_BYTES = 2**20


class Embeddings:
    """The vectors of texts.

    Attributes:
        errors: The texts that failed alone, by index.
        reports: Directories of the crash reports of this job; complete once `Decoder.close` returns.
    """

    def __init__(self, vectors: Float32, errors: dict[int, SequenceError], reports: list[str]) -> None:
        self._vectors = vectors
        self.errors, self.reports = errors, reports

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._vectors)

    @property
    def vectors(self) -> Float32:
        """All vectors, float32, shape (n, n_embd), in the order of the texts.

        Raises:
            SequenceError: A text failed alone; it is that of the first one. `vector` gives the others.
        """
        if self.errors:
            raise self.errors[min(self.errors)]
        return self._vectors

    def vector(self, index: int) -> Float32:
        """The vector of one text, float32, shape (n_embd,).

        Raises:
            SequenceError: This text failed alone.
            InputError: There is no such text.
        """
        check_integer("index", index, 0, len(self) - 1)
        if index in self.errors:
            raise self.errors[index]
        vector: Float32 = self._vectors[index]
        return vector


class Embedder:
    """Embeds texts in a cell of its own, many whole texts per native call.

    Args:
        config: Model and context of the decoder. Keys and values get no more room here than they have there.
        limits: Of every call and every cell.
        reporter: Where crashes go.
        zygote: What cells are forked from; None to spawn them.
        spares: Warm cells to hold ready.
    """

    def __init__(
        self,
        config: CellConfig,
        limits: Limits,
        reporter: Reporter,
        *,
        zygote: Zygote | None = None,
        spares: int = 0,
    ) -> None:
        self._client = EmbedClient(config, limits, reporter, zygote=zygote, spares=spares)
        self._reporter = reporter

    def embed(
        self, texts: Iterable[str], *, pooling: str | None = None, normalize: bool = True
    ) -> Embeddings:
        """See `Decoder.embed`.

        Raises:
            InputError: A text is no text, or has no or too many tokens; the pooling or the model is none for
                this. No text has been embedded then.
            ModelError: The model cannot be loaded.
        """
        check_texts("texts", texts)
        given = [_utf8(i, text) for i, text in enumerate(texts)]
        self._client.start()
        chosen = self._client.pooling(pooling)
        job = _EmbedJob(self._client, self._reporter, given)
        try:
            job.tokenize()
            cached = self._client.info.cached
            for config, call in plan(job.sizes(), self._client.given, cached=cached, pooling=chosen):
                job.embed(config, call)
        finally:
            if job.errors:
                self._reporter.flush()  # once for all the jobs of this call: see `Reporter.file`
        if normalize:
            norms = np.sqrt(np.einsum("ij,ij->i", job.vectors, job.vectors, dtype=np.float64))
            job.vectors /= np.where(norms > 0, norms, 1)[:, None]
        return Embeddings(job.vectors, job.errors, job.reports)

    @property
    def cell(self) -> Cell | None:
        """The cell of the latest call, dead or alive."""
        return self._client.cell

    @property
    def pid(self) -> int | None:
        """Process id of the running cell, if there is one."""
        return self._client.pid

    @property
    def spare_pids(self) -> list[int]:
        """Process ids of the spares."""
        return self._client.spare_pids

    def close(self) -> None:
        """End the cell for good."""
        self._client.close()


class _EmbedJob:
    """One call of `Embedder.embed`: native calls over many texts, and what they could not do text by text."""

    def __init__(self, client: EmbedClient, reporter: Reporter, texts: list[bytes]) -> None:
        self._client, self._reporter, self._texts = client, reporter, texts
        self._tokens: dict[int, Int32] = {}
        self._no_cell = ""  # why none can be had
        shape = len(texts), client.info.n_embd
        try:
            self.vectors = np.zeros(shape, np.float32)
        except (MemoryError, ValueError) as error:  # n_embd is the cell's
            raise ShortageError(f"vectors for {shape[0]} texts, of {shape[1]} numbers", error) from error
        self.errors: dict[int, SequenceError] = {}
        self.reports: list[str] = []

    def tokenize(self) -> None:
        """Tokenise all texts, as many per request as frames and memory bear."""

        def work(texts: Sequence[int]) -> None:
            self._tokens |= zip(texts, self._client.tokenize([self._texts[i] for i in texts]), strict=True)

        for chunk in self._chunks():
            self._climb_down("tokenised", chunk, work, lambda _: None)

    def sizes(self) -> dict[int, int]:
        """Number of tokens of each text that could be tokenised.

        Raises:
            InputError: There is none, or there are too many to go into one native call.
        """
        longest = self._client.longest
        for i, tokens in self._tokens.items():
            if not 1 <= len(tokens) <= longest:
                limit = f"must be from 1 to {longest}: no text is split (n_batch and n_ctx are the limit)"
                raise InputError(f"number of tokens of texts[{i}]", len(tokens), limit)
        return {i: len(tokens) for i, tokens in self._tokens.items()}

    def embed(self, config: EmbedConfig, texts: list[int]) -> None:
        """One native call, or one for each text if that fails."""

        def work(call: Sequence[int]) -> None:
            self._client.embed(config, self._columns(call), self.vectors, call)

        def kept(call: Sequence[int]) -> BatchRecord:
            return batch_record(self._columns(call), "embed", embeddings=True)

        self._climb_down("embedded", texts, work, kept)

    def _climb_down(
        self,
        done: str,
        texts: list[int],
        work: Callable[[Sequence[int]], None],
        kept: Callable[[Sequence[int]], BatchRecord | None],
    ) -> None:
        """All texts at once; if that fails, each alone."""
        case = JobRecord()
        if self._attempt(Rung.NATIVE, texts, work, kept, case) is None:
            return
        try:
            for i in texts:
                if error := self._attempt(Rung.SAFE, [i], work, kept, case):
                    self.errors[i] = error
            left = len([i for i in texts if i not in self.errors])
            case.result = f"{left} of {len(texts)} texts {done} by the rung {Rung.SAFE}"
        finally:
            self._reporter.file(case, self._client.config, self._client.info)
            self.reports += case.reports

    def _attempt(
        self,
        rung: Rung,
        texts: list[int],
        work: Callable[[Sequence[int]], None],
        kept: Callable[[Sequence[int]], BatchRecord | None],
        case: JobRecord,
    ) -> SequenceError | None:
        """Do it; what went wrong, said of the first text. On the safe rung, again where a cell was killed."""
        deaths, again = Deaths(), True
        while again:
            with Attempt(self._reporter, case, self._client, rung, texts, partial(kept, texts)) as tried:
                self._want_cell()
                work(texts)
            again = rung is Rung.SAFE and tried.died is not None and deaths.again(tried.died)
        if tried.ok:
            return None
        if rung is Rung.NATIVE:  # each is tried alone now, and nobody is to wait for a report
            return SequenceError(texts[0], tried.problem)
        if tried.died:
            case.blamed += texts
        return SequenceError(texts[0], tried.problem, self._reporter.written(tried.report), tried.rc)

    def _want_cell(self) -> None:
        """Raise `CrumplezoneError` if no cell can be had. What was refused once is not asked for again."""
        if not self._no_cell:
            try:
                self._client.start()
            except CrumplezoneError as error:
                self._no_cell = str(error)
        if self._no_cell:
            raise CrumplezoneError(self._no_cell)

    def _columns(self, call: Sequence[int]) -> Columns:
        """Whole texts as a batch: the first is sequence 0."""
        sizes = [len(self._tokens[i]) for i in call]
        n_tokens = sum(sizes)
        return Columns(
            tokens=np.concatenate([self._tokens[i] for i in call]),
            embd=None,
            positions=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            n_seq_id=np.ones(n_tokens, np.int32),
            seq_ids=np.repeat(np.arange(len(call), dtype=np.int32), sizes),
            outputs=np.ones(n_tokens, np.bool_),
        )

    def _chunks(self) -> Iterator[list[int]]:
        chunk, n_bytes = list[int](), 0
        for i, text in enumerate(self._texts):
            if chunk and (len(chunk) == _TEXTS or n_bytes + len(text) > _BYTES):
                yield chunk
                chunk, n_bytes = [], 0
            chunk.append(i)
            n_bytes += len(text)
        if chunk:
            yield chunk


def _utf8(index: int, text: str) -> bytes:
    if not isinstance(text, str):
        raise InputError(f"texts[{index}]", text, "must be a str")
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) > _BYTES_MAX:
        raise InputError(f"bytes of texts[{index}]", len(raw), f"must be at most {_BYTES_MAX}")
    return raw
