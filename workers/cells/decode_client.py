"""Supervisor side: one llama.cpp cell that is started when it is needed, and typed calls on it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import CellRefused, ContextError, InputError
from crumplezone.reports.records.report import BatchRecord, Exit
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.batch.call import DecodeOptions, Rows
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.ubatches import split_simple
from crumplezone.workers.cells.client import CellClient
from crumplezone.workers.cells.progress import ProgressChecker
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.adapters import Adapters
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.observe.observer import Observer
from crumplezone.workers.protocol.arrays import BatchArrays, batch_shapes
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.generate.messages import Generate, Generated, Join
from crumplezone.workers.protocol.generate.records import generating
from crumplezone.workers.protocol.messages import (
    Adapt,
    Adapted,
    Decode,
    Decoded,
    Detokenize,
    Detokenized,
    Load,
    MemoryOperation,
    Remembered,
    Resize,
    Span,
    Tokenize,
    Tokenized,
    row_shapes,
)

_LARGE = 2**28  # bytes of rows that are not simply taken to be there, in the arena and as a copy


class DecodeClient(CellClient[CellInfo]):
    """A llama.cpp cell, replaced when it has died.

    Args:
        config: Model and context.
        limits: Of every call and every cell.
        reporter: Where a crash of the loader is reported; None to raise it as it is.
        zygote: What forks the cells; None: they are spawned.
        spares: Warm cells in reserve.
        owner: What its user calls the thing that it belongs to.
    """

    def __init__(
        self,
        config: CellConfig,
        limits: Limits,
        reporter: Reporter | None,
        *,
        zygote: Zygote | None = None,
        spares: int = 0,
        owner: str = "decoder",
    ) -> None:
        self.config = config
        super().__init__(
            CellSource("decode", config, limits, reporter, zygote, spares, owner=owner),
            CellInfo,
            limits.deadline,
        )
        self._progress = ProgressChecker(0)
        self._observer = reporter.observer if reporter else Observer()

    @property
    def n_batch(self) -> int:
        """Most tokens per native call: llama.cpp clamps n_batch to n_ctx."""
        return min(self.config.n_batch, self.config.n_ctx)

    def send(self, columns: Columns, ask: DecodeOptions, chunk: int = 0, *, fresh: bool = True) -> Rows:
        """Decode (or encode) a batch as it stands, be it valid or not.

        Args:
            columns: The batch.
            ask: What is wanted.
            chunk: Tokens per native call; 0: all in one.
            fresh: Clear the memory first.

        Raises:
            RefusedError: The return code was not 0.
            CellDied: The cell was lost.
        """
        if not 0 < chunk < len(columns):
            return self._send(columns, ask, fresh=fresh)
        parts = []
        for place, piece in enumerate(split_simple(columns, chunk)):
            parts.append(self._send(columns.take(piece), ask, fresh=fresh and place == 0))
        return Rows.joined(parts)

    def _send(self, columns: Columns, ask: DecodeOptions, *, fresh: bool) -> Rows:
        """One native call."""
        cell, info = self.running(), self.info
        n_outputs = int(np.count_nonzero(columns.outputs))
        n_bytes = 4 * n_outputs * (ask.logits * info.n_vocab + ask.embeddings * info.n_embd)
        request = Decode(
            n_tokens=len(columns),
            n_outputs=n_outputs,
            logits=ask.logits,
            embeddings=ask.embeddings,
            encode=ask.encode,
            fresh=fresh,
            n_seq_ids=len(columns.seq_ids),
            n_embd=0 if columns.embd is None else columns.embd.shape[1],
            nulls=sorted(columns.nulls),
            process=ask.process,
        )
        if n_bytes > _LARGE:  # as the cell has it: these are its numbers
            self._believe(n_bytes, "logits or embeddings", in_memory=False)
        shapes = batch_shapes(request.n_tokens, request.n_seq_ids, request.n_embd)
        *batch, logits, embeddings = cell.arrays([*shapes, *row_shapes(request, info)])
        columns.fill(BatchArrays(*batch))
        begin = time.monotonic()
        decoded = self._call(request, Decoded)
        self._observer.called(1, time.monotonic() - begin)
        spans = self._checked(decoded.spans)
        self._check(decoded.rc, spans)
        cell.check_written(n_bytes)
        rows = Rows(
            logits.reshape(n_outputs, info.n_vocab).copy() if ask.logits else None,
            embeddings.reshape(n_outputs, info.n_embd).copy() if ask.embeddings else None,
            spans,
        )
        for name, each in (("logits", rows.logits), ("embeddings", rows.embeddings)):
            if each is not None:
                self._finite(each, f"{name} of output")
        return rows

    def operate(self, request: MemoryOperation) -> Remembered:
        """One operation on the memory; its arguments must have been checked.

        Raises:
            CellDied: The cell was lost.
        """
        remembered = self._call(request, Remembered)
        self._checked(remembered.spans)
        return remembered

    def load(self, seq_id: int, state: bytes) -> Remembered:
        """Replace a sequence by a saved state.

        Raises:
            CellDied: The cell was lost.
        """
        (room,) = self.running().arrays([("u1", len(state))])
        room[:] = np.frombuffer(state, np.uint8)
        remembered = self._call(Load(seq_id, len(state)), Remembered)
        for span in self._checked(remembered.spans):
            # Of each position, a state has the number and how many sequences share it (llama-kv-cache.cpp).
            if span.seq_id == seq_id and 8 * (span.last - span.begin) > len(state):
                raise self._lie(f"found positions up to {span.last} in a state of {len(state)} bytes")
        return remembered

    def resize(self, n_ctx: int, n_seq_max: int) -> None:
        """Make a new, empty context over the loaded model; later cells will have it too.

        Raises:
            ContextError: The context could not be made. The cell is gone.
            CellDied: The cell was lost.
        """
        try:
            self._info = self._call(Resize(n_ctx, n_seq_max), CellInfo)
        except CellRefused as refused:
            self.discard_cell()
            raise ContextError(self.config.model, f"no such context can be made: {refused}") from refused
        self.config = msgspec.structs.replace(self.config, n_ctx=n_ctx, n_seq_max=n_seq_max)
        self._source.renew(self.config)

    def adapt(self, adapters: Adapters) -> None:
        """Set the adapters of the context.

        Raises:
            InputError: One of them is none of this model.
            CellDied: The cell was lost.
        """
        (room,) = self.running().arrays([("f4", len(adapters.vector))])
        room[:] = adapters.vector
        paths, scales = [path for path, _ in adapters.lora], [scale for _, scale in adapters.lora]
        request = Adapt(paths, scales, len(adapters.vector), *adapters.layers)
        try:
            self._call(request, Adapted)
        except CellRefused as refused:
            raise InputError("adapters", paths or "control vector", str(refused)) from refused

    def tokenize(self, prompt: str, *, special: bool = True, begin: bool = True) -> npt.NDArray[np.int32]:
        """Token ids of a prompt, int32.

        Args:
            prompt: The text.
            special: What is written like a special token becomes one.
            begin: With the tokens that the model wants around a text (BOS).

        Raises:
            CellDied: The cell was lost.
        """
        cell = self.start()
        raw = prompt.encode("utf-8", "surrogatepass")
        cell.reserve([("i4", len(raw) + 16)])  # the tokens come back in the text's place
        (room,) = cell.arrays([("u1", len(raw))])
        room[:] = np.frombuffer(raw, np.uint8)
        n_tokens = self._call(Tokenize(len(raw), special, begin), Tokenized).n_tokens
        if not 0 <= n_tokens <= len(raw) + 16:
            raise self._lie(f"made {n_tokens} tokens of {len(raw)} bytes")
        tokens: npt.NDArray[np.int32] = cell.arrays([("i4", n_tokens)])[0].copy()
        if n_tokens and not 0 <= tokens.min() <= tokens.max() < self.info.n_vocab:
            raise self._lie("made tokens that are not in the vocabulary")
        return tokens

    def detokenize(self, tokens: Sequence[list[int]]) -> list[str]:
        """The text of each of these lists of tokens, all of which are in the vocabulary.

        Raises:
            CellDied: The cell was lost.
        """
        reply = self._call(Detokenize(list(tokens)), Detokenized)
        if len(reply.texts) != len(tokens):
            raise self._lie(f"made {len(reply.texts)} texts of {len(tokens)} lists of tokens")
        return [text.decode("utf-8", "replace") for text in reply.texts]

    def generate(
        self,
        joins: Sequence[tuple[Join, npt.NDArray[np.int32]]],
        steps: int,
        chunk: int,
        *,
        leaves: Sequence[int] = (),
        reset: bool = False,
    ) -> Generated:
        """Run up to ``steps`` native calls over the running sequences and those that join.

        It returns earlier when a sequence has got its first token or its last, when the arena of the cell was
        nudged, or when it would else take long.

        Args:
            joins: Prompts, each with its tokens, int32, shape (n_tokens,).
            steps: Most native calls.
            chunk: Most tokens per native call, from 1 to ``n_batch``.
            leaves: Sequences to give up; their places are free for ``joins``.
            reset: Give up all of them, and empty the memory.

        Raises:
            RefusedError: The return code was not 0.
            CellDied: The cell was lost.
        """
        cell = self.running()
        if reset:
            self._progress = ProgressChecker(self.info.n_vocab)
        for seq_id in leaves:
            self._progress.leave(seq_id)
        for join, _ in joins:
            self._progress.join(join)
        request, encoded = Generate.of([join for join, _ in joins], steps, chunk, leaves, reset=reset)
        batch, room, rooms = request.arrays(cell)
        batch.n_seq_id[:] = 0  # no native call was made yet: see `last_batch`
        room[:] = np.frombuffer(encoded, np.uint8)
        for place, (_, tokens) in zip(rooms, joins, strict=True):
            place[:] = tokens
        begin = time.monotonic()
        try:
            generated = self._call(request, Generated)
        except CellRefused as refused:
            if refused.kind == "NonFiniteError":
                raise self._condemn(Exit.NON_FINITE, str(refused)) from refused
            raise
        if generated.calls > steps:
            raise self._lie(f"made {generated.calls} native calls, and was asked for {steps}")
        self._observer.called(generated.calls, time.monotonic() - begin)
        self._check(generated.rc)
        if problem := self._progress.land(generated):
            raise self._lie(problem)
        return generated

    def last_batch(self, chunk: int, joins: Sequence[tuple[Join, npt.NDArray[np.int32]]]) -> BatchRecord:
        """The batch of the last native call of `generate`, as it lies in the arena of a dead cell.

        Args:
            chunk: Most tokens per native call.
            joins: Every sequence in flight, as it would continue from its last delivered token.
        """
        assert self._cell is not None
        batch = BatchArrays(*self._cell.arena.left(batch_shapes(chunk)))
        n = int(np.count_nonzero(batch.n_seq_id == 1))
        return BatchRecord(
            tokens=batch.tokens[:n].tolist(),
            positions=batch.positions[:n].tolist(),
            seq_ids=batch.seq_ids[:n].tolist(),
            outputs=[bool(output) for output in batch.outputs[:n]],
            operation="generate",
            chunk=chunk,
            generating=[generating(join, known) for join, known in joins],
        )

    def _checked(self, spans: Sequence[Span]) -> Sequence[Span]:
        """What a cell says of its memory, if it can be true."""
        n_seq_max = self.config.n_seq_max
        if any(span.seq_id >= n_seq_max or span.begin > span.last for span in spans):
            raise self._lie("told of sequences that there cannot be")
        return spans
