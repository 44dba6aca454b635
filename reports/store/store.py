"""The store: one directory per crash, holding `report.json` (for machines) and `report.txt` (for people).

A report appears by one rename, so a reader sees all of it or nothing. What is read back is untrusted: a
hostile child may have chosen most of its bytes, and anybody may have put anything into the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from crumplezone.errors import ReportError, check_local
from crumplezone.reports.formats.text import render
from crumplezone.reports.printable import printable
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Report
from crumplezone.reports.store import files, retention
from crumplezone.reports.store.index import (
    NO_STAMP,
    Index,
    Row,
    Stamp,
    check_time,
    resolved,
    row_of,
    stamp_of,
)
from crumplezone.reports.store.retention import Count, Ledger, Pruned, Retention
from crumplezone.reports.store.shrink import fit

MAX_BYTES = 16 << 20
"""The largest report.json that is read or written."""

# No slash, no leading dot: neither "../x" nor a temporary name is an id.
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class _Version(msgspec.Struct):
    schema_version: int = schema.SCHEMA_VERSION


class _UnreadableError(Exception):
    """Why one report cannot be read.

    Attributes:
        corrupt: Nobody else could read it either.
    """

    def __init__(self, problem: str, *, corrupt: bool = False) -> None:
        super().__init__(problem)
        self.corrupt = corrupt


@dataclass(frozen=True)
class _File:
    """A report.json: its content, its stamp, and the bytes of all files beside it."""

    data: bytes
    stamp: Stamp
    size: int


def default_directory() -> Path:
    """Where reports go if nobody says otherwise: a place that survives a reboot, private to the user.

    Raises:
        ReportError: The user has no home directory.
        InputError: ``$CRUMPLEZONE_REPORTS`` is a URL.
    """
    if chosen := os.environ.get("CRUMPLEZONE_REPORTS"):
        return _placed("$CRUMPLEZONE_REPORTS", chosen)
    # The XDG specification says that a relative value is to be ignored.
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return _placed(
        "reports", (state if state.is_absolute() else "~/.local/state") / Path("crumplezone/reports")
    )


def directory_of(reports: str | Path | None, field: str = "reports") -> Path:
    """The directory of a store, as somebody has named it; of the default one if nobody has.

    Args:
        reports: A path, or None.
        field: What it is called, for the error.

    Raises:
        InputError: It is a URL.
        ReportError: As `default_directory`; or there is no such place.
    """
    return _placed(field, reports) if reports else default_directory()


def _placed(field: str, path: str | Path) -> Path:
    """Where that is, wherever this process may go: reports are written long after, and errors name them."""
    check_local(field, path)
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # nobody's home
        raise ReportError(f"no place for crash reports ({error}): set CRUMPLEZONE_REPORTS") from error
    except OSError as error:
        problem = f"{field} is {str(path)!r}, a relative path, and the working directory is gone"
        raise ReportError(f"{problem}: give an absolute one") from error


def new_id(now: datetime) -> str:
    """Make an id that sorts by time and does not collide: "20261121T060411Z-3f9a1c"."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Store:
    """A directory of crash reports. Safe for many writers and readers at once.

    Attributes:
        directory: Created by the first write.
    """

    directory: Path

    def path(self, report_id: str) -> Path:
        """The directory of one report, whether or not it exists.

        Raises:
            ReportError: The id could lead out of the store.
        """
        if not _ID.fullmatch(report_id):
            shown = printable(report_id)[:120]
            raise ReportError(
                f"'{shown}' is not a report id: an id has letters, digits, '-', '_' and '.', "
                "and no leading '.'. `crumplezone triage list` shows them."
            )
        return self.directory / report_id

    def write(self, report: Report, text: str) -> Path:
        """Write a report so that it appears whole or not at all.

        Args:
            report: Its id must be new.
            text: What goes into report.txt.

        Returns:
            The report's directory.

        Raises:
            ReportError: It cannot be encoded or written.
        """
        final = self.path(report.id)
        temporary = files.temporary(self.directory, report.id)
        report, data = _encode(report)
        shown = text.encode("utf-8", "backslashreplace")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.mkdir(mode=0o700)
            try:
                (temporary / "report.json").write_bytes(data)
                (temporary / "report.txt").write_bytes(shown)
                stamp = stamp_of((temporary / "report.json").stat())
                temporary.rename(final)  # fails if the id is taken: that directory is not empty
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        except OSError as error:
            raise ReportError(
                f"crash report {report.id} cannot be written to {self.directory}: {error.strerror}. "
                "Make that directory writable, or set CRUMPLEZONE_REPORTS to another."
            ) from error
        Index(self.directory).add([row_of(report, stamp, len(data) + len(shown), datetime.now(UTC))])
        return final

    def has(self, report_id: str) -> bool:
        """Whether there is a report of exactly this id, whatever it holds."""
        return os.path.lexists(self.path(report_id) / "report.json")

    def update(self, report: Report) -> None:
        """Replace a report by a newer version of itself; a reader sees the one or the other.

        Args:
            report: Its id must be in the store.

        Raises:
            ReportError: There is no such report, or it cannot be encoded or written.
        """
        path = self.path(report.id)
        report, data = _encode(report)
        try:
            with _folder(path) as folder:
                # The text first: who sees the new stamp counts the bytes of both new files.
                shown = render(report).encode("utf-8", "backslashreplace")
                files.replace(self.directory, "report.txt", shown, folder)
                stamp = stamp_of(files.replace(self.directory, "report.json", data, folder))
                size = _size(folder)
        except OSError as error:
            raise ReportError(
                f"crash report {report.id} in {self.directory} cannot be updated: {error.strerror}. "
                "`crumplezone triage list` shows whether it is still there."
            ) from error
        Index(self.directory).add([row_of(report, stamp, size, datetime.now(UTC))])

    def rows(self) -> list[Row]:
        """All reports, newest first. One that cannot be read is listed with its problem.

        A partial signature that belongs to another one is replaced by that.

        Only reports that the index does not know, or knows in another state, are read.

        Raises:
            ReportError: The store itself cannot be read. (One that does not exist yet is empty.)
        """
        index = Index(self.directory)
        known, lines = index.load()
        rows: list[Row] = []
        fresh: list[Row] = []
        try:
            for name, stamp in self._scan():
                row = known.get(name)
                if row is None or row.stamp != stamp or stamp == NO_STAMP:
                    row = _examine(self.directory, name)
                    if row is None:
                        continue
                    if row.stamp != NO_STAMP:
                        fresh.append(row)
                rows.append(row)
        finally:  # also when interrupted: the next listing goes on from here
            index.add(fresh)
        if lines + len(fresh) > 2 * max(len(rows), 50):
            index.rewrite(row for row in rows if row.stamp != NO_STAMP)
        return sorted(resolved(rows), key=lambda row: (row.crashed_at, row.id), reverse=True)

    def read(self, report_id: str) -> Report:
        """Read one report.

        Args:
            report_id: An id, or the beginning of only one.

        Raises:
            ReportError: No such id, several, or a report that cannot be read.
        """
        exact = self.path(report_id)  # refuses what is no id
        name = report_id if os.path.lexists(exact) else self._complete(report_id)
        try:
            return _decode(_read(self.directory / name).data, name)
        except _UnreadableError as error:
            raise ReportError(f"report {name} in {self.directory} cannot be read: {error}") from error

    def counts(self) -> dict[str, Count]:
        """How many reports were removed by `prune`, by signature."""
        return Ledger.load(self.directory).settle({entry.name for entry in self._entries()})

    def prune(self, limits: Retention, now: datetime | None = None) -> Pruned:
        """Remove duplicates, oldest first, until limits are met; see `retention.plan` for what stays.

        Also sweeps what writers left behind when they were killed.

        Args:
            limits: What may be kept.
            now: With a time zone. [default: the present]

        Raises:
            ReportError: Another process prunes this store now, or it cannot be read or written.
        """
        try:
            with retention.exclusive(self.directory):
                rows = self.rows()
                doomed, unmet = retention.plan(rows, limits, now or datetime.now(UTC))
                retention.remove(self.directory, doomed, {row.id for row in rows})
                retention.sweep(self.directory)
        except FileNotFoundError:  # no store yet
            return Pruned()
        except BlockingIOError as error:
            raise ReportError(
                f"another process is pruning {self.directory}: try again when it has finished"
            ) from error
        except OSError as error:
            raise ReportError(
                f"the reports in {self.directory} cannot be pruned: {error.strerror}. "
                "Make that directory writable."
            ) from error
        return Pruned(tuple(row.id for row in doomed), sum(row.bytes for row in doomed), unmet)

    def _complete(self, prefix: str) -> str:
        names = sorted(entry.name for entry in self._entries() if entry.name.startswith(prefix))
        if not names:
            raise ReportError(
                f"no report {prefix} in {self.directory}: `crumplezone triage list` shows those "
                "there are; --reports names another store."
            )
        if len(names) > 1:
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ReportError(f"{prefix} begins {len(names)} report ids ({some}): give more of it")
        return names[0]

    def _entries(self) -> list[os.DirEntry[str]]:
        """The directories that could be reports, and links (to be listed as a problem)."""
        try:
            with os.scandir(self.directory) as entries:
                return [
                    entry
                    for entry in entries
                    if _ID.fullmatch(entry.name)
                    and (entry.is_dir(follow_symlinks=False) or entry.is_symlink())
                ]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ReportError(
                f"the reports in {self.directory} cannot be listed: {error.strerror}. "
                "Make that directory readable, or name another with --reports."
            ) from error

    def _scan(self) -> Iterator[tuple[str, Stamp]]:
        """Each report's name and present stamp."""
        directory = os.fspath(self.directory)
        for entry in self._entries():
            stamp = NO_STAMP
            if not entry.is_symlink():
                with contextlib.suppress(OSError):  # none: to be looked at
                    stamp = stamp_of(os.lstat(f"{directory}/{entry.name}/report.json"))
            yield entry.name, stamp


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[int]:
    folder = files.open_folder(path)
    try:
        yield folder
    finally:
        os.close(folder)


def _size(folder: int) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)


def _encode(report: Report) -> tuple[Report, bytes]:
    """The report as it will be read back, and its bytes."""
    try:
        report = schema.utf8(report)
        report, data = fit(report, MAX_BYTES)
    except (ValueError, OverflowError, TypeError, msgspec.MsgspecError) as error:
        raise ReportError(
            f"crash report {report.id} cannot be encoded: {error}. Please report this."
        ) from error
    return report, data


def _examine(directory: Path, name: str) -> Row | None:
    """Make the row of a report by reading it; None if it has been removed."""
    path = directory / name
    report, stamp, size, problem, corrupt = None, NO_STAMP, 0, "", False
    try:
        file = _read(path)
        stamp, size = file.stamp, file.size
        report = _decode(file.data, name)
    except _UnreadableError as error:
        problem, corrupt = str(error), error.corrupt
    try:
        modified = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        check_time(modified)
    except FileNotFoundError:
        return None
    except (ValueError, OverflowError):  # a time that no calendar has
        modified = datetime.fromtimestamp(0, UTC)
    if report:
        return row_of(report, stamp, size, modified)
    return Row(id=name, stamp=stamp, crashed_at=modified, bytes=size, problem=problem, corrupt=corrupt)


def _read(path: Path) -> _File:
    """Read report.json with bounds."""
    try:
        with _folder(path) as folder:
            data, found = files.read("report.json", MAX_BYTES, folder)
            return _File(data, stamp_of(found), _size(folder))
    except FileNotFoundError:
        raise _UnreadableError("it has no report.json", corrupt=True) from None
    except OSError as error:
        corrupt = error.errno in (errno.EINVAL, errno.EFBIG)
        # ELOOP and ENOTDIR are what O_NOFOLLOW says of a link.
        raise _UnreadableError(
            f"report.json cannot be read ({error.strerror}; links are not followed)", corrupt=corrupt
        ) from error


def _decode(data: bytes, name: str) -> Report:
    try:
        data = files.unmarked(data)
        version = msgspec.json.decode(data, type=_Version).schema_version
        # Asked first: a newer report may well fail to decode, and "corrupt" would be the wrong remedy.
        if version > schema.SCHEMA_VERSION:
            known = schema.SCHEMA_VERSION
            raise _UnreadableError(
                f"its schema is newer than this crumplezone's ({known}): upgrade crumplezone"
            )
        report = schema.decode(data)
        if report.id != name:
            raise ValueError(f"its id is '{report.id[:120]}'")
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        problem = f"report.json is corrupt: {printable(str(error))[:200]}"
        raise _UnreadableError(problem, corrupt=True) from error
    return report
