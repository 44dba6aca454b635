"""Triage: which crashes the store holds, one by one and by signature."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from crumplezone.errors import ReportError
from crumplezone.reports.analysis import signature
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Exit, VerdictKind
from crumplezone.reports.store.index import Row
from crumplezone.reports.store.retention import Count, removed
from crumplezone.reports.store.store import Store

if TYPE_CHECKING:
    from crumplezone.diagnostics.triage.cluster import Stack
SHORT = 12
"""As much of a signature as tables show, and more than enough to name one."""


@dataclass(frozen=True)
class Filter:
    """Which rows are wanted: those that meet every part that is given.

    Attributes:
        signature: The beginning of a signature's id.
        exit: How the cell ended.
        verdict: Whose fault it was shown to be.
        model: Part of the model's path or description, in any case.
        since: The earliest crash, with a time zone.
    """

    signature: str = ""
    exit: Exit | None = None
    verdict: VerdictKind | None = None
    model: str = ""
    since: datetime | None = None

    def matches(self, row: Row) -> bool:
        """Whether a row is wanted."""
        model = f"{row.model}\n{row.description}".casefold()
        return (
            (row.signature.startswith(self.signature) or row.own.startswith(self.signature))
            and self.exit in (None, row.exit)
            and self.verdict in (None, row.verdict)
            and self.model.casefold() in model
            and (self.since is None or row.crashed_at >= self.since)
        )


@dataclass(frozen=True)
class Group:
    """All crashes of one signature. Its strings are not yet safe to print.

    Attributes:
        signature: The id; empty for the group of all reports that cannot be read.
        title: The signature in words.
        confidence: "high" or "low".
        count: Crashes, those removed by `Store.prune` included.
        pruned: How many of them were removed.
        first_seen: Of all crashes, those removed included.
        last_seen: Likewise.
        exits: How many of the present reports ended how.
        verdicts: Likewise; reports without a verdict are not in it.
        versions: How many came from which version of llama.cpp.
        models: How many came from which model file.
        first: Id of the earliest report, of those kept in full if there is one.
        latest: Id of the latest report.
    """

    signature: str
    title: str
    confidence: str
    count: int
    pruned: int
    first_seen: datetime
    last_seen: datetime
    exits: dict[str, int]
    verdicts: dict[str, int]
    versions: dict[str, int]
    models: dict[str, int]
    first: str
    latest: str


def rows(reports: Iterable[Row], wanted: Filter) -> list[Row]:
    """The wanted rows, in the same order."""
    return [row for row in reports if wanted.matches(row)]


def cells(row: Row) -> tuple[str, ...]:
    """Id, time, exit, signal, top frame, signature, verdict and result, safe to print.

    "-" stands for an empty cell, so that columns stay columns.
    """
    found = (
        row.id,
        time_text(row.crashed_at),
        row.exit or "unreadable",
        row.signal,
        row.top or row.title,
        row.signature[:SHORT],
        row.verdict or "",
        row.problem or row.result,
    )
    return tuple(printable(cell) or "-" for cell in found)


def time_text(time: datetime) -> str:
    """A time as tables show it: "2026-11-21T06:04:11Z"."""
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def groups(reports: Iterable[Row], counts: Mapping[str, Count]) -> list[Group]:
    """Group reports by signature, the most frequent first.

    Args:
        reports: The rows to group.
        counts: What was pruned, by signature: `Store.counts`. Leave it empty for rows that were filtered by
            more than their signature: nothing else is known of what was pruned.
    """
    members: dict[str, list[Row]] = defaultdict(list)
    for row in reports:
        members[row.signature].append(row)
    found = [_group(rows_of_one, removed(rows_of_one, counts)) for rows_of_one in members.values()]
    return sorted(found, key=lambda group: (group.count, group.last_seen), reverse=True)


def near_duplicates(store: Store, found: Sequence[Group]) -> dict[str, int]:
    """Number the groups so that those whose stacks are much alike have one number: they are probably one bug.

    Reads the first report of each group.

    Returns:
        By signature, from 1 in the order of the groups.
    """
    from crumplezone.diagnostics.triage.cluster import clusters  # numpy, which a list does not need

    alike = clusters([_stack(store, group) for group in found])
    return {found[i].signature: number for number, cluster in enumerate(alike, 1) for i in cluster}


def _stack(store: Store, group: Group) -> Stack:
    from crumplezone.diagnostics.triage.cluster import Stack

    try:
        report = store.read(group.first)
    except ReportError:  # one that cannot be read, or was removed since
        return Stack(group.signature, ())
    signed, frames = report.signature or signature.sign(report), signature.frames(report)
    # Without frames nothing is known to be alike.
    return Stack(signed.fault_class if frames else signed.id, tuple(frames))


def _group(found: list[Row], gone: Count | None) -> Group:
    oldest_first = sorted(found, key=lambda row: (row.crashed_at, row.id))
    # Of equals, min keeps the first.
    first = min(oldest_first, key=lambda row: (row.same_as != "", row.signed != ""))
    latest = oldest_first[-1]
    seen = [oldest_first[0].crashed_at, latest.crashed_at]
    if gone:
        seen += [gone.first_seen, gone.last_seen]
    pruned = gone.removed if gone else 0
    return Group(
        signature=first.signature,
        title=first.title if first.signature else "cannot be read",
        confidence=first.confidence,
        count=len(found) + pruned,
        pruned=pruned,
        first_seen=min(seen),
        last_seen=max(seen),
        exits=_tally(row.exit for row in found),
        verdicts=_tally(row.verdict for row in found),
        versions=_tally(row.llama_cpp for row in found),
        models=_tally(row.model for row in found),
        first=first.id,
        latest=latest.id,
    )


def _tally(values: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(str(value) for value in values if value).most_common())
