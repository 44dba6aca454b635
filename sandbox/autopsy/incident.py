"""One death of a process, as its caller gets it."""

from __future__ import annotations

import datetime as dt
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Exit, Frame


class Findings(Future[Evidence]):
    """The evidence of a death. How it ended is known before the rest, which may have to wait for a helper.

    Attributes:
        wanted: Somebody waits to know how it ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wanted = threading.Event()
        self._exit = Future[Exit]()

    def tell(self, how: Exit) -> None:
        """For the autopsy: it is known now, and will not change."""
        if not self._exit.done():
            self._exit.set_result(how)

    def exit(self) -> Exit:
        """How it ended. Waits for that, and has it looked at without delay."""
        self.wanted.set()
        return self._exit.result()


@dataclass(frozen=True)
class Incident:
    """The death of a cell. ``evidence`` is gathered beside the caller and is always set in the end."""

    phase: str
    crashed_at: dt.datetime
    evidence: Future[Evidence]
    caller: list[Frame]

    def exit(self) -> Exit:
        """How it ended. Waits for that, but for no stacks."""
        found = self.evidence
        return found.exit() if isinstance(found, Findings) else found.result().exit

    @classmethod
    def of(cls, died: CellDied) -> Self:
        """What an error tells of. One that was unpickled has lost it."""
        assert isinstance(died.incident, cls)
        return died.incident
