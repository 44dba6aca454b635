"""A llama.cpp cell that generates at a test's pace, and keeps a diary of its native calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from crumplezone.workers.native.decode_cell import DecodeCell
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.generate.messages import Generate
from crumplezone.workers.protocol.messages import Request

TARGET = "tests.support.native.paced:PacedCell"
VARIABLE = "CRUMPLEZONE_TEST_PACE"  # names a directory with the pipe "go"; the diary is its file "calls"


class PacedCell(DecodeCell):
    """Takes a byte from a pipe before each native call for prompts."""

    _generates = False

    def handle(self, request: Request) -> msgspec.Struct:
        self._generates = isinstance(request, Generate)
        return super().handle(request)

    def run(self, arrays: BatchArrays, begin: int, end: int, **options: Any) -> int:
        if self._generates:
            folder = Path(os.environ[VARIABLE])
            sent = arrays.part(begin, end)
            with open(folder / "go", "rb", 0) as go:
                go.read(1)
            with open(folder / "calls", "ab", 0) as calls:
                entries = list(zip(sent.seq_ids.tolist(), sent.positions.tolist(), strict=True))
                calls.write(msgspec.json.encode(entries) + b"\n")
        return super().run(arrays, begin, end, **options)
