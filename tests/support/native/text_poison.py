"""A text cell that dies for real, waits, or lies, when it is asked for something."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import msgspec

from crumplezone.workers.native.text.cell import TextCell
from crumplezone.workers.protocol.text import (
    AsText,
    AsTokens,
    Rendered,
    SpecialTokens,
    TextInfo,
    TextRequest,
    ToTokens,
    tokens_shapes,
)

TARGET = "tests.support.native.text_poison:PoisonCell"
VARIABLE = "CRUMPLEZONE_TEST_TEXT_POISON"


class Poison(msgspec.Struct, frozen=True):
    """When to misbehave, and how. Cells read it from the environment variable `VARIABLE`."""

    request: str  # the kind of request that does it
    how: str  # segv, wait, many, stranger
    once: str = ""  # a file that the first time makes; there is no second one
    fifo: str = ""  # wait: told by opening it


class PoisonCell(TextCell):
    """A `TextCell` with a `Poison`."""

    def info(self) -> TextInfo:
        poison = msgspec.json.decode(os.environ[VARIABLE], type=Poison)
        told = super().info()
        return TextInfo(told.n_vocab + 1) if poison.request == "info" else told

    def handle(self, request: TextRequest) -> msgspec.Struct:
        poison = msgspec.json.decode(os.environ[VARIABLE], type=Poison)
        if type(request).__name__ != poison.request or not _first(poison.once):
            return super().handle(request)
        match poison.how:
            case "segv":
                ctypes.memset(0x18, 1, 1)
            case "wait":
                Path(poison.fifo).write_text("here")
                signal.pause()
        told = super().handle(request)
        match told, poison.how:
            case AsTokens(), "many":
                return AsTokens(2**31)
            case AsTokens(), "stranger":
                assert isinstance(request, ToTokens)
                self._arena.arrays(tokens_shapes(request))[1][0] = -1
            case AsText(), "many":
                return AsText(2**31)
            case Rendered(), "many":
                return Rendered(2**31, 1)
            case SpecialTokens(), "stranger":
                return msgspec.structs.replace(told, eos=self._n_vocab)
        return told


def _first(once: str) -> bool:
    if once:
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return False
    return True
