"""Supervisor side: one llama.cpp cell that is started when it is needed, and typed calls on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import CellRefused, ContextError, InputError
from crumplezone.reports.records.report import BatchRecord, Exit, Generating
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.batch.call import DecodeOptions, RefusedError, Rows
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.ubatches import split_simple
from crumplezone.workers.cells.progress import ProgressChecker
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.adapters import Adapters
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.arrays import batch_shapes
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.messages import (
    Adapt,
    Adapted,
    Decode,
    Decoded,
    Detokenize,
    Detokenized,
    Generate,
    Generated,
    Join,
    Load,
    MemoryOperation,
    Remembered,
    Resize,
    Save,
    Saved,
    Span,
    Tokenize,
    Tokenized,
    row_shapes,
)

TARGET = "crumplezone.workers.native.decode_cell:DecodeCell"


class DecodeClient:
    """A llama.cpp cell, replaced when it has died.

    Args:
        config: Model and context.
        limits: Of every call and every cell.
        reporter: Where a crash of the loader is reported; None to raise it as it is.
        target: What the cell runs.
        zygote: What forks the cells; None: they are spawned.
        spares: Warm cells in reserve.
    """

    def __init__(
        self,
        config: CellConfig,
        limits: Limits,
        reporter: Reporter | None,
        target: str = TARGET,
        *,
        zygote: Zygote | None = None,
        spares: int = 0,
    ) -> None:
        self.config, self._limits = config, limits
        self._source = CellSource(target, config, limits, reporter, zygote, spares)
        self._cell: Cell | None = None
        self._info: CellInfo | None = None
        self._flight = ProgressChecker(0)

    @property
    def pid(self) -> int | None:
        """Process id of the running cell, if there is one."""
        return self._source.pid

    @property
    def info(self) -> CellInfo:
        """Facts of the model; starts the cell if it never ran."""
        if self._info is None:
            self.start()
        assert self._info is not None
        return self._info

    @property
    def known(self) -> CellInfo | None:
        """Facts of the model, if a cell ever ran."""
        return self._info

    @property
    def n_batch(self) -> int:
        """Most tokens per native call: llama.cpp clamps n_batch to n_ctx."""
        return min(self.config.n_batch, self.config.n_ctx)

    @property
    def cell(self) -> Cell | None:
        """The cell of the latest call, dead or alive."""
        return self._cell

    def foresee(self) -> None:
        """Know the model, from the zygote if it has this configuration, else by starting a cell.

        Raises:
            ModelError, CrumplezoneError, CellDied, UsageError: As `start`.
        """
        self._info = self._source.foresee(CellInfo)

    @property
    def spare_pids(self) -> list[int]:
        """Process ids of the spares."""
        return self._source.spare_pids

    def start(self) -> Cell:
        """The running cell; a new one if there is none, or if it died since the latest call.

        Raises:
            ModelError: The model or the context could not be made.
            CrumplezoneError: The machine has no process or descriptor for it.
            CellDied: The loader crashed, and there is no reporter.
            UsageError: It was shut.
        """
        return self._use(self._source.start())

    def _running(self) -> Cell:
        """As `start`, but in the middle of a job: a cell that died since its latest call is not replaced."""
        return self._use(self._source.running())

    def _use(self, cell: Cell) -> Cell:
        if cell is not self._cell:
            self._cell, self._info = cell, cell.info(CellInfo)
        return cell

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
        cell, info = self._running(), self.info
        n_outputs = int(np.count_nonzero(columns.outputs))
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
        shapes = batch_shapes(request.n_tokens, request.n_seq_ids, request.n_embd)
        arena = cell.arena.arrays([*shapes, *row_shapes(request, info)])
        first = columns.tokens if columns.embd is None else columns.embd.ravel()
        filled = (first, columns.positions, columns.seq_ids, columns.outputs, columns.n_seq_id)
        for room, column in zip(arena, filled, strict=False):
            room[:] = 0 if column is None else column
        decoded = cell.call(request, Decoded, self._limits.deadline)
        self._check(decoded.rc, decoded.spans)
        rows = Rows(
            arena[6].reshape(n_outputs, info.n_vocab).copy() if ask.logits else None,
            arena[7].reshape(n_outputs, info.n_embd).copy() if ask.embeddings else None,
            self._checked(decoded.spans),
        )
        for name, each in (("logits", rows.logits), ("embeddings", rows.embeddings)):
            if each is not None and not (finite := np.isfinite(each).all(axis=1)).all():
                row = int(finite.argmin())
                raise cell.condemn(Exit.NON_FINITE, f"NaN or infinity in the {name} of output {row}")
        return rows

    def operate(self, request: MemoryOperation) -> Remembered:
        """One operation on the memory; its arguments must have been checked.

        Raises:
            CellDied: The cell was lost.
        """
        remembered = self._running().call(request, Remembered, self._limits.deadline)
        self._checked(remembered.spans)
        return remembered

    def save(self, seq_id: int) -> bytes:
        """The state of a sequence.

        Raises:
            CellDied: The cell was lost.
        """
        cell = self._running()
        size = cell.call(Save(seq_id), Saved, self._limits.deadline).size
        if size > cell.arena.room:
            cell.arena.reserve([("u1", size)])
            size = cell.call(Save(seq_id), Saved, self._limits.deadline).size
        if size > cell.arena.room:
            raise cell.condemn(Exit.PROTOCOL, f"the cell says that a state has {size} bytes")
        (state,) = cell.arena.arrays([("u1", size)])
        return state.tobytes()

    def load(self, seq_id: int, state: bytes) -> Remembered:
        """Replace a sequence by a saved state.

        Raises:
            CellDied: The cell was lost.
        """
        cell = self._running()
        (room,) = cell.arena.arrays([("u1", len(state))])
        room[:] = np.frombuffer(state, np.uint8)
        remembered = cell.call(Load(seq_id, len(state)), Remembered, self._limits.deadline)
        self._checked(remembered.spans)
        return remembered

    def resize(self, n_ctx: int, n_seq_max: int) -> None:
        """Make a new, empty context over the loaded model; later cells will have it too.

        Raises:
            ContextError: The context could not be made. The cell is gone.
            CellDied: The cell was lost.
        """
        cell = self._running()
        try:
            self._info = cell.call(Resize(n_ctx, n_seq_max), CellInfo, self._limits.deadline)
        except CellRefused as refused:
            self.close()
            raise ContextError(self.config.model, f"no such context can be made: {refused}") from refused
        self.config = msgspec.structs.replace(self.config, n_ctx=n_ctx, n_seq_max=n_seq_max)
        self._source.renew(self.config)

    def adapt(self, adapters: Adapters) -> None:
        """Set the adapters of the context.

        Raises:
            InputError: One of them is none of this model.
            CellDied: The cell was lost.
        """
        cell = self._running()
        (room,) = cell.arena.arrays([("f4", len(adapters.vector))])
        room[:] = adapters.vector
        paths, scales = [path for path, _ in adapters.lora], [scale for _, scale in adapters.lora]
        request = Adapt(paths, scales, len(adapters.vector), *adapters.layers)
        try:
            cell.call(request, Adapted, self._limits.deadline)
        except CellRefused as refused:
            raise InputError("adapters", paths or "control vector", str(refused)) from refused

    def tokenize(self, prompt: str) -> npt.NDArray[np.int32]:
        """Token ids of a prompt, int32, with the model's special tokens.

        Raises:
            CellDied: The cell was lost.
        """
        cell = self.start()
        raw = prompt.encode("utf-8", "surrogatepass")
        cell.arena.reserve([("i4", len(raw) + 16)])  # the tokens come back in the text's place
        (room,) = cell.arena.arrays([("u1", len(raw))])
        room[:] = np.frombuffer(raw, np.uint8)
        n_tokens = cell.call(Tokenize(len(raw)), Tokenized, self._limits.deadline).n_tokens
        if not 0 <= n_tokens <= len(raw) + 16:
            raise cell.condemn(Exit.PROTOCOL, f"the cell made {n_tokens} tokens of {len(raw)} bytes")
        (tokens,) = cell.arena.arrays([("i4", n_tokens)])
        return tokens.copy()

    def detokenize(self, tokens: Sequence[list[int]]) -> list[str]:
        """The text of each of these lists of tokens, all of which are in the vocabulary.

        Raises:
            CellDied: The cell was lost.
        """
        reply = self._running().call(Detokenize(list(tokens)), Detokenized, self._limits.deadline)
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
        cell = self._running()
        if reset:
            self._flight = ProgressChecker(self.info.n_vocab)
        for seq_id in leaves:
            self._flight.leave(seq_id)
        for join, _ in joins:
            self._flight.join(join)
        request = Generate([join for join, _ in joins], steps, chunk, list(leaves), reset)
        arrays = cell.arena.arrays(request.shapes())
        arrays[4][:] = 0  # `n_seq_id`: no native call was made yet: see `last_batch`
        for room, (_, tokens) in zip(arrays[6:], joins, strict=True):
            room[:] = tokens
        try:
            generated = cell.call(request, Generated, self._limits.deadline)
        except CellRefused as refused:
            if refused.kind == "NonFiniteError":
                raise cell.condemn(Exit.NON_FINITE, str(refused)) from refused
            raise
        self._check(generated.rc)
        if problem := self._flight.land(generated, chunk):
            raise cell.condemn(Exit.PROTOCOL, f"the cell {problem}")
        return generated

    def last_batch(self, chunk: int, joins: Sequence[tuple[Join, npt.NDArray[np.int32]]]) -> BatchRecord:
        """The batch of the last native call of `generate`, as it lies in the arena of a dead cell.

        Args:
            chunk: Most tokens per native call.
            joins: Every sequence in flight, as it would continue from its last delivered token.
        """
        assert self._cell is not None
        tokens, positions, seq_ids, outputs, sent, _ = self._cell.arena.arrays(batch_shapes(chunk))
        n = int(np.count_nonzero(sent == 1))
        return BatchRecord(
            tokens=tokens[:n].tolist(),
            positions=positions[:n].tolist(),
            seq_ids=seq_ids[:n].tolist(),
            outputs=[bool(output) for output in outputs[:n]],
            operation="generate",
            chunk=chunk,
            generating=[
                Generating(join.seq_id, known.tolist(), **dataclasses.asdict(join.sampling))
                for join, known in joins
            ],
        )

    def stocked(self, timeout: float) -> bool:
        """Wait until every spare is there; False if that takes longer (seconds), or none is made any more."""
        return self._source.stocked(timeout)

    def shut(self) -> None:
        """End the cell and its spares for good."""
        self._source.shut()

    def close(self) -> None:
        """End the cell; the next call starts a new one."""
        self._source.close()

    def _check(self, rc: int, spans: Sequence[Span] = ()) -> None:
        if rc:
            if rc < -1:  # -2 and -3 leave a context that is not to be trusted
                self.close()
            raise RefusedError(rc, self._checked(spans))

    def _checked(self, spans: Sequence[Span]) -> Sequence[Span]:
        """What a cell says of its memory, if it can be true."""
        n_seq_max = self.config.n_seq_max
        if any(span.seq_id >= n_seq_max or span.begin > span.last for span in spans):
            assert self._cell is not None
            raise self._cell.condemn(Exit.PROTOCOL, "the cell told of sequences that there cannot be")
        return spans
