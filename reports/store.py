"""The store: one directory per crash, holding `report.json` (for machines) and `report.txt` (for people).

A report appears by one rename, so a reader sees all of it or nothing. What is read back is untrusted: a
hostile child may have chosen most of its bytes, and anybody may have put anything into the directory.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import secrets
import shutil
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from crumplezone.errors import ReportError
from crumplezone.reports import schema
from crumplezone.reports.schema import Report
from crumplezone.reports.text import printable

MAX_BYTES = 16 << 20
"""The largest report.json that is read or written."""

# No slash, no leading dot: neither "../x" nor a temporary name is an id.
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class _Version(msgspec.Struct):
    schema_version: int = schema.SCHEMA_VERSION


class _UnreadableError(Exception):
    """Why one report cannot be read."""


@dataclass(frozen=True)
class Entry:
    """One directory of the store.

    Attributes:
        id: The directory's name.
        report: What it holds, or None if that cannot be read.
        problem: Why it cannot be read, else empty.
    """

    id: str
    report: Report | None
    problem: str = ""


def default_directory() -> Path:
    """Where reports go if nobody says otherwise: a place that survives a reboot, private to the user.

    Raises:
        ReportError: The user has no home directory.
    """
    try:
        if chosen := os.environ.get("CRUMPLEZONE_REPORTS"):
            return Path(chosen).expanduser()
        # The XDG specification says that a relative value is to be ignored.
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        base = state if state.is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise ReportError(f"no place for crash reports ({error}): set CRUMPLEZONE_REPORTS") from error
    return base / "crumplezone" / "reports"


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
        temporary = self.directory / f".tmp-{report.id}-{os.getpid()}"
        data = _encode(report)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.mkdir(mode=0o700)
            try:
                (temporary / "report.json").write_bytes(data)
                (temporary / "report.txt").write_bytes(text.encode("utf-8", "backslashreplace"))
                temporary.rename(final)  # fails if the id is taken: that directory is not empty
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        except OSError as error:
            raise ReportError(
                f"crash report {report.id} cannot be written to {self.directory}: {error.strerror}. "
                "Make that directory writable, or set CRUMPLEZONE_REPORTS to another."
            ) from error
        return final

    def list(self) -> builtins.list[Entry]:
        """All reports, newest first. One that cannot be read is listed with its problem.

        Raises:
            ReportError: The store itself cannot be read. (One that does not exist yet is empty.)
        """
        found = sorted(self._scan(), reverse=True)
        return [_load(self.directory, name) for _second, _nanoseconds, name in found]

    def read(self, report_id: str) -> Report:
        """Read one report.

        Args:
            report_id: An id, or the beginning of only one.

        Raises:
            ReportError: No such id, several, or a report that cannot be read.
        """
        self.path(report_id)  # refuses what is no id
        names = sorted(name for _, _, name in self._scan() if name.startswith(report_id))
        if report_id in names:
            names = [report_id]
        if not names:
            raise ReportError(
                f"no report {report_id} in {self.directory}: `crumplezone triage list` shows those "
                "there are; --reports names another store."
            )
        if len(names) > 1:
            some = ", ".join(printable(name) for name in names[:5])
            raise ReportError(f"{report_id} begins {len(names)} report ids ({some}, ...): give more of it")
        entry = _load(self.directory, names[0])
        if entry.report is None:
            shown = printable(entry.id)
            raise ReportError(f"report {shown} in {self.directory} cannot be read: {entry.problem}")
        return entry.report

    def _scan(self) -> builtins.list[tuple[str, int, str]]:
        """Sort keys and names: the second in the id, then the directory's own time (a rename keeps it)."""
        try:
            with os.scandir(self.directory) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ReportError(
                f"the reports in {self.directory} cannot be listed: {error.strerror}. "
                "Make that directory readable, or name another with --reports."
            ) from error
        keys = []
        for entry in found:
            with contextlib.suppress(FileNotFoundError):  # deleted since
                if entry.is_symlink() or entry.is_dir():
                    modified = entry.stat(follow_symlinks=False).st_mtime_ns
                    keys.append((entry.name.partition("-")[0], modified, entry.name))
        return keys


def _encode(report: Report) -> bytes:
    try:
        data = schema.encode(report)
    except (ValueError, OverflowError, TypeError, msgspec.MsgspecError) as error:
        raise ReportError(
            f"crash report {report.id} cannot be encoded: {error}. Please report this."
        ) from error
    if len(data) > MAX_BYTES:
        raise ReportError(
            f"crash report {report.id} has {len(data)} bytes, more than {MAX_BYTES}: "
            "shorten its batch or its logs"
        )
    return data


def _load(directory: Path, name: str) -> Entry:
    try:
        return Entry(name, _decode(_read_bytes(directory / name), name))
    except _UnreadableError as error:
        return Entry(name, None, str(error))


def _read_bytes(directory: Path) -> bytes:
    """Read report.json with bounds, following no link and waiting for no pipe."""
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open("report.json", flags, dir_fd=folder)
        finally:
            os.close(folder)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _UnreadableError("report.json is not a regular file")
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _UnreadableError("it has no report.json") from None
    except OSError as error:
        # ELOOP and ENOTDIR are what O_NOFOLLOW says of a link.
        raise _UnreadableError(
            f"report.json cannot be opened ({error.strerror}; links are not followed)"
        ) from error
    if len(data) > MAX_BYTES:
        raise _UnreadableError(f"report.json is larger than {MAX_BYTES} bytes")
    return data


def _decode(data: bytes, name: str) -> Report:
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        # Asked first: a newer report may well fail to decode, and "corrupt" would be the wrong remedy.
        if version > schema.SCHEMA_VERSION:
            known = schema.SCHEMA_VERSION
            raise _UnreadableError(
                f"its schema is newer than this crumplezone's ({known}): upgrade crumplezone"
            )
        report = schema.decode(data)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise _UnreadableError(f"report.json is corrupt: {printable(str(error))[:200]}") from error
    if report.id != name:
        raise _UnreadableError(f"report.json is corrupt: its id is '{printable(report.id[:120])}'")
    return report
