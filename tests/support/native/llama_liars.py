"""A `Llama` cell that was taken over: what it says has the right form, and cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from crumplezone.workers.native.llama.cell import LlamaCell
from crumplezone.workers.protocol.llama import Evaluated, Invoke, LlamaInfo, Note, Output, Request

TARGET = "tests.support.native.llama_liars:Liar"
VARIABLE = "CRUMPLEZONE_TEST_LLAMA_LIE"  # names a file that names the lies, each told once


class Liar(LlamaCell):
    """Tells the first of the lies, when it can."""

    def _lies(self, lie: str) -> bool:
        file = Path(os.environ[VARIABLE])
        first, _, others = file.read_text().partition(" ")
        if first != lie:
            return False
        file.write_text(others)
        return True

    def info(self) -> LlamaInfo:
        told = super().info()
        if self._lies("context"):
            return msgspec.structs.replace(told, n_ctx=2**24)
        return told

    def handle(self, request: Request) -> msgspec.Struct:
        if isinstance(request, Invoke):
            while self._lies("questions"):
                for i in range(10**9):  # each is answered; of such, there is no end
                    self._room.ask(Note([Evaluated(0, [3 + i % 100])]))
        told = super().handle(request)
        if isinstance(told, Output) and isinstance(request, Invoke) and self._lies("value"):
            return msgspec.structs.replace(told, value=b"", size=2**33 - 1)
        return told
