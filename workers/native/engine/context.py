"""What the engine asks of the cell that it runs in."""

from __future__ import annotations

from typing import Any, Protocol

from crumplezone.sandbox.ipc.flight_recorder import Recorder
from crumplezone.workers.native.model import NativeLogs
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.config import CellInfo


class Context(Protocol):
    """A context of llama.cpp: `crumplezone.workers.native.decode_cell.DecodeCell` is one.

    Attributes:
        context: ``llama_context *``.
        vocab: ``const llama_vocab *``.
        memory: ``llama_memory_t``.
        recorder: Told what native code is called.
        logs: Of llama.cpp.
    """

    context: Any
    vocab: Any
    memory: Any
    recorder: Recorder
    logs: NativeLogs

    def info(self) -> CellInfo:
        """Facts of the model and the context."""

    def run(self, arrays: BatchArrays, begin: int, end: int) -> int:
        """Decode a range of a batch's tokens; the return code."""

    def copy(self, source: int, target: int) -> None:
        """Put a copy of a sequence in the place of another."""
