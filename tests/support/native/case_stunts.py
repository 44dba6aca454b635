"""llama.cpp cells that are wrong about batches, or lack what an older llama.cpp lacks."""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np

from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.native.decode_cell import DecodeCell
from crumplezone.workers.protocol.arrays import BatchArrays


class Muddled(DecodeCell):
    """Gives the sequences of a batch each other's tokens."""

    def run(self, arrays: BatchArrays, begin: int, end: int, **options: Any) -> int:
        if len(np.unique(arrays.seq_ids)) > 1:
            arrays.tokens[:] = arrays.tokens[::-1].copy()
        return super().run(arrays, begin, end, **options)


class Older(DecodeCell):
    """Of a llama-cpp-python that does not know llama_process."""

    def __init__(self, config: msgspec.Raw, room: Room, preloaded: Any = None) -> None:
        del C.llama_process
        super().__init__(config, room, preloaded)
