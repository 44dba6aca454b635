"""Supervisor side: the one client of a cell, under every kind of typed calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import CellDied, ShortageError
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.process.cgroup import available_memory
from crumplezone.workers.batch.call import RefusedError
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.protocol.messages import Save, Saved

_T = TypeVar("_T", bound=msgspec.Struct)
_Info = TypeVar("_Info", bound=msgspec.Struct)


class CellClient(Generic[_Info]):
    """A cell that is started when it is needed and replaced when it has died, and calls on it.

    A job begins with `start` and goes on with `running`. Use it from one thread.

    Args:
        source: Where its cells come from.
        kind: What such a cell says of itself.
        deadline: Seconds for each call, or None.
    """

    def __init__(self, source: CellSource, kind: type[_Info], deadline: float | None) -> None:
        self._source, self._kind, self._deadline = source, kind, deadline
        self._cell: Cell | None = None
        self._info: _Info | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running cell, if there is one."""
        return self._source.pid

    @property
    def spare_pids(self) -> list[int]:
        """Process ids of the spares."""
        return self._source.spare_pids

    @property
    def cell(self) -> Cell | None:
        """The cell of the latest call, dead or alive."""
        return self._cell

    @property
    def known(self) -> _Info | None:
        """Facts of the model, if a cell ever ran."""
        return self._info

    @property
    def info(self) -> _Info:
        """Facts of the model; starts the cell if it never ran."""
        if self._info is None:
            self.start()
        assert self._info is not None
        return self._info

    def probe(self) -> None:
        """Know the model, from the zygote if it has this configuration, else by starting a cell.

        Raises:
            ModelError, CrumplezoneError, CellDied, UsageError: As `start`.
        """
        self._info = self._source.probe(self._kind)

    def seed_info(self, kind: type[_T]) -> _T | None:
        """What the zygote says of itself, checked against a type; None where cells are spawned.

        Raises:
            ModelError, CrumplezoneError, CellDied, UsageError: As `start`.
        """
        return self._source.seed_info(kind)

    def start(self) -> Cell:
        """The running cell, where a job begins; a new one if there is none, or if it died while it waited.

        Raises:
            ModelError: The model or the context could not be made.
            CrumplezoneError: The machine has no process or descriptor for it.
            CellDied: The loader crashed, and there is no reporter.
            UsageError: It was closed.
        """
        return self._use(self._source.start())

    def running(self) -> Cell:
        """As `start`, but in the middle of a job: a cell that died since its latest call is not replaced."""
        return self._use(self._source.running())

    def discard_cell(self) -> None:
        """End the running cell, if there is one; the next call has another."""
        self._source.discard_cell()

    def close(self) -> None:
        """End the cell and its spares, for good."""
        self._source.close()
        self._cell = None  # of a dead one, the arena would live on

    def wait_for_spares(self, timeout: float) -> bool:
        """Wait until every spare is there; False if that takes longer (seconds), or none is made any more."""
        return self._source.wait_for_spares(timeout)

    def save(self, seq_id: int, most: int = 2**40) -> bytes:
        """The state of a sequence, from a cell that answers `Save`; of more than ``most`` bytes, nothing.

        Raises:
            ShortageError: This process has no memory for it.
            CellDied: The cell was lost.
        """
        cell = self.running()
        size = self._call(Save(seq_id), Saved).size
        if size > most:
            return b""
        if size > cell.arena.room:
            self._believe(size, "a state", in_memory=not self._source.config.n_gpu_layers)
            cell.reserve([("u1", size)])
            size = self._call(Save(seq_id), Saved).size
        return cell.taken(size)

    def _believe(self, size: int, what: str, *, in_memory: bool = True) -> None:
        """Condemn a cell that tells of so many bytes and cannot have them.

        Args:
            size: Of what it tells of.
            what: That is.
            in_memory: It would have them in its memory already, not on a GPU.

        Raises:
            ShortageError: This process has no room for them: they are to be in the arena, then copied.
            CellDied: It lies.
        """
        held = self.running().resident() if in_memory else 0
        if held and size > held:  # 0: it has died, which the next call will tell
            raise self._lie(f"tells of {what} of {size} bytes, and has {held}")
        if size > (free := available_memory()):
            raise ShortageError(f"{size} bytes for {what}", f"{free} are left")

    def _use(self, cell: Cell) -> Cell:
        if cell is not self._cell:
            self._cell = cell  # first: what it says of itself may be its death
            self._info = cell.info(self._kind)
            self._began()
        return cell

    def _began(self) -> None:
        """A cell is used for the first time. For subclasses."""

    def _call(
        self,
        request: msgspec.Struct,
        reply: type[_T],
        on_ask: Callable[[msgspec.Raw], msgspec.Struct] | None = None,
    ) -> _T:
        """One call of the running cell.

        Raises:
            CellRefused: It answered with an error.
            CellDied: It was lost.
        """
        return self.running().call(request, reply, self._deadline, on_ask)

    def _check(self, rc: int, spans: Any = ()) -> None:
        """Raise `RefusedError` unless a native call returned 0."""
        if rc:
            if rc < -1:  # -2 and -3 leave a context that is not to be trusted
                self.discard_cell()
            raise RefusedError(rc, spans)

    def _finite(self, rows: npt.NDArray[np.float32], what: str) -> None:
        """Condemn the cell if a row has NaN or infinity; ``what`` is completed by the number of the row."""
        finite = np.isfinite(rows).all(axis=-1)
        if not finite.all():
            raise self._condemn(Exit.NON_FINITE, f"NaN or infinity in the {what} {int(finite.argmin())}")

    def _lie(self, what: str) -> CellDied:
        """The error to raise when a living cell said what cannot be."""
        return self._condemn(Exit.PROTOCOL, f"the cell {what}")

    def _condemn(self, how: Exit, why: str) -> CellDied:
        assert self._cell is not None
        return self._cell.condemn(how, why)
