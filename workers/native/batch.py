"""Child side: a ``llama_batch`` over arrays. Only cells import this module."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.workers.protocol.arrays import BatchArrays, batch_shapes

_BATCH = struct.Struct("@i6P")  # struct llama_batch: n_tokens, token, embd, pos, n_seq_id, seq_id, logits
_BUFFER = ctypes.c_char * 0


def address(array: npt.NDArray[Any]) -> int:
    """Where a writable array begins; ``array.ctypes.data`` takes three times as long."""
    return ctypes.addressof(_BUFFER.from_buffer(array.data))


class BatchPacker:
    """Makes the structs. The pointers of the latest batch are kept: mostly the next one has the same."""

    def __init__(self) -> None:
        self._pointed = (0, b""), np.empty(0, np.int64)

    def pack(
        self, arrays: BatchArrays, begin: int, end: int, *, n_embd: int = 0, nulls: Sequence[str] = ()
    ) -> Any:
        """A struct over tokens ``begin`` to ``end``.

        Args:
            arrays: What it points into; its ``pointers`` are filled.
            begin: First token.
            end: The one behind the last.
            n_embd: Not 0: ``tokens`` are vectors of this size.
            nulls: Fields that are NULL, and entries of ``seq_id``, as `Columns.nulls` names them.
        """
        tokens, positions, seq_ids, outputs, n_seq_id, pointers = arrays
        place = address(seq_ids), n_seq_id.tobytes()
        if place != self._pointed[0]:
            counts = np.maximum(n_seq_id, 0)
            self._pointed = place, place[0] + 4 * (counts.cumsum() - counts)
        pointers[:] = self._pointed[1]
        for name in nulls:
            if name.startswith("seq_id["):
                pointers[int(name[7:-1])] = 0

        def at(name: str, array: npt.NDArray[Any], width: int = 1) -> int:
            return 0 if name in nulls else address(array) + array.itemsize * width * begin

        fields = (
            0 if n_embd else at("token", tokens),
            at("embd", tokens, n_embd) if n_embd else 0,
            at("pos", positions),
            at("n_seq_id", n_seq_id),
            at("seq_id", pointers),
            at("logits", outputs),
        )
        return C.llama_batch.from_buffer_copy(_BATCH.pack(end - begin, *fields))


def batch_arrays(n_tokens: int) -> BatchArrays:
    """Arrays for a batch outside the arena: zeros, each token of sequence 0."""
    arrays = BatchArrays(*(np.zeros(size, kind) for kind, size in batch_shapes(n_tokens)))
    arrays.n_seq_id[:] = 1
    return arrays
