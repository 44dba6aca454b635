"""A llama.cpp cell that dies for real, in a native call, when it is told to decode its poison."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np

from crumplezone.workers.native.decode_cell import DecodeCell
from crumplezone.workers.protocol.arrays import BatchArrays

TARGET = "tests.support.native.decode_poison:PoisonCell"
VARIABLE = "CRUMPLEZONE_TEST_POISON"


class Poison(msgspec.Struct, frozen=True):
    """When to die, and how. Cells read it from the environment variable `VARIABLE`."""

    token: int = -1  # only if this token is in the call; -1: always
    position: int = -1  # and only at this position
    min_tokens: int = 1  # only with so many tokens in one native call
    min_sequences: int = 1
    after: str = ""  # only when there is this file
    once: str = ""  # a file that the first death makes; there is no second one
    how: str = "segv"  # segv, null_seq_id, use_after_free, wait, meet, or interrupt
    fifo: str = ""  # wait and meet: told by opening it


class PoisonCell(DecodeCell):
    """A `DecodeCell` with a `Poison`."""

    def run(self, arrays: BatchArrays, begin: int, end: int, **options: Any) -> int:
        poison = msgspec.json.decode(os.environ[VARIABLE], type=Poison)
        if self._dies(poison, arrays.part(begin, end)):
            getattr(self, f"_{poison.how}")(poison, arrays, begin, end)
        try:
            return super().run(arrays, begin, end, **options)
        finally:
            C.llama_set_abort_callback(self.context, C.ggml_abort_callback(), None)

    def _dies(self, poison: Poison, sent: BatchArrays) -> bool:
        tokens, positions, seq_ids, *_ = sent
        hit = (tokens == poison.token) | (poison.token < 0)
        if poison.position >= 0:
            hit &= positions == poison.position
        many = len(tokens) >= poison.min_tokens and len(np.unique(seq_ids)) >= poison.min_sequences
        if not (hit.any() and many) or (poison.after and not Path(poison.after).exists()):
            return False
        if poison.once:
            try:
                Path(poison.once).touch(exist_ok=False)
            except FileExistsError:
                return False
        return True

    def _segv(self, *_: object) -> None:
        ctypes.memset(0x18, 1, 1)

    def _null_seq_id(self, _: Poison, arrays: BatchArrays, begin: int, end: int) -> None:
        batch: Any = C.llama_batch()
        batch.n_tokens = end - begin
        int32 = ctypes.POINTER(ctypes.c_int32)
        batch.token = ctypes.cast(arrays.tokens.ctypes.data + 4 * begin, int32)
        batch.pos = ctypes.cast(arrays.positions.ctypes.data + 4 * begin, int32)
        batch.n_seq_id = ctypes.cast(arrays.n_seq_id.ctypes.data + 4 * begin, int32)
        batch.seq_id = (int32 * (end - begin))()  # every pointer is NULL
        C.llama_decode(self.context, batch)

    def _use_after_free(self, *_: object) -> None:
        C.llama_free(self.context)  # and then the call goes on with it

    def _interrupt(self, *_: object) -> None:
        """Return code 2 in the second compute pass: the first one stays in memory."""
        first = C.llama_n_ubatch(self.context)

        def stop(_: object) -> bool:
            return bool(C.llama_memory_seq_pos_max(self.memory, 0) >= first)

        self._stop = C.ggml_abort_callback(stop)
        C.llama_set_abort_callback(self.context, self._stop, None)

    def _meet(self, poison: Poison, *_: object) -> None:
        meet(poison.fifo)

    def _wait(self, poison: Poison, *_: object) -> None:
        Path(poison.fifo).write_text("here")
        signal.pause()


def meet(fifo: str) -> None:
    """Wait to be met at a pipe, and then for a byte from another."""
    Path(fifo).write_text("here")
    with open(f"{fifo}.go", "rb", 0) as go:
        go.read(1)
