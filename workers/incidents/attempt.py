"""One try of one rung: a crash is reported, what came of it is a step of the job."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from crumplezone.errors import CellDied, CrumplezoneError, MemoryLostError
from crumplezone.reports.records.report import BatchRecord, Outcome
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.host.scarcity import SCARCE, remedy
from crumplezone.workers.batch.call import RefusedError
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.protocol.config import CellConfig, CellInfo

_TOLD = (RefusedError, CrumplezoneError, OSError, MemoryError)  # also: no cell could be had, or no memory


class Described(Protocol):
    """What a report says of the cell that crashed."""

    @property
    def config(self) -> CellConfig:
        """Its model and context."""

    @property
    def known(self) -> CellInfo | None:
        """Facts of the model, if a cell ever ran."""


class Attempt:
    """Tries something: ``with Attempt(...) as tried: ...``. Crashes and refusals are told, not raised.

    Args:
        reporter: Where a crash goes.
        job: That this is a step of.
        cell: That does it; asked after a crash.
        rung: That is tried.
        sequences: That it is tried for.
        batch: What is being decoded; asked after a crash.
        partial: It is only a part of what the rung has to do: done, it is no step yet.

    Attributes:
        error: What it failed with, or None. It keeps no traceback: with the frames, the arena of a dead cell
            would live on.
        report: Where the report of a crash will be, or None.
    """

    def __init__(
        self,
        reporter: Reporter,
        job: JobRecord,
        cell: Described,
        rung: str,
        sequences: list[int],
        batch: Callable[[], BatchRecord | None],
        *,
        partial: bool = False,
    ) -> None:
        self._reporter, self._job, self._cell = reporter, job, cell
        self._rung, self._sequences, self._batch, self._partial = rung, sequences, batch, partial
        self.error: BaseException | None = None
        self.report: str | None = None
        self._start = 0.0

    @property
    def ok(self) -> bool:
        """Whether it was done."""
        return self.error is None

    @property
    def died(self) -> CellDied | None:
        """The crash, if it was one."""
        return self.error if isinstance(self.error, CellDied) else None

    @property
    def problem(self) -> str:
        """What it failed with, in words, and what to do where Python does not say; empty if it did not."""
        if self.error is None:
            return ""
        told = str(self.error) or type(self.error).__name__
        scarce = isinstance(self.error, MemoryError) or getattr(self.error, "errno", None) in SCARCE
        return f"{told}: {remedy(self.error)}" if scarce else told

    @property
    def rc(self) -> int | None:
        """What llama.cpp returned, if that was how it failed."""
        return self.error.rc if isinstance(self.error, RefusedError) else None

    def tells(self, error: BaseException) -> bool:
        """Whether an error is what came of this, and not for others. Without its memory no job goes on."""
        return isinstance(error, _TOLD) and not isinstance(error, MemoryLostError)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        ms = (time.perf_counter() - self._start) * 1000
        outcome = Outcome.OK
        if error is not None:
            if not self.tells(error):
                return False
            self.error = error.with_traceback(None)
            outcome = Outcome.CRASHED if self.died else Outcome.REFUSED
        if self.died:
            cell, incident = self._cell, Incident.of(self.died)
            self.report = self._reporter.add(
                self._job, incident, self._rung, self._batch(), cell.config, cell.known
            )
        if error is not None or not self._partial:
            self._job.step(self._rung, outcome, self._sequences, self.problem, ms)
        return error is not None
