"""Whose doing the death of a cell was: what somebody else killed says nothing of its work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import Evidence, Exit
from crumplezone.sandbox.autopsy.incident import Incident

_T = TypeVar("_T")
KILLS_MAX = 8  # in a row, with nothing done between: what is killed that often will be killed again
_UNCLEAR_MAX = 2  # of starts, likewise
_HURRIED = 3  # starts; before each that follows there is a pause
_PAUSE = 0.5  # seconds
_STARTING = 60.0  # seconds in which starts may be killed as often as it takes: on a busy machine each is long


def was_killed(died: CellDied) -> bool:
    """Whether somebody else killed a cell. Waits for the autopsy, until it knows how the cell ended."""
    return Incident.of(died).exit() is Exit.KILLED


def by_itself(died: CellDied) -> bool:
    """Whether a cell died of its work, and of nothing that its surroundings did or lacked. Waits likewise."""
    return Incident.of(died).exit() not in {Exit.KILLED, Exit.OOM, Exit.FAILED_START}


class Deaths:
    """The cells that were lost by trying something, in a row.

    Args:
        own: How many it may lose by itself, and still be tried again.
    """

    def __init__(self, own: int = 0) -> None:
        self._own = own
        self._died: list[CellDied] = []

    def own(self) -> int:
        """How many died of their work. Waits for the autopsies."""
        return sum(not was_killed(died) for died in self._died)

    def again(self, died: CellDied) -> bool:
        """Note a death; whether to try again. Waits for autopsies only where whose doing it was matters."""
        self._died.append(died)
        return len(self._died) <= self._own or (len(self._died) <= KILLS_MAX and self.own() <= self._own)


def retried(work: Callable[[], _T], tell: Callable[[CellDied, bool], None], own: int = 0) -> _T:
    """Do something; again, in a new cell, where one was lost by it.

    Args:
        work: What there is to do.
        tell: Called with each death, and whether there is another trial; the last of them is raised then.
        own: As for `Deaths`.

    Raises:
        CellDied: There is none.
    """
    deaths = Deaths(own)
    while True:
        try:
            return work()
        except CellDied as died:
            again = deaths.again(died)
            tell(died, again)
            if not again:
                raise


class Starts:
    """The cells that were lost in a row before they were ready."""

    def __init__(self) -> None:
        self.lost = self._killed = self._unclear = 0
        self._began = time.monotonic()

    def loader(self, evidence: Evidence) -> bool:
        """Whether the one that was lost crashed by what it loaded, and nobody else had a hand in it."""
        return not (_killed(evidence) or _unloaded(evidence) or _unclear(evidence))

    def again(self, evidence: Evidence) -> bool:
        """Note another; whether to start one more, which is now.

        Where somebody kills cells, those may be his too of which nobody knows it.
        """
        self.lost += 1
        self._killed += _killed(evidence)
        self._unclear += not (_killed(evidence) or _unloaded(evidence))
        if self._killed:
            again = self.lost <= KILLS_MAX or time.monotonic() - self._began < _STARTING
        else:
            again = self.lost <= KILLS_MAX and self._unclear <= _UNCLEAR_MAX
        if again and self.lost >= _HURRIED:
            time.sleep(_PAUSE)
        return again


def _killed(evidence: Evidence) -> bool:
    return evidence.exit is Exit.KILLED


def _unloaded(evidence: Evidence) -> bool:
    """Whether it had not begun to load anything: it was not armed yet, and nobody knows who sent a signal."""
    return not evidence.flight and evidence.exit is not Exit.HANG


def _unclear(evidence: Evidence) -> bool:
    """Whether nobody knows what ended it: without a hold, a signal does not say who sent it (wait(2)).

    What was killed for memory may have been the largest process, and not the one that asked for more.
    """
    unheld = evidence.fault is not None and evidence.fault.code is None
    return evidence.exit is Exit.OOM or (
        evidence.exit is not Exit.HANG and (evidence.returncode is None or unheld)
    )
