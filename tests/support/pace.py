"""The other end of `tests.support.native.paced`: how far cells may go, and what they did."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


class Pace:
    """Cells that start while there is one generate at its pace.

    Args:
        folder: An empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._calls = folder / "calls"
        self._calls.touch()
        os.mkfifo(folder / "go")
        self._go = os.open(folder / "go", os.O_RDWR)  # what is written there stays there

    def go(self, steps: int = 1) -> None:
        """Allow so many more native calls."""
        os.write(self._go, b"." * steps)

    def calls(self) -> list[list[tuple[int, int]]]:
        """Of each native call, sequences and positions."""
        whole, _, _ = self._calls.read_bytes().rpartition(b"\n")  # a line may be in the middle of its writing
        return [msgspec.json.decode(line) for line in whole.splitlines()]

    def close(self) -> None:
        """Allow all."""
        self.go(20_000)
        os.close(self._go)
