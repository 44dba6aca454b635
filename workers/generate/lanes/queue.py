"""Jobs that wait for a lane."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from crumplezone.errors import CrumplezoneError, UsageError
from crumplezone.workers.generate.requests.jobs import BatchJob, Job, PromptJob, check_waiting, drop, fail

_CLOSED = "this decoder was closed before the job was done"


class Queue:
    """Jobs in the order in which they came, for any number of lanes.

    Args:
        lanes: How many there are.

    Attributes:
        killed: Lanes end as soon as they look.
    """

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._jobs: deque[Job] = deque()
        # Taken itself, not by the condition: a signal handler could come between that and the block.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._open = True
        self.killed = False
        self._listeners: list[Callable[[], None]] = []
        self._servers: set[int] = set()  # threads

    def put(self, job: Job) -> bool:
        """Add a job; False if the queue takes no more.

        Raises:
            UsageError: It was killed.
        """
        with self._lock:
            if self.killed:
                raise UsageError(_CLOSED)
            if not self._open:
                return False
            job.future.served_by = self._servers
            self._jobs.append(job)
            self._changed.notify()
        self._tell()
        return True

    def on_news(self, listener: Callable[[], None]) -> None:
        """Call something, from any thread, when a job has come or the queue is killed."""
        self._listeners.append(listener)

    def served_by(self, thread: int) -> None:
        """This thread does its jobs."""
        self._servers.add(thread)

    def check_waiting(self) -> None:
        """Raise `UsageError` on a thread that does its jobs: it must not wait for them."""
        check_waiting(self._servers)

    def take(self, places: int, *, idle: bool) -> list[Job] | None:
        """The next jobs of a lane: prompts, or one batch if it is idle.

        Args:
            places: How many prompts can join those in flight.
            idle: Nothing is in flight: wait for a job.

        Returns:
            None if there will be no more.
        """
        with self._lock:
            while True:
                while self._jobs and drop(self._jobs[0]):
                    self._jobs.popleft()
                if self.killed or (idle and not self._jobs and not self._open):
                    return None
                if self._jobs or not idle:
                    return self._next(places, idle=idle)
                self._changed.wait()

    def close(self) -> None:
        """Take no more jobs; lanes end when those that there are have been done."""
        with self._lock:
            self._open = False
            self._changed.notify_all()

    def kill(self, error: CrumplezoneError | None = None) -> None:
        """Fail what waits, and what will; lanes end as soon as they look."""
        with self._lock:
            self._open, self.killed = False, True
            jobs, self._jobs = self._jobs, deque()
            self._changed.notify_all()
        self._tell()
        self._listeners.clear()  # they refer to the lanes, which refer to this
        for job in jobs:
            fail(job, error or UsageError(_CLOSED))

    def _next(self, places: int, *, idle: bool) -> list[Job]:
        if self._jobs and isinstance(self._jobs[0], BatchJob):  # others wait behind it: it has its turn
            return [self._jobs.popleft()] if idle else []
        share = min(places, -(-len(self._jobs) // self._lanes))  # the other lanes want some, too
        taken: list[Job] = []
        while len(taken) < share and self._jobs and isinstance(self._jobs[0], PromptJob):
            taken.append(self._jobs.popleft())
        return taken

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
