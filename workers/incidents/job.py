"""One job as its reports will tell it: the rungs tried, the crashes met, how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from crumplezone.reports.records.report import (
    BatchRecord,
    LadderStep,
    Outcome,
)
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.workers.protocol.config import CellConfig, CellInfo


@dataclass
class _Crash:
    id: str
    incident: Incident
    rung: str
    batch: BatchRecord | None
    config: CellConfig | None
    info: CellInfo | None
    path: str
    command: Sequence[str] = ()


@dataclass
class JobRecord:
    """One job: the rungs it tried, the crashes it met, and how it ended.

    Attributes:
        blamed: Sequences that failed and were seen to crash alone.
        no_cell: Why no safe cell can be had, or an empty string.
        ended: It was handed over: nothing of it changes any more.
    """

    steps: list[LadderStep] = field(default_factory=list)
    crashes: list[_Crash] = field(default_factory=list)
    blamed: list[int] = field(default_factory=list)
    result: str = ""
    no_cell: str = ""
    ended: bool = False

    @property
    def reports(self) -> list[str]:
        """Directories of the reports of its crashes, written or to be written."""
        return [crash.path for crash in self.crashes]

    def step(
        self, rung: str, outcome: Outcome, sequences: list[int], detail: str = "", ms: float = 0.0
    ) -> None:
        """Note that a rung was tried."""
        self.steps.append(LadderStep(rung, outcome, sequences, detail, round(ms, 2)))
