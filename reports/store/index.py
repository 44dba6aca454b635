"""The index: one row per report, so that a listing need not read the reports.

It is a cache, and the directories are the truth. A row counts only as long as it bears the stamp of its
report.json, so the file may be torn, stale, foreign or gone: a lost row costs one more reading of one report.
That is why writers take no lock: none of them ever waits for another, alive or stopped.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from crumplezone.reports.analysis import signature
from crumplezone.reports.analysis.same import canonical
from crumplezone.reports.analysis.stack import frame_name, signal_name, top_frame
from crumplezone.reports.records.report import SCHEMA_VERSION, Exit, Report, Signature, VerdictKind
from crumplezone.reports.store import files

NAME = ".index.jsonl"
"""Hidden, like all that is not a report: an id has no leading dot."""

MAX_BYTES = 256 << 20
"""The largest index that is read: some 400,000 rows. A larger one is replaced."""

_MAX_CHARS = 512
_MAX_PARTS = 8  # of a key
_VERSION = 2  # of Row and row_of

_Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Stamp = tuple[int, int, int]
"""A state of report.json: mtime in nanoseconds, size, inode (which differs after two updates in one tick)."""

NO_STAMP: Stamp = (0, 0, 0)
"""The stamp of what is looked at anew each time."""

_Text = Annotated[str, msgspec.Meta(max_length=_MAX_CHARS)]


class Row(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    gc=False,
    tag_field="row",
    tag=f"{SCHEMA_VERSION}.{signature.VERSION}.{_VERSION}",  # rows of other versions are ignored
):
    """What a listing shows of one report. Its strings are bounded, but not yet safe to print."""

    id: _Text
    stamp: Stamp = NO_STAMP
    crashed_at: Annotated[datetime, msgspec.Meta(tz=True)]  # if the report does not say: its directory's time
    exit: Exit | None = None  # None: it cannot be read
    signal: _Text = ""
    top: _Text = ""  # the top frame in one line
    result: _Text = ""
    signature: _Text = ""
    signed: _Text = ""  # the report's own signature, where `resolved` has found that it belongs to another
    title: _Text = ""  # the signature's
    confidence: _Text = ""
    fault_class: _Text = ""
    key: tuple[_Text, ...] = ()
    place: _Text = ""
    verdict: VerdictKind | None = None
    model: _Text = ""  # the path
    description: _Text = ""  # of the model
    llama_cpp: _Text = ""  # version
    llama_cpp_python: _Text = ""
    redacted: bool = False
    same_as: _Text = ""
    bytes: _Bytes = 0  # of all files of the report
    problem: _Text = ""  # why it cannot be read
    corrupt: bool = False  # it cannot be read, and nobody else could

    def __post_init__(self) -> None:
        check_time(self.crashed_at)

    @property
    def own(self) -> str:
        """The id of the report's own signature."""
        return self.signed or self.signature

    def identity(self) -> Signature:
        """What a signature is compared by."""
        key = list(self.key)
        return Signature(self.own, self.fault_class, key, self.title, self.confidence, place=self.place)


def check_time(time: datetime) -> None:
    """Raise a ValueError for a time at an end of the calendar, which another time zone may not have."""
    if not MINYEAR < time.year < MAXYEAR:
        raise ValueError(f"no time in the year {time.year}")


def stamp_of(found: os.stat_result) -> Stamp:
    """The stamp of a report.json."""
    return found.st_mtime_ns, found.st_size, found.st_ino


def row_of(report: Report, stamp: Stamp, size: int, otherwise: datetime) -> Row:
    """Make the row of a report.

    Args:
        report: What was read or written.
        stamp: Of the report.json that holds it.
        size: Bytes of all its files.
        otherwise: When it crashed, if the report has no valid time.
    """
    frame = top_frame(report)
    signed = signature.signature_of(report)
    verdict, model = report.verdict, report.model
    versions = report.environment.versions
    return Row(
        id=report.id,
        stamp=stamp,
        crashed_at=_time(report.crashed_at) or otherwise,
        exit=report.evidence.exit,
        signal=_cut(signal_name(report)),
        top=_cut(frame_name(frame)) if frame else "",
        result=_cut(report.result),
        signature=_cut(signed.id),
        title=_cut(signed.title),
        confidence=_cut(signed.confidence),
        fault_class=_cut(signed.fault_class),
        key=tuple(_cut(part) for part in signed.key[:_MAX_PARTS]),
        place=_cut(signed.place),
        verdict=verdict.kind if verdict else None,
        model=_cut(model.path) if model else "",
        description=_cut(model.description) if model else "",
        llama_cpp=_cut(versions.get("llama.cpp", "")),
        llama_cpp_python=_cut(versions.get("llama-cpp-python", "")),
        redacted=report.redacted,
        same_as=_cut(report.same_as),
        bytes=size,
    )


def resolved(rows: Sequence[Row]) -> list[Row]:
    """Rows of which each bears the signature that its crash is counted by, see `analysis.same.canonical`."""
    seen = {(row.signature, row.place): row for row in rows if row.signature}
    heads = canonical(row.identity() for row in seen.values())
    return [_counted_by(row, heads[row.signature]) if row.signature in heads else row for row in rows]


def _counted_by(row: Row, head: Signature) -> Row:
    return msgspec.structs.replace(
        row, signature=head.id, signed=row.signature, title=head.title, confidence=head.confidence
    )


@dataclass(frozen=True)
class Index:
    """The index of one store. A failure to write it is no error: it is only a cache.

    Attributes:
        directory: The store.
    """

    directory: Path

    def load(self) -> tuple[dict[str, Row], int]:
        """Read the last row of each id, and how many lines the file has (very many, if it is no index)."""
        try:
            data, _ = files.read(self.directory / NAME, MAX_BYTES)
        except FileNotFoundError:
            return {}, 0
        except OSError:
            return {}, sys.maxsize
        rows = {}
        lines = data.split(b"\n")
        for line in lines:
            try:
                row = _decoder.decode(line)
            except (ValueError, RecursionError):  # torn, foreign or of another version
                continue
            rows[row.id] = row
        return rows, len(lines)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows."""
        # Linux appends each write whole (O_APPEND, write(2)). A line begins with its line feed, so that one
        # torn by a full disk spoils no other.
        data = b"".join(b"\n" + _encode(row) for row in rows)
        if not data:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with (
            contextlib.suppress(OSError),
            open(os.open(self.directory / NAME, flags, 0o600), "wb", buffering=0) as file,
        ):
            file.write(data)

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace the file by one with these rows only."""
        with contextlib.suppress(OSError):
            files.replace(self.directory, NAME, b"\n".join(map(_encode, rows)))


_decoder = msgspec.json.Decoder(Row)
_encode = msgspec.json.Encoder().encode


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
        check_time(time)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except ValueError:
        return None
