"""Requests whose time is over, wherever they are: in the queue, in flight, or in a cell that hangs."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
import weakref
from typing import Protocol

from crumplezone.sandbox.host.threads import serve

_MANY = 1024  # entries, among which those that are over are looked for


class _Expires(Protocol):
    """What has a deadline."""

    @property
    def over(self) -> bool:
        """Whether it is over, or nobody wants it."""

    def expire(self) -> None:
        """Its time is over."""


class Deadlines:
    """Ends jobs at their deadlines, on a thread that is there while there are some.

    Args:
        servers: Threads that must not wait for jobs; that of this is added.
    """

    def __init__(self, servers: set[int]) -> None:
        self._servers = servers
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._due: list[tuple[float, int, weakref.ref[_Expires]]] = []  # a heap
        self._numbers = itertools.count()
        self._many = _MANY
        self._running = False
        self._closed = False

    def add(self, job: _Expires, when: float) -> None:
        """Have a job end at a time of `time.monotonic`, if it is not over by then."""
        with self._lock:
            if self._closed:
                return
            if len(self._due) >= self._many:
                self._due = [entry for entry in self._due if _open(entry[2])]
                heapq.heapify(self._due)
                self._many = max(_MANY, 2 * len(self._due))
            heapq.heappush(self._due, (when, next(self._numbers), weakref.ref(job)))
            if self._running:
                self._changed.notify_all()
                return
            with contextlib.suppress(RuntimeError, MemoryError):  # no thread can be had: the lanes look, too
                threading.Thread(target=self._run, name="deadlines", daemon=True).start()
                self._running = True

    def close(self) -> None:
        """End no more jobs."""
        with self._lock:
            self._closed = True
            self._due.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        serve()
        self._servers.add(threading.get_ident())
        while True:
            with self._lock:
                if not self._due:
                    self._running = False
                    self._servers.discard(threading.get_ident())
                    return
                left = self._due[0][0] - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                job = heapq.heappop(self._due)[2]()
            if job is not None and not job.over:
                job.expire()


def _open(entry: weakref.ref[_Expires]) -> bool:
    job = entry()
    return job is not None and not job.over
