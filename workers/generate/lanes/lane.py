"""A lane: one cell and the thread that runs jobs on it. Several share a queue."""

from __future__ import annotations

import logging
import threading

from crumplezone.errors import UsageError
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.sandbox.host.threads import serve
from crumplezone.workers.generate.flight.in_flight import Generation
from crumplezone.workers.generate.lanes.queue import _CLOSED, Queue
from crumplezone.workers.generate.requests.jobs import Job, PromptJob, deliver, fail
from crumplezone.workers.ladder.ladder import Ladder
from crumplezone.workers.memory.session import MemorySession

_log = BesideLog(logging.getLogger(__name__))


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
        self, queue: Queue, session: MemorySession, ladder: Ladder, generation: Generation, name: str
    ) -> None:
        self._queue, self._session, self.client = queue, session, session.client
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
        self._thread.join()

    def _nudge(self) -> None:
        if self._queue.killed:
            self._generation.stop()
        elif self._generation.places:
            self._generation.nudge()

    def _run(self) -> None:
        serve()
        self._queue.served_by(threading.get_ident())
        generation = self._generation
        while (jobs := self._queue.take(generation.places, idle=not generation.busy)) is not None:
            for job in jobs:
                self._begin(job)
            if generation.busy:
                self._advance()
        generation.give_up(UsageError(_CLOSED))
        self.client.close()
        self._queue.left()

    def _begin(self, job: Job) -> None:
        try:
            if isinstance(job, PromptJob):
                job.nudge = self._generation.nudge
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
