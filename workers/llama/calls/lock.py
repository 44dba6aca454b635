"""Whose call a cell is at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CallLock:
    """Whose call a cell is at. A thread waits for the calls of others, but never for one of its own.

    A stream keeps the turn while it is suspended. Another call of its thread takes it over; the stream is
    then made again, like after a crash, when it is asked for its next item.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a stream may be collected while this is held
        self._changed = threading.Condition(self._lock)
        self._holder: object = None
        self._thread = 0
        self._closed = False

    def close(self) -> None:
        """End all waiting."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def take(self, who: object) -> None:
        """Wait for the turn; once it is closed, nobody waits."""
        me = threading.get_ident()
        with self._lock:
            while self._holder not in {None, who} and self._thread != me and not self._closed:
                self._changed.wait()
            self._holder, self._thread = who, me

    def release(self, who: object) -> None:
        """Give it up, if it is theirs."""
        with self._lock:
            if self._holder is who:
                self._holder = None
                self._changed.notify_all()

    @contextmanager
    def of(self, who: object) -> Iterator[None]:
        """Take it for the length of a block."""
        self.take(who)
        try:
            yield
        finally:
            self.release(who)
