"""Whose call a cell is at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

_LOOK = 1.0  # seconds: whoever gives the turn up may be interrupted before it tells of that
_T = TypeVar("_T")


class Holder(Protocol):
    """A call.

    Attributes:
        has_turn: Whether it is at the cell. Who is done says so here: no signal handler comes in between.
    """

    has_turn: bool


class CallLock:
    """Whose call a cell is at. A thread waits for the calls of others, but never for one of its own.

    A stream keeps the turn while it is suspended. Another call of its thread takes it over; the stream is
    then made again, like after a crash, when it is asked for its next item.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a stream may be collected while this is held
        self._changed = threading.Condition(self._lock)
        self._holder: Holder | None = None
        self._thread = 0
        self._closed = False

    def close(self) -> None:
        """End all waiting."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def take(self, who: Holder) -> None:
        """Wait for the turn; once it is closed, nobody waits."""
        me = threading.get_ident()
        with self._lock:
            while not (self._free(who) or self._thread == me or self._closed):
                self._changed.wait(_LOOK)
            who.has_turn = True
            self._holder, self._thread = who, me

    def release(self, who: Holder) -> None:
        """Give it up, if it is theirs."""
        with self._lock:
            if self._holder is who:
                self._holder = None
                self._changed.notify_all()

    def run(self, who: Holder, work: Callable[[], _T]) -> _T:
        """Take it for the length of some work."""
        try:
            self.take(who)
            return work()
        finally:
            who.has_turn = False
            self.release(who)

    def _free(self, who: Holder) -> bool:
        return self._holder is None or self._holder is who or not self._holder.has_turn
