"""Supervisor side: one llama.cpp cell that is started when it is needed, and typed calls on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone.errors import (
    CellDied,
    CellRefused,
    CrumplezoneError,
    ModelError,
    UsageError,
    check_integer,
)
from crumplezone.reports import text
from crumplezone.reports.schema import BatchRecord, Evidence, Exit, Generating, Report
from crumplezone.sandbox.cell import Cell, CellSpec
from crumplezone.workers.batch import Entry
from crumplezone.workers.flight import Flight
from crumplezone.workers.incident import Reporter
from crumplezone.workers.model import check_file
from crumplezone.workers.protocol import (
    CellConfig,
    CellInfo,
    Decode,
    Decoded,
    Generate,
    Generated,
    Join,
    Tokenize,
    Tokenized,
    batch_shapes,
    row_shapes,
)
from crumplezone.workers.settings import check_number

Column = npt.NDArray[Any] | list[int] | list[bool]

TARGET = "crumplezone.workers.native:LlamaCell"
RC_MEANING = {
    1: "no memory slot for the batch (rc 1)",
    2: "aborted by its callback (rc 2)",
    -1: "llama.cpp calls the batch invalid (rc -1)",
    -2: "allocation failed (rc -2)",
    -3: "computation failed (rc -3)",
}


class RefusedError(Exception):
    """The native call returned a code other than 0; the cell lives."""

    def __init__(self, rc: int) -> None:
        super().__init__(RC_MEANING.get(rc, f"rc {rc}"))
        self.rc = rc


@dataclass(frozen=True)
class Rows:
    """What a call gave back: float32, one row per requested output, or None where not asked."""

    logits: npt.NDArray[np.float32] | None
    embeddings: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class Ask:
    """What is wanted of a decode."""

    logits: bool = True
    embeddings: bool = False
    encode: bool = False


@dataclass(frozen=True)
class Limits:
    """Seconds for one native call, and bytes of resident memory for one cell; None: no limit.

    Raises:
        InputError: One is out of range.
    """

    deadline: float | None
    memory: int | None

    def __post_init__(self) -> None:
        if self.deadline is not None:
            check_number("deadline", self.deadline, 1e-3, 1e7)
        if self.memory is not None:
            check_integer("memory_limit", self.memory, 1, 2**63 - 1)


class Runner:
    """A llama.cpp cell, replaced when it has died.

    Args:
        config: Model and context.
        limits: Of every call and every cell.
        reporter: Where a crash of the loader is reported; None to raise it as it is.
        target: What the cell runs.
    """

    def __init__(
        self, config: CellConfig, limits: Limits, reporter: Reporter | None, target: str = TARGET
    ) -> None:
        self.config, self._limits, self._reporter = config, limits, reporter
        self._target = target
        self._cell: Cell | None = None
        self._info: CellInfo | None = None
        self._flight = Flight(0)
        self._shut = False

    @property
    def pid(self) -> int | None:
        """Process id of the running cell, if there is one."""
        return self._cell.pid if self._cell and self._cell.alive else None

    @property
    def info(self) -> CellInfo:
        """Facts of the model; starts the cell if it never ran."""
        if self._info is None:
            self.start()
        assert self._info is not None
        return self._info

    @property
    def n_batch(self) -> int:
        """Most tokens per native call: llama.cpp clamps n_batch to n_ctx."""
        return min(self.config.n_batch, self.config.n_ctx)

    @property
    def has_encoder(self) -> bool:
        """Whether the model is known to have an encoder."""
        return self._info is not None and self._info.has_encoder

    def start(self) -> Cell:
        """The running cell; a new one if there is none.

        Raises:
            ModelError: The model or the context could not be made.
            CrumplezoneError: The machine has no process or descriptor for it.
            CellDied: The loader crashed, and there is no reporter.
            UsageError: It was shut.
        """
        if self._shut:
            raise UsageError("this decoder is closed: make a new one")
        if self._cell is None or not self._cell.alive:
            check_file(Path(self.config.model))  # it may be gone since the last cell
            spec = CellSpec(self._target, self.config, memory_limit=self._limits.memory)
            try:
                self._cell = Cell(spec)
                self._info = self._cell.info(CellInfo)
            except CellRefused as error:
                if error.kind == "LoadError":
                    raise ModelError(self.config.model, f"llama.cpp cannot load it: {error}") from error
                raise CrumplezoneError(f"the cell did not start: {error.kind}: {error}") from error
            except OSError as error:
                remedy = "free memory, processes or file descriptors"
                raise CrumplezoneError(f"no cell could be started ({error}): {remedy}") from error
            except CellDied as died:
                if self._reporter is None:
                    raise
                raise self._loader_crashed(died, self._reporter) from died
        return self._cell

    def _loader_crashed(self, died: CellDied, reporter: Reporter) -> ModelError:
        result = "the model could not be loaded"
        path = reporter.file_lone(died.incident, "while loading the model", result, self.config, None)
        reporter.flush()
        evidence: Evidence = died.incident.evidence.result()
        what = text.summary(Report("", "", evidence, result=result))
        return ModelError(self.config.model, f"llama.cpp died while loading it. {what} Report: {path}", path)

    def decode(self, entries: Sequence[Entry], ask: Ask, chunk: int = 0) -> Rows:
        """Decode (or encode) sequences from empty memory, in one native call or ``chunk`` tokens a time.

        Raises:
            RefusedError: The return code was not 0.
            CellDied: The cell was lost.
        """
        lengths = [len(entry.tokens) for entry in entries]
        columns = (
            np.concatenate([entry.tokens for entry in entries]),
            np.concatenate([np.arange(length) for length in lengths]),
            np.repeat([entry.seq_id for entry in entries], lengths),
            np.concatenate([entry.outputs for entry in entries]),
        )
        return self.send(columns, ask, chunk)

    def send(self, columns: tuple[Column, Column, Column, Column], ask: Ask, chunk: int = 0) -> Rows:
        """`decode` a batch as it stands, be it valid or not.

        Args:
            columns: Tokens, positions, sequence ids (int32) and outputs (bool), each of shape (n,).
            ask: What is wanted.
            chunk: Tokens per native call; 0: all in one.

        Raises:
            RefusedError: The return code was not 0.
            CellDied: The cell was lost.
        """
        cell, info = self.start(), self.info
        n_tokens, n_outputs = len(columns[0]), int(np.count_nonzero(columns[3]))
        request = Decode(n_tokens, n_outputs, ask.logits, ask.embeddings, ask.encode, chunk)
        arena = cell.arena.arrays([*batch_shapes(n_tokens), *row_shapes(request, info)])
        for room, column in zip(arena, columns, strict=False):
            room[:] = column
        self._check(cell.call(request, Decoded, self._limits.deadline).rc)
        rows = Rows(
            arena[6].reshape(n_outputs, info.n_vocab).copy() if ask.logits else None,
            arena[7].reshape(n_outputs, info.n_embd).copy() if ask.embeddings else None,
        )
        for name, each in (("logits", rows.logits), ("embeddings", rows.embeddings)):
            if each is not None and not (finite := np.isfinite(each).all(axis=1)).all():
                row = int(finite.argmin())
                raise cell.condemn(Exit.NON_FINITE, f"NaN or infinity in the {name} of output {row}")
        return rows

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

    def generate(
        self,
        joins: Sequence[tuple[Join, npt.NDArray[np.int32]]],
        steps: int,
        chunk: int,
        *,
        reset: bool = False,
    ) -> Generated:
        """Run up to ``steps`` native calls over the running sequences and those that join.

        Raises:
            RefusedError: The return code was not 0.
            CellDied: The cell was lost.
        """
        cell = self.start()
        if reset:
            self._flight = Flight(self.info.n_vocab)
        for join, _ in joins:
            self._flight.join(join)
        # Reserved once: both sides cut the same memory, first for the prompts, then for the batch.
        cell.arena.reserve(batch_shapes(chunk))
        for room, (_, tokens) in zip(
            cell.arena.arrays([("i4", j.n_tokens) for j, _ in joins]), joins, strict=True
        ):
            room[:] = tokens
        request = Generate([join for join, _ in joins], steps, chunk, reset)
        try:
            generated = cell.call(request, Generated, self._limits.deadline)
        except CellRefused as refused:
            if refused.kind == "NonFiniteError":
                raise cell.condemn(Exit.NON_FINITE, str(refused)) from refused
            raise
        self._check(generated.rc)
        if problem := self._flight.land(generated, steps * chunk):
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
                Generating(join.seq_id, known.tolist(), join.max_tokens, join.temperature, join.seed)
                for join, known in joins
            ],
        )

    def shut(self) -> None:
        """End the cell for good."""
        self._shut = True
        self.close()

    def close(self) -> None:
        """End the cell; the next call starts a new one."""
        if self._cell is not None:
            self._cell.close()

    def _check(self, rc: int) -> None:
        if rc:
            if rc < -1:  # -2 and -3 leave a context that is not to be trusted
                self.close()
            raise RefusedError(rc)
