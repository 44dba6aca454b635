"""Supervisor side: one running cell, and where the next one comes from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from crumplezone.errors import CellDied, CellRefused, ContextError, CrumplezoneError, ModelError, UsageError
from crumplezone.reports.formats import text
from crumplezone.reports.records.report import Report
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.cells.spares import SparePool
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.host.scarcity import NO_CELL, no_cell
from crumplezone.workers.cells.targets import TARGETS, Kind
from crumplezone.workers.incidents.deaths import Starts
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.file import check_file
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.messages import Warm, Warmed

_T = TypeVar("_T", bound=msgspec.Struct)
_S = TypeVar("_S")
_ANOTHER = "another process was started in its place"


class CellSource:
    """A cell that is started when it is needed, and replaced when it has died. Use it from one thread.

    Args:
        kind: What the cell runs, see `TARGETS`. With spares, it answers `Warm`.
        config: Given to it; its ``model`` is the path of the model.
        limits: Of every cell.
        reporter: Where the deaths are reported that no call meets; None to raise those that a start meets.
        zygote: What forks the cells; None: they are spawned.
        spares: Warm cells in reserve.
        owner: What its user calls the thing that it belongs to.
        refusals: What to raise where the start of a cell raised an exception of such a name.
    """

    def __init__(
        self,
        kind: Kind,
        config: Any,
        limits: Limits,
        reporter: Reporter | None,
        zygote: Zygote | None = None,
        spares: int = 0,
        *,
        owner: str = "decoder",
        refusals: Mapping[str, type[Exception]] | None = None,
    ) -> None:
        self.config = config
        self._target, self._limits, self._reporter, self._zygote = TARGETS[kind], limits, reporter, zygote
        self._owner, self._refusals = owner, refusals or {}
        self._spares = SparePool(
            self._spec(),
            zygote,
            spares,
            functools.partial(_warm, limits.deadline),
            functools.partial(report_idle, reporter, config),
        )
        self._cell: Cell | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Process id of the running cell, if there is one."""
        return self._cell.pid if self._cell and self._cell.alive else None

    @property
    def spare_pids(self) -> list[int]:
        """Process ids of the spares."""
        return self._spares.pids

    def probe(self, kind: type[_T]) -> _T:
        """What a cell says of itself. A zygote that has its configuration knows as well.

        Raises:
            ModelError, CrumplezoneError, CellDied, UsageError: As `start`.
        """
        found = self.seed_info(kind)
        return self.start().info(kind) if found is None else found

    def seed_info(self, kind: type[_T]) -> _T | None:
        """What the zygote says of itself; None where cells are spawned.

        Raises:
            ModelError, CrumplezoneError, CellDied, UsageError: As `start`.
        """
        zygote = self._zygote
        return self._started(lambda: zygote.info(kind)) if zygote else None

    def start(self) -> Cell:
        """The running cell, where a job begins; a new one if there is none, or if it died while it waited.

        Raises:
            ModelError: The model or the context could not be made.
            CrumplezoneError: The machine has no process or descriptor for it.
            CellDied: The loader crashed, and there is no reporter.
            UsageError: It was closed.
        """
        if self._cell and (died := self._cell.died_idle()):
            report_idle(self._reporter, self.config, Incident.of(died))
        return self.running()

    def running(self) -> Cell:
        """As `start`, but in the middle of a job: a cell that died since its latest call is not replaced.

        Raises:
            ModelError, CrumplezoneError, CellDied, UsageError: As `start`.
        """
        if self._closed:
            raise UsageError(f"this {self._owner} is closed: make a new one")
        if self._cell is None or not self._cell.alive:
            self._cell = self._taken()
            if self._closed:  # meanwhile
                self.discard_cell()
                raise UsageError(f"this {self._owner} is closed: make a new one")
        return self._cell

    def renew(self, config: Any) -> None:
        """Cells from now on have this configuration."""
        self.config = config
        self._spares.renew(self._spec())

    def wait_for_spares(self, timeout: float) -> bool:
        """Wait until every spare is there; False if that takes longer (seconds), or none is made any more."""
        return self._spares.wait_for_all(timeout)

    def discard_cell(self) -> None:
        """End the running cell, if there is one; the next start has another."""
        if self._cell is not None:
            self._cell.close()

    def close(self) -> None:
        """End every cell, for good. Idempotent."""
        self._closed = True
        try:
            self.discard_cell()
        finally:
            self._spares.close()

    def _spec(self) -> CellSpec:
        limits = self._limits
        return CellSpec(
            self._target, self.config, memory_limit=limits.memory, surroundings=limits.surroundings
        )

    def _taken(self) -> Cell:
        return self._started(self._spares.take)

    def _started(self, start: Callable[[], _S]) -> _S:
        """Start something that needs the model; once more, if what was lost was not lost by loading it."""
        starts = Starts()
        while True:
            try:
                with self._translated():
                    return start()
            except CellDied as died:
                self._start_lost(died, starts)

    def _start_lost(self, died: CellDied, starts: Starts) -> None:
        """Raise what a lost start is in the end, or tell of it: there is to be another."""
        incident = Incident.of(died)
        evidence = incident.evidence.result()
        loader = starts.loader(evidence)
        again = not loader and starts.again(evidence)
        if self._reporter is None:
            if again:
                return
            raise died
        doing = "while loading the model" if loader else "while it started"
        result = "the model could not be loaded" if loader else _ANOTHER if again else "no cell could be had"
        path = self._reporter.file_lone(incident, doing, result, self.config.context(), None)
        if again:
            return
        named = self._reporter.written(path)
        what = text.summary(Report("", "", evidence, result=result)) + (f" Report: {named}" if named else "")
        if loader:
            raise ModelError(self.config.model, f"llama.cpp died while loading it. {what}", named) from died
        problem = f"no cell could be started: {starts.lost} in a row were lost before they were ready"
        remedy = "Find what ends them (a watchdog, a limit of memory); `crumplezone doctor` tries a start"
        raise CrumplezoneError(f"{problem}, not by what they loaded. {remedy}. The last: {what}") from died

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Start something; what the start of a cell raises becomes what its caller may know."""
        path = str(self.config.model)
        if self._zygote is None or self._zygote.pid is None:
            check_file(Path(path))  # it may be gone since the last cell
        try:
            yield
        except CellRefused as error:
            if error.kind == "LoadError":
                raise ModelError(path, f"llama.cpp cannot load it: {error}") from error
            if error.kind == "ContextError":
                raise ContextError(path, f"no such context can be made: {error}") from error
            if error.kind in self._refusals:
                raise self._refusals[error.kind](str(error)) from error
            raise CrumplezoneError(f"the cell did not start: {error.kind}: {error}") from error
        except NO_CELL as error:
            raise no_cell(error) from error


def report_idle(reporter: Reporter | None, config: Any, incident: Incident) -> None:
    """Report the death of a spare, of a zygote, or of a cell between two jobs.

    Args:
        reporter: None: nobody is told.
        config: Of the cell, or of those that the zygote forks.
        incident: The death.
    """
    if reporter:
        doing = "while it waited for work" if incident.phase == "idle" else "in reserve"
        result = "another process takes its place; no job was touched"
        reporter.file_unasked(incident, doing, result, config.context())


def _warm(deadline: float | None, cell: Cell) -> None:
    cell.call(Warm(), Warmed, deadline)
