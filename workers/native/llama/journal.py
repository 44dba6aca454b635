"""Child side: what the supervisor has to know to do the running call again. Only cells import this module."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from crumplezone.workers.protocol.llama import NOTE_MAX, Evaluated, Note, Stage

_NOTE_EVERY = 0.05  # seconds: what a crash can cost is that much drawing again


class CallJournal:
    """What the supervisor has to know to do the running job again.

    Args:
        ask: Of the cell.
    """

    def __init__(self, ask: Callable[[msgspec.Struct], msgspec.Raw]) -> None:
        self._ask = ask
        self._evaluated: list[Evaluated] = []
        self._drawn: list[tuple[int, int]] = []
        self._told = time.monotonic()

    def evaluating(self, at: int, tokens: Sequence[int]) -> None:
        """Before a native call: a prompt is told at once, since it may be the one that crashes."""
        for i in range(0, len(tokens), NOTE_MAX):
            part = [int(token) for token in tokens[i : i + NOTE_MAX]]
            self._evaluated.append(Evaluated(at + i, part))
            if len(tokens) > 1:
                self.tell()

    def drew(self, generation: int, token: int) -> None:
        """A token was drawn; those of a replay are known."""
        self._drawn.append((generation, token))
        self.breathe()

    def breathe(self) -> None:
        """Tell the supervisor if it has not heard for a while: its deadline begins anew."""
        if time.monotonic() - self._told > _NOTE_EVERY:
            self.tell()

    def tell(self, stage: Stage = "") -> None:
        """Tell the supervisor now."""
        self._ask(self.take(stage))

    def take(self, stage: Stage = "") -> Note:
        """What is new, to be sent along with a reply."""
        note = Note(self._evaluated, self._drawn, stage)
        self._evaluated, self._drawn = [], []
        self._told = time.monotonic()
        return note
