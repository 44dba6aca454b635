"""Triage: what the store holds, one row per crash."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from crumplezone.reports.store import Entry
from crumplezone.reports.text import frame_name, printable, signal_name, top_frame

HEADERS = ("id", "when", "exit", "signal", "top frame", "result")


@dataclass(frozen=True)
class Row:
    """One crash, in the order of `HEADERS`. All of it is safe to print."""

    id: str
    when: str
    exit: str
    signal: str
    top: str
    result: str

    def cells(self) -> tuple[str, ...]:
        """The cells, "-" for one that is empty, so that columns stay columns when split on blanks."""
        return tuple(cell or "-" for cell in astuple(self))


def row(entry: Entry) -> Row:
    """Make the row of one entry; one that cannot be read has its problem for a result."""
    name = printable(entry.id)
    report = entry.report
    if report is None:
        return Row(name, "", "unreadable", "", "", printable(entry.problem))
    frame = top_frame(report)
    return Row(
        id=name,
        when=printable(report.crashed_at),
        exit=report.evidence.exit.value,
        signal=signal_name(report),
        top=frame_name(frame) if frame else "",
        result=printable(report.result),
    )


def rows(entries: Iterable[Entry]) -> list[Row]:
    """Make the rows of a listing, in the same order."""
    return [row(entry) for entry in entries]
