"""Retention: how much is kept of all reports. What is removed is still counted."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec

from crumplezone.errors import InputError, check_integer
from crumplezone.reports.store import files
from crumplezone.reports.store.index import Row, check_time

_LEDGER = ".pruned.json"
_LEDGER_BYTES = 64 << 20
_LOCK = ".lock"
_Time = Annotated[datetime, msgspec.Meta(tz=True)]
_ABANDONED_S = 3600.0  # a temporary this old has no writer any more


@dataclass(frozen=True)
class Retention:
    """Limits on a store. None: no limit.

    Attributes:
        count: The most reports.
        age: The oldest report.
        bytes: The most bytes of all reports together.

    Raises:
        InputError: A limit is negative.
    """

    count: int | None = None
    age: timedelta | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("count", self.count), ("bytes", self.bytes)):
            if limit is not None:
                check_integer(name, limit, 0, 1 << 62)
        if self.age is not None and self.age < timedelta(0):
            raise InputError("age", self.age, "must not be negative")


DEFAULT_RETENTION = Retention(count=10_000, bytes=1 << 30)


@dataclass(frozen=True)
class Pruned:
    """What `Store.prune` did.

    Attributes:
        removed: Ids, oldest first.
        freed: Bytes.
        unmet: Limits that are still exceeded, since no more may be removed; a sentence each.
    """

    removed: tuple[str, ...] = ()
    freed: int = 0
    unmet: tuple[str, ...] = ()


class Count(msgspec.Struct, frozen=True):
    """Reports of one signature of their own ("": none is known) that were removed."""

    signature: str
    removed: Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]
    first_seen: _Time
    last_seen: _Time

    def __post_init__(self) -> None:
        check_time(self.first_seen)
        check_time(self.last_seen)

    @classmethod
    def of(cls, row: Row) -> Count:
        """Count one report."""
        return cls(row.own, 1, row.crashed_at, row.crashed_at)

    def plus(self, other: Count) -> Count:
        """The sum of two counts of one signature."""
        first, last = min(self.first_seen, other.first_seen), max(self.last_seen, other.last_seen)
        return Count(self.signature, self.removed + other.removed, first, last)


def removed(rows: Iterable[Row], counts: Mapping[str, Count]) -> Count | None:
    """What was removed of the signatures that some rows bear, in sum.

    Args:
        rows: Those of one group.
        counts: By signature: `Store.counts`.
    """
    found = [counts[name] for name in {row.own for row in rows} if name in counts]
    return functools.reduce(Count.plus, found) if found else None


class Ledger(msgspec.Struct, frozen=True):
    """What was removed. It is written before the removal, so that a kill between them counts nothing twice.

    Attributes:
        counts: One for each signature.
        pending: By id: to be counted once the report of that id is gone.
    """

    counts: list[Count] = []
    pending: dict[str, Count] = {}

    @classmethod
    def load(cls, directory: Path) -> Ledger:
        """Read the ledger of a store; one that is missing or damaged is empty."""
        try:
            data, _ = files.read(directory / _LEDGER, _LEDGER_BYTES)
            return msgspec.json.decode(data, type=cls)
        except (OSError, ValueError, RecursionError):
            return cls()

    def save(self, directory: Path) -> None:
        """Replace the ledger of a store.

        Raises:
            OSError: It cannot be written.
        """
        files.replace(directory, _LEDGER, msgspec.json.encode(self))

    def settle(self, present: Collection[str]) -> dict[str, Count]:
        """Sum up by signature, without the pending of ids that are still present."""
        gone = (count for name, count in self.pending.items() if name not in present)
        total: dict[str, Count] = {}
        for count in (*self.counts, *gone):
            known = total.get(count.signature)
            total[count.signature] = known.plus(count) if known else count
        return total


def plan(rows: Iterable[Row], limits: Retention, now: datetime) -> tuple[list[Row], tuple[str, ...]]:
    """Choose what to remove: duplicates, oldest first, until every limit is met.

    The first report of a signature stays, whatever the limits: of those kept in full the earliest. So does
    what this process cannot read; but what is corrupt goes when it is too old.

    Returns:
        The rows to remove, and a sentence for each limit that is exceeded nevertheless.
    """
    kept = sorted(rows, key=lambda row: (row.crashed_at, row.id))

    def old(row: Row) -> bool:
        return limits.age is not None and now - row.crashed_at > limits.age

    count, size, doomed = len(kept), sum(row.bytes for row in kept), []
    for row in _removable(kept, old):
        # Oldest first, so those that are too old come before the others, and the first to stay ends it.
        if not (old(row) or _over(count, limits.count) or _over(size, limits.bytes)):
            break
        doomed.append(row)
        count, size = count - 1, size - row.bytes
    gone = {row.id for row in doomed}
    too_old = sum(old(row) for row in kept if row.id not in gone)
    unmet = [
        (_over(count, limits.count), f"{count} reports are left, more than {limits.count}"),
        (_over(size, limits.bytes), f"{size} bytes are left, more than {limits.bytes}"),
        (too_old > 0, f"{too_old} reports older than {limits.age} are left"),
    ]
    because = "the first of a signature is never removed, nor what cannot be read"
    return doomed, tuple(f"{text}: {because}" for exceeded, text in unmet if exceeded)


def _over(value: int, limit: int | None) -> bool:
    return limit is not None and value > limit


def _removable(oldest_first: list[Row], old: Callable[[Row], bool]) -> list[Row]:
    firsts: dict[str, Row] = {}
    for row in oldest_first:
        known = firsts.setdefault(row.own, row)
        if known.same_as and not row.same_as:
            firsts[row.own] = row
    return [
        row
        for row in oldest_first
        if (row.corrupt and old(row)) or (row.signature and row is not firsts[row.own])
    ]


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Exclude other pruners of a store, who would overwrite the ledger. Writers and readers go on.

    Raises:
        BlockingIOError: There is another.
        OSError: The store is missing or cannot be written.
    """
    # Open for writing: NFS refuses an exclusive lock otherwise, see flock(2).
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(directory / _LOCK, flags, 0o600), "rb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:  # by closing it alone, a fork of this process would hold it on (flock(2))
            fcntl.flock(file, fcntl.LOCK_UN)


def remove(directory: Path, doomed: list[Row], present: Collection[str]) -> None:
    """Count reports as removed, and remove them, each at once for its readers.

    Args:
        directory: The store, held by `exclusive`.
        doomed: The reports.
        present: The ids of all reports, these among them.

    Raises:
        OSError: A report cannot be removed. It is not counted then.
    """
    if doomed:
        counts = Ledger.load(directory).settle(present)
        Ledger([*counts.values()], {row.id: Count.of(row) for row in doomed}).save(directory)
    for row in doomed:
        hidden = files.temporary(directory, row.id)
        with contextlib.suppress(FileNotFoundError):  # removed by hand since it was listed
            (directory / row.id).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what writers and pruners left behind when they were killed."""
    with os.scandir(directory) as entries:
        left = [entry for entry in entries if entry.name.startswith(files.TEMPORARY)]
    for entry in left:
        with contextlib.suppress(OSError):
            if time.time() - entry.stat(follow_symlinks=False).st_mtime < _ABANDONED_S:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()
