"""One listener, and the events that wait for it: told beside whoever is waited for."""

from __future__ import annotations

import logging
import threading
from collections import deque

from crumplezone.sandbox.host.errands import BesideLog, Errands
from crumplezone.workers.observe.events import Event, Listener

_WAITING_MAX = 16384  # events; those beyond are counted, and not told
_THREAD = "listener"
_LINGER = 0.2  # seconds

_log = BesideLog(logging.getLogger("crumplezone"))


class Ear:
    """Tells one listener, in order, on a thread that is there while there are events.

    Attributes:
        dropped: Events that were not told, since too many waited.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.dropped = 0
        self._events = deque[Event]()
        self._errands = Errands(_THREAD, _LINGER)
        self._due = False

    def hear(self, event: Event) -> None:
        """Have an event told after the next `poke`. Under the lock of whoever keeps them in order."""
        if len(self._events) < _WAITING_MAX:
            self._events.append(event)
        else:
            self.dropped += 1

    def poke(self) -> None:
        """Tell what there is, beside. Without a lock."""
        if self._events and not self._due:
            self._due = True
            self._errands.put(self._tell)

    def wait(self, seconds: float) -> bool:
        """Wait until all was told; False if that takes longer."""
        return self._errands.wait(seconds)

    def _tell(self) -> None:
        self._due = False  # before the look: what comes after that is another errand
        if threading.current_thread().name != _THREAD:  # none can be had: who tells must not wait for it
            return
        while self._events:
            event = self._events.popleft()
            try:
                self.listener(event)
            except BaseException:  # noqa: BLE001 - SystemExit, for one: the next event is another matter
                _log.exception("a listener raised")
