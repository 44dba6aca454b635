"""A lane: one cell and the thread that runs jobs on it. Several share a queue."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from crumplezone.errors import CrumplezoneError, UsageError
from crumplezone.workers.generation import Generation
from crumplezone.workers.jobs import BatchJob, Job, PromptJob, deliver, drop, fail
from crumplezone.workers.ladder import Ladder
from crumplezone.workers.session import Session

_CLOSED = "this decoder was closed before the job was done"

_log = logging.getLogger(__name__)


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
        self._changed = threading.Condition()
        self._open = True
        self.killed = False
        self._listeners: list[Callable[[], None]] = []

    def put(self, job: Job) -> None:
        """Add a job.

        Raises:
            UsageError: The queue is closed.
        """
        with self._changed:
            if not self._open:
                raise UsageError(_CLOSED)
            self._jobs.append(job)
            self._changed.notify()
        self._tell()

    def on_news(self, listener: Callable[[], None]) -> None:
        """Call something, from any thread, when a job has come or the queue is killed."""
        self._listeners.append(listener)

    def take(self, places: int, *, idle: bool) -> list[Job] | None:
        """The next jobs of a lane: prompts, or one batch if it is idle.

        Args:
            places: How many prompts can join those in flight.
            idle: Nothing is in flight: wait for a job.

        Returns:
            None if there will be no more.
        """
        with self._changed:
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
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def kill(self, error: CrumplezoneError | None = None) -> None:
        """Fail what waits, and what will; lanes end as soon as they look."""
        self.close()
        with self._changed:
            self.killed = True
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


class Lane:
    """Runs the jobs of a queue on one cell, in a thread of its own, until the queue is closed.

    Args:
        queue: Where the jobs come from.
        session: Holds the cell, which nobody else uses.
        ladder: For batches, over the same session.
        generation: For prompts, over the same session.
        name: Of the thread.
    """

    def __init__(
        self, queue: Queue, session: Session, ladder: Ladder, generation: Generation, name: str
    ) -> None:
        self._queue, self._session, self.runner = queue, session, session.runner
        self._ladder, self._generation = ladder, generation
        queue.on_news(self._nudge)
        # A daemon: a decoder that nobody closes must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it has not come to its end."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for its end. Close or kill the queue first."""
        if self._thread is not threading.current_thread():  # a callback of a future, which the lane runs
            self._thread.join()

    def _nudge(self) -> None:
        if self._queue.killed:
            self._generation.stop()
        elif self._generation.places:
            self._generation.nudge()

    def _run(self) -> None:
        generation = self._generation
        while (jobs := self._queue.take(generation.places, idle=not generation.busy)) is not None:
            for job in jobs:
                self._begin(job)
            if generation.busy:
                self._advance()
        generation.give_up(UsageError(_CLOSED))
        self.runner.shut()

    def _begin(self, job: Job) -> None:
        try:
            if isinstance(job, PromptJob):
                self._generation.admit(job)
                return
            self._generation.forget()
            with self._session.scratch():
                self._session.clear()
                result = self._ladder.decode(job.columns, job.ask)
            deliver(job.future, result)
        except Exception as error:  # noqa: BLE001 - it is the job's; the lane goes on
            fail(job, UsageError(_CLOSED) if self._queue.killed else error)

    def _advance(self) -> None:
        try:
            self._generation.advance()
        except Exception as error:  # noqa: BLE001 - a defect of ours: whoever waits must be told
            _log.exception("the generation failed")
            self._generation.give_up(error)
