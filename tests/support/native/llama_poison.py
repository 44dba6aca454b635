"""A `Llama` cell that dies for real, in the middle of its native decoding, when it is told to."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import msgspec

from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.native.llama.cell import LlamaCell
from tests.support.native.decode_poison import meet

TARGET = "tests.support.native.llama_poison:PoisonCell"
VARIABLE = "CRUMPLEZONE_TEST_LLAMA_POISON"


class Poison(msgspec.Struct, frozen=True):
    """When to die, and how. Cells read it from the environment variable `VARIABLE`."""

    min_tokens: int = 1  # only with so many tokens in one native call
    at: int = 0  # only from this position on
    once: str = ""  # a file that the first death makes; there is no second one
    how: str = "segv"  # segv or hang; restore: when it loads a saved state; meet: as of decode_poison
    fifo: str = ""


class PoisonCell(LlamaCell):
    """A `LlamaCell` with a `Poison`."""

    def __init__(self, config: msgspec.Raw, room: Room, preloaded: Any = None) -> None:
        super().__init__(config, room, preloaded)
        dose = msgspec.json.decode(os.environ[VARIABLE], type=Poison)
        context: Any = self._llama._ctx
        decode = context.decode

        def dosed(batch: Any) -> None:
            late = batch.batch.pos[batch.batch.n_tokens - 1] >= dose.at
            if (
                dose.how != "restore"
                and late
                and batch.batch.n_tokens >= dose.min_tokens
                and self._first(dose)
            ):
                if dose.how == "hang":
                    signal.pause()
                if dose.how == "meet":
                    meet(dose.fifo)
                else:
                    ctypes.memset(0x18, 1, 1)
            decode(batch)

        context.decode = dosed
        if dose.how == "restore":
            setattr(self._llama, "_load", self._crash)  # noqa: B010 - mypy knows it as a method

    def _crash(self, state: bytes, n_tokens: int) -> bool:  # noqa: ARG002 - that of `_load`
        ctypes.memset(0x18, 1, 1)
        return True

    def _first(self, dose: Poison) -> bool:
        if not dose.once:
            return True
        try:
            Path(dose.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
