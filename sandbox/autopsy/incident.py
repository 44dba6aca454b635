"""One death of a process, as its caller gets it."""

from __future__ import annotations

import datetime as dt
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Frame


@dataclass(frozen=True)
class Incident:
    """The death of a cell. ``evidence`` is gathered beside the caller and is always set in the end."""

    phase: str
    crashed_at: dt.datetime
    evidence: Future[Evidence]
    caller: list[Frame]

    @classmethod
    def of(cls, died: CellDied) -> Self:
        """What an error tells of. One that was unpickled has lost it."""
        assert isinstance(died.incident, cls)
        return died.incident
