"""Supervisor side: a cell with a ``llama_cpp.Llama``, and the values that cross to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from crumplezone.errors import CellDied
from crumplezone.sandbox.ipc import channel
from crumplezone.sandbox.ipc.channel import ProtocolError
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.cells.client import CellClient
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.llama.calls.task import Task
from crumplezone.workers.protocol.config import CTX_PAD, CellConfig, CellInfo
from crumplezone.workers.protocol.llama import (
    STATE_MAX,
    VALUE_MAX,
    Fetch,
    Invoke,
    LlamaCall,
    LlamaConfig,
    LlamaInfo,
    Next,
    Nothing,
    Output,
    Query,
    Restore,
    question_shapes,
)

_BULK = {"scores_bytes", "state_bytes"}  # arrays and states, as large as the context makes them
Answer = Callable[[msgspec.Raw], msgspec.Struct]
Decode = Callable[[bytes], Any]


class LlamaClient(CellClient[LlamaInfo]):
    """Requests to a cell with a ``llama_cpp.Llama``.

    Args:
        source: Where its cells come from.
        llama: What they are made of.
        deadline: Seconds without a sign of life, or None.
        rung: That calls run on here.

    Attributes:
        synced: The running cell holds the tokens that its supervisor knows of.
        current: The task whose iterator it has.
    """

    def __init__(
        self, source: CellSource, llama: LlamaConfig, deadline: float | None, rung: Rung = Rung.NATIVE
    ) -> None:
        super().__init__(source, LlamaInfo, deadline)
        self._llama, self.rung = llama, rung
        self.synced = False
        self.current: Task | None = None

    def _began(self) -> None:
        self.forget()
        info, given = self.info, self._llama.parameters
        assert self._cell is not None
        most = 2 * given["n_ctx"] + LLAMA_MAX_SEQ * CTX_PAD  # llama.cpp rounds it up, for each sequence
        if (given["n_ctx"] and info.n_ctx > most) or info.n_rows > max(info.n_ctx, given["n_batch"]):
            raise self.lie(f"has a context of {info.n_ctx} tokens and {info.n_rows} rows of scores")
        self._cell.reserve(question_shapes(info.cell.n_vocab, info.n_ctx))

    def forget(self) -> None:
        """It is not known what the cell holds."""
        self.synced, self.current = False, None

    @property
    def context(self) -> CellConfig:
        """Of its cells, as reports have it."""
        return self._llama.context(self.known)

    @property
    def model(self) -> CellInfo | None:
        """Facts of the model, if a cell ever ran."""
        return self.known.cell if self.known else None

    def restore(self, state: bytes) -> None:
        """Give the cell a state of the only sequence, for the next `invoke`."""
        self._put(state)
        self._call(Restore(len(state)), Nothing)

    def query(self, call: LlamaCall) -> Output:
        """Run a call that changes nothing, even in the middle of another."""
        return self._call(Query(self._put(msgspec.msgpack.encode(call))), Output)

    def invoke(self, call: LlamaCall, answer: Answer) -> Output:
        """Begin a call; what ran before is ended. ``answer`` is asked its questions."""
        return self._call(Invoke(self._put(msgspec.msgpack.encode(call))), Output, answer)

    def next(self, sent: list[int] | None, answer: Answer) -> Output:
        """The next item of the call that was begun."""
        return self._call(Next(sent), Output, answer)

    def value(self, output: Output, method: str) -> bytes:
        """The value of an output, wherever it is; ``method``: of the call."""
        if not output.size:
            return output.value
        most = STATE_MAX if method in _BULK else VALUE_MAX
        if output.size > most:
            raise self.lie(f"has a value of {output.size} bytes, at most {most}")
        self._believe(output.size, "a value")
        cell = self.running()
        cell.reserve([("u1", output.size)])
        self._call(Fetch(), Nothing)
        return cell.taken(output.size)

    def decode(self, kind: Decode, raw: bytes) -> Any:
        """A value as an object."""
        try:
            return channel.decoded(kind, raw)
        except ProtocolError as error:
            raise self.lie(f"sent what is no result: {error}") from error

    def lie(self, what: str) -> CellDied:
        """The error to raise when the living cell said what cannot be."""
        return self._lie(what)

    def _put(self, raw: bytes) -> int:
        self.running().arrays([("u1", len(raw))])[0][:] = np.frombuffer(raw, np.uint8)
        return len(raw)


def decoded(kind: Any) -> Decode:
    """A decoder of values of a cell, checked against a type."""
    return msgspec.msgpack.Decoder(kind).decode
