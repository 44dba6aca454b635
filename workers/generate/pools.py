"""The lanes of a decoder through all changes of its context: each makes others, and those before finish."""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from crumplezone.sandbox.host.threads import Task, apart
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.turn import Turn
from crumplezone.workers.generate.lanes.pool import Plan, Pool
from crumplezone.workers.generate.requests.jobs import Job


class Pools:
    """Where the jobs of a decoder go. Lanes are made with the first one.

    Args:
        plan: What they are made of.
        turn: Of the decoder.

    Attributes:
        closing: Called when they are closed.
    """

    def __init__(self, plan: Plan, turn: Turn) -> None:
        self._plan, self._turn = plan, turn
        self._lock = threading.Lock()
        self.closing: set[Callable[[], object]] = set()
        self._pools: list[Pool] = []  # the last one takes jobs, those before it finish theirs
        weakref.finalize(self, Task[None]().begin, partial(_abandon, self._pools, os.getpid()), "close-pools")

    @property
    def clients(self) -> list[DecodeClient]:
        """Of all lanes."""
        return [client for pool in self._pools for client in pool.clients]

    @property
    def places(self) -> int:
        """How many prompts can be in flight. Waits for the measurement of the width."""
        return self._current().places

    @property
    def known_places(self) -> int:
        """As `places`; 0 where that is not known yet."""
        return self._pools[-1].known_places if self._pools else 0

    def change(self, **changes: Any) -> None:
        """Have lanes made of something else from now on: fields of `Plan`."""
        self._plan = dataclasses.replace(self._plan, **changes)

    def put(self, jobs: Sequence[Job], *, wait: bool = False) -> None:
        """Give the jobs of one request to the lanes.

        Args:
            jobs: All or none.
            wait: Until there is room for them. On a thread of this package.

        Raises:
            QueueFullError: There is no room, or never will be.
            CrumplezoneError: There are no lanes, or the decoder was closed, or is draining.
        """
        traces = [job.trace for job in jobs]
        with self._turn.passing(), self._plan.cells.reporter.observer.taking(traces):
            while not self._current().put(jobs, wait=wait):  # it was retired in between
                pass

    def close(self) -> list[Pool]:
        """Have there be no more, and give those that there are, to be closed."""
        with self._lock:
            pools = list(self._pools)
        for tell in list(self.closing):
            tell()
        return pools

    def _current(self) -> Pool:
        """The lanes that take jobs."""
        self._turn.check_open()
        current = self._pools[-1] if self._pools else None
        return current if current and self._takes_jobs(current) else apart(self._new)

    def _takes_jobs(self, pool: Pool) -> bool:
        return not pool.failure and pool.plan is self._plan

    def _new(self) -> Pool:
        with self._lock:
            self._turn.check_open()
            if not (self._pools and self._takes_jobs(self._pools[-1])):
                old = [pool for pool in self._pools if not pool.ended]
                self._pools[:] = [*old, Pool(self._plan)]
                for pool in old:
                    pool.retire()
            return self._pools[-1]


def _abandon(pools: list[Pool], owner: int) -> None:
    if os.getpid() != owner:  # a fork inherited them, and locks that other threads hold
        return
    for pool in pools:
        pool.abandon()
