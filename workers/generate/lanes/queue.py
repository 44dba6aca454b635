"""Jobs that wait for a lane."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence

from crumplezone.errors import CrumplezoneError, QueueFullError, UsageError
from crumplezone.sandbox.host.threads import apart
from crumplezone.workers.generate.lanes.deadlines import Deadlines
from crumplezone.workers.generate.requests.jobs import BatchJob, Job, PromptJob, check_waiting, drop, fail

_CLOSED = "this decoder was closed before the job was done"
_LOOK = 0.1  # seconds between looks whether what waits for room is still wanted


def _drop(jobs: Sequence[Job]) -> None:
    """Without the queue's lock: somebody may be told."""
    if jobs:
        apart(lambda: [drop(job) for job in jobs])


class Queue:
    """Jobs for any number of lanes: those of higher priority first, and of these, who came first.

    Args:
        lanes: How many there are.
        size: Most jobs that wait.

    Attributes:
        killed: Lanes end as soon as they look.
    """

    def __init__(self, lanes: int, size: int) -> None:
        self._lanes = self._working = lanes
        self._size = size
        self._numbers = itertools.count()  # no interrupt comes between a number and the next
        self._jobs: list[tuple[int, int, Job]] = []  # a heap
        # Taken itself, not by the condition: a signal handler could come between that and the block.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._open = True
        self.killed = False
        self._listeners: list[Callable[[], None]] = []
        self._servers: set[int] = set()  # threads
        self._deadlines = Deadlines(self._servers)

    def put(self, jobs: Sequence[Job], *, wait: bool = False) -> bool:
        """Add jobs, all or none; False if the queue takes no more.

        Args:
            jobs: Those of one request.
            wait: Until there is room. On a thread of this package: no signal handler comes in between.

        Raises:
            QueueFullError: There is no room, or never will be.
            UsageError: It was killed.
        """
        while not all(job.unwanted for job in jobs):
            with self._lock:
                if not self._open or len(self._jobs) + len(jobs) <= self._size:
                    added = self._add(jobs)
                    break
                if not (gone := self._unwanted()):
                    if not wait or len(jobs) > self._size:
                        raise QueueFullError(len(self._jobs), self._size, len(jobs))
                    self._changed.wait(_LOOK)
            _drop(gone)
        else:
            _drop(jobs)
            return True
        self._tell()
        return added

    def on_news(self, listener: Callable[[], None]) -> None:
        """Call something, from any thread, when a job has come or the queue is killed."""
        self._listeners.append(listener)

    def served_by(self, thread: int) -> None:
        """This thread does its jobs."""
        self._servers.add(thread)

    def left(self) -> None:
        """A lane does no more of its jobs."""
        with self._lock:
            self._working -= 1
            if not self._working:
                self._deadlines.close()

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
        while True:
            gone = []
            with self._lock:
                while self._jobs and self._first.unwanted:
                    gone.append(self._pop())
                if not gone:
                    if self.killed or (idle and not self._jobs and not self._open):
                        return None
                    if self._jobs or not idle:
                        return self._next(places, idle=idle)
                    self._changed.wait()
            _drop(gone)

    def close(self) -> None:
        """Take no more jobs; lanes end when those that there are have been done."""
        with self._lock:
            self._open = False
            self._changed.notify_all()

    def kill(self, error: CrumplezoneError | None = None) -> None:
        """Fail what waits, and what will; lanes end as soon as they look."""
        with self._lock:
            self._open, self.killed = False, True
            jobs, self._jobs = self._jobs, []
            self._changed.notify_all()
        self._tell()
        self._listeners.clear()  # they refer to the lanes, which refer to this
        self._deadlines.close()
        for _, _, job in jobs:
            fail(job, error or UsageError(_CLOSED))

    @property
    def _first(self) -> Job:
        return self._jobs[0][2]

    def _unwanted(self) -> list[Job]:
        """Those that nobody wants are in the queue no more; drop them."""
        gone = [job for _, _, job in self._jobs if job.unwanted]
        if gone:
            self._jobs = [entry for entry in self._jobs if not entry[2].unwanted]
            heapq.heapify(self._jobs)
        return gone

    def _add(self, jobs: Sequence[Job]) -> bool:
        if self.killed:
            raise UsageError(_CLOSED)
        for job in jobs if self._open else ():
            priority = 0
            if isinstance(job, PromptJob):
                priority = job.request.priority
                job.servers = self._servers
                if job.deadline is not None:
                    self._deadlines.add(job, job.deadline)
            else:
                job.future.served_by = self._servers
            heapq.heappush(self._jobs, (-priority, next(self._numbers), job))
        self._changed.notify_all()
        return self._open

    def _pop(self) -> Job:
        job = heapq.heappop(self._jobs)[2]
        self._changed.notify_all()  # there is room
        return job

    def _next(self, places: int, *, idle: bool) -> list[Job]:
        if self._jobs and isinstance(self._first, BatchJob):  # others wait behind it: it has its turn
            return [self._pop()] if idle else []
        share = min(places, -(-len(self._jobs) // self._lanes))  # the other lanes want some, too
        taken: list[Job] = []
        while len(taken) < share and self._jobs and isinstance(self._first, PromptJob):
            taken.append(self._pop())
        return taken

    def _tell(self) -> None:
        for listener in list(self._listeners):
            listener()
