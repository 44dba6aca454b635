"""The lanes of a decoder: as many cells as it has workers, over one queue of jobs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from crumplezone.errors import CrumplezoneError, UsageError
from crumplezone.sandbox.host.scarcity import no_cell
from crumplezone.sandbox.host.threads import Task
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.factory import Cells
from crumplezone.workers.generate.flight.in_flight import Generation
from crumplezone.workers.generate.lanes.lane import Lane
from crumplezone.workers.generate.lanes.queue import Queue
from crumplezone.workers.generate.requests.jobs import Job
from crumplezone.workers.ladder.ladder import Ladder
from crumplezone.workers.ladder.rungs import SafeRungs
from crumplezone.workers.memory.session import MemorySession
from crumplezone.workers.model.adapters import Adapters
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.width.choose import choose
from crumplezone.workers.width.race import Width


@dataclass(frozen=True)
class Plan:
    """What the lanes of a decoder are made of.

    Attributes:
        config: Of the decoder's own cell.
        n_seq: Sequences that a lane decodes together; 0: measured.
        n_threads: Threads of a lane; 0: measured, at most its share of the cores.
        queue_size: Most jobs that wait.
        adapters: That every cell is to have.
    """

    config: CellConfig
    cells: Cells
    workers: int
    n_seq: int
    n_threads: int
    safe_fallback: bool
    preflight: bool
    queue_size: int
    adapters: Adapters | None = None

    def width(self) -> Width:
        """As given, or as measured."""
        share = max(1, len(os.sched_getaffinity(0)) // self.workers)
        return choose(
            self.config,
            self.cells.limits,
            self.cells.reporter,
            zygote=self.cells.zygote,
            n_seq=self.n_seq,
            n_threads=self.n_threads,
            most_threads=share,
            contexts=self.workers * (1 + self.cells.spares),
        )

    def lane(self, queue: Queue, width: Width, number: int) -> Lane:
        """Start a lane."""
        # Room for a batch of as many sequences as the decoder takes, be the width smaller.
        n_seq_max = max(width.n_seq, self.config.n_seq_max)
        config = msgspec.structs.replace(
            self.config,
            n_ctx=self.config.n_ctx // self.config.n_seq_max * n_seq_max,
            n_batch=max(self.config.n_batch, n_seq_max),
            n_seq_max=n_seq_max,
            n_threads=width.n_threads,
        )
        client, reporter = self.cells.decode_client(config), self.cells.reporter
        session = MemorySession(client, reporter, adapters=self.adapters)
        safe_rungs = SafeRungs(client, reporter) if self.safe_fallback else None
        ladder = Ladder(session, safe_rungs, reporter, preflight=self.preflight)
        generation = Generation(session, safe_rungs, reporter, width.n_seq)
        return Lane(queue, session, ladder, generation, f"lane-{number}")


class Pool:
    """Lanes over one queue. The first prompts wait until the width has been measured.

    Args:
        plan: What they are made of.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._queue = Queue(plan.workers, plan.queue_size)
        self._lanes: list[Lane] = []
        self._width: Width | None = None
        self.failure: CrumplezoneError | None = None  # why there are no lanes
        self._opener = Task[None]()
        self._opener.begin(self._open, "lanes")

    @property
    def clients(self) -> list[DecodeClient]:
        """Of the lanes."""
        return [lane.client for lane in self._lanes]

    @property
    def places(self) -> int:
        """How many prompts all lanes together have in flight at most. Waits for the measurement.

        Raises:
            CrumplezoneError: There are no lanes.
            UsageError: A lane has asked, which would wait for itself.
        """
        self._queue.check_waiting()
        self._opener.wait()
        if self._width is None:
            raise self.failure or UsageError("this decoder is closed: make a new one")
        return self._width.n_seq * self.plan.workers

    @property
    def known_places(self) -> int:
        """As `places`; 0 where that is not known yet."""
        return self._width.n_seq * self.plan.workers if self._width else 0

    def put(self, jobs: Sequence[Job], *, wait: bool = False) -> bool:
        """Add jobs, all or none; False if the pool takes no more.

        Args:
            jobs: Those of one request.
            wait: Until there is room. On a thread of this package.

        Raises:
            QueueFullError: There is no room, or never will be.
            CrumplezoneError: There are no lanes, or it was closed.
        """
        try:
            return self._queue.put(jobs, wait=wait)
        except UsageError as closed:
            raise self.failure or closed from None

    def retire(self) -> None:
        """Take no more jobs; do those that there are, and end."""
        self._queue.close()

    @property
    def ended(self) -> bool:
        """Whether every lane has come to its end."""
        return self._opener.ended and not any(lane.alive for lane in self._lanes)

    def abandon(self) -> None:
        """Fail what is not done; the lanes end by themselves."""
        self._queue.kill()

    def close(self) -> None:
        """Fail what is not done, and wait until every lane has ended. No cell is forked after that."""
        self.abandon()
        self.plan.cells.stop()  # or a lane would wait for a zygote that does not answer
        self._opener.wait()
        for lane in self._lanes:
            lane.join()

    def _open(self) -> None:
        try:
            width = self.plan.width()
            self._lanes = [self.plan.lane(self._queue, width, n) for n in range(self.plan.workers)]
            self._width = width
        except Exception as error:  # noqa: BLE001 - whoever waits for a place must be told
            self.failure = error if isinstance(error, CrumplezoneError) else no_cell(error)
            self._queue.kill(self.failure)
