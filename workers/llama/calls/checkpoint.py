"""The state that a `Llama`'s next cell begins with, so that it need not compute a long prompt again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from crumplezone.workers.protocol.llama import common_prefix

_SHARE = 0.02  # of the time that cells compute, states take
_FIRST = 0.5  # seconds of computing that a state has to save at least
_WORTH = 16  # tokens; fewer are computed again
_BYTES_MAX = 2**28  # of a state: a larger one is not kept, as it would be copied into this process
_OF_LIMIT = 16  # nor one of more than this part of what a cell may take: it crosses its arena


class Checkpoint:
    """A saved state, and when to save the next one.

    Args:
        memory_limit: Bytes that a cell may take, or None.

    Attributes:
        bytes_max: Of a state.
        tokens: That the state was made of.
        state: As llama.cpp has it; empty: there is none.
    """

    def __init__(self, memory_limit: int | None = None) -> None:
        self.bytes_max = min(_BYTES_MAX, (memory_limit or 2**63) // _OF_LIMIT)
        self.tokens: list[int] = []
        self.state = b""
        self._computed = 0.0  # seconds, since the latest was made
        self._cost = 0.0  # of that one

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While a cell computes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._computed += time.perf_counter() - start

    @property
    def due(self) -> bool:
        """Whether enough was computed since the latest that another one is worth its time."""
        return self._computed > max(_FIRST, self._cost / _SHARE)

    def make(self, tokens: Sequence[int], save: Callable[[], bytes]) -> None:
        """Have a state saved, of these tokens."""
        start = time.perf_counter()
        state = save()
        self._cost, self._computed = time.perf_counter() - start, 0.0
        if state:
            self.tokens, self.state = list(tokens), state

    def serves(self, tokens: Sequence[int]) -> bool:
        """Whether a cell that is to compute these tokens had better begin with it."""
        return bool(self.state) and common_prefix(self.tokens, tokens) >= _WORTH

    def drop(self) -> None:
        """Do without: a cell died that began with it."""
        self.tokens, self.state = [], b""
