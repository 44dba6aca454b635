"""The state that a `Llama`'s next cell begins with, so that it need not compute a long prompt again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from crumplezone.errors import CellRefused, ShortageError
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.workers.protocol.llama import common_prefix

_SHARE = 0.02  # of the time that cells compute, states take
_FIRST = 0.5  # seconds of computing that a state has to save at least
_WORTH = 16  # tokens; fewer are computed again
_BYTES_MAX = 2**28  # of a state: a larger one is not kept, as it would be copied into this process
_OF_LIMIT = 16  # nor one of more than this part of what a cell may take: it crosses its arena


_log = BesideLog(logging.getLogger(__name__))


class Stateful(Protocol):
    """A client of a cell that has a memory of one sequence."""

    def save(self, seq_id: int, most: int = ...) -> bytes:
        """The state of a sequence; nothing if it is larger."""

    def restore(self, state: bytes) -> None:
        """Have the next call begin with a state."""


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

    def make(self, tokens: Sequence[int], client: Stateful) -> None:
        """Have the state of these tokens saved, if that can be; its cell may die of it.

        Raises:
            CellDied: The cell was lost.
        """
        start, state = time.perf_counter(), b""
        try:
            state = client.save(0, self.bytes_max)
        except (CellRefused, ShortageError, MemoryError) as error:
            _log.debug("no state was saved: %s", error)
        self._cost, self._computed = time.perf_counter() - start, 0.0
        if state:
            self.tokens, self.state = list(tokens), state

    def serves(self, tokens: Sequence[int]) -> bool:
        """Whether a cell that is to compute these tokens had better begin with it."""
        return bool(self.state) and common_prefix(self.tokens, tokens) >= _WORTH

    def give(self, client: Stateful) -> list[int]:
        """Have a new cell begin with it; the tokens of what it was given.

        Raises:
            CellDied: The cell was lost.
        """
        try:
            client.restore(self.state)
        except (CellRefused, ShortageError, MemoryError) as error:
            _log.debug("a cell begins without the saved state: %s", error)
            return []
        return self.tokens

    def drop(self) -> None:
        """Do without: a cell died that began with it."""
        self.tokens, self.state = [], b""
