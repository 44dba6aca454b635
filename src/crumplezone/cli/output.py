"""What the commands share: the store, identifiers, tables and JSON; what --quiet leaves out."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from crumplezone.errors import InputError, ReportError, UsageError
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Report
from crumplezone.reports.store.store import Store, directory_of

Reports = Annotated[
    Path | None,
    typer.Option(
        "--reports", metavar="DIR", help="The store. [default: $CRUMPLEZONE_REPORTS or the state directory]"
    ),
]
ReportId = Annotated[str, typer.Argument(metavar="ID", help="A report's id, or the beginning of only one.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, in ASCII, for programs.")]
Model = Annotated[
    Path | None, typer.Option("--model", metavar="FILE", help="Where the model is now, if it has moved.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here. [default: stdout]")]

_quiet = False

_AGO = re.compile(r"(\d{1,6})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_GAP = "  "
_FAIR = 26  # characters: as much as a column gets before another is left out for it
_LEAST = 8
_BREAK = re.compile(r"(?<=\s)|(?<=::)")


def be_quiet(wanted: bool) -> None:
    """Leave out what is neither a result nor an error from now on: progress, and hints."""
    global _quiet  # of the process: it runs one command
    _quiet = _quiet or wanted


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _quiet


def hint(text: str) -> None:
    """Say on stderr what is neither a result nor an error. It must be safe to print."""
    if not _quiet:
        typer.echo(text, err=True)


def to_type(command: str, reports: Path | None) -> str:
    """A command of this program as its user has to type it, about the store that this one was given."""
    program = "crumplezone"
    if not shutil.which(program):  # not on PATH: as this one was started
        own = Path(sys.argv[0])
        program = f"{sys.executable} -m {program}" if own.stem == "__main__" else str(own)
    store = f" --reports {shlex.quote(str(reports))}" if reports else ""
    return f"{program} {command}{store}"


def open_store(reports: Path | None) -> Store:
    """The store that was named, or the default one."""
    return Store(directory_of(reports, "--reports"))


def read_report(store: Store, report_id: str) -> Report:
    """`Store.read`, with a better word for an empty store than that this one report is not in it.

    Raises:
        ReportError: It cannot be found or read.
    """
    try:
        return store.read(report_id)
    except ReportError:
        if store.rows():
            raise
        raise ReportError(emptiness(store)) from None


def emptiness(store: Store) -> str:
    """Says that a store is empty, and what to do."""
    missing = "" if store.directory.exists() else ", which does not exist yet"
    return f"No crash reports in {printable(str(store.directory))}{missing}. --reports names another store."


@contextlib.contextmanager
def about(report: Report) -> Iterator[None]:
    """Name the report in errors that are about its content.

    Raises:
        ReportError: It does not hold what is asked of it, or a number out of bounds.
    """
    try:
        yield
    except (InputError, UsageError) as problem:
        raise ReportError(f"report {report.id}: {problem}") from problem


def plural(count: int, noun: str) -> str:
    """A count and its noun: "1 token", "2 tokens"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def print_json(value: Any) -> None:
    """Print as JSON, in ASCII: nothing in it can act on a terminal."""
    typer.echo(json.dumps(msgspec.to_builtins(value), indent=1, ensure_ascii=True))


def print_lines(rows: Iterable[Sequence[str]]) -> None:
    """Print tab-separated lines. The cells must be safe to print."""
    typer.echo("\n".join("\t".join(row) for row in rows))  # in one piece: ten thousand calls take their time


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], spare: int) -> None:
    """Print a table as wide as the terminal. The cells must be safe to print, but for line feeds.

    Args:
        headers: One for each column.
        rows: Cells. The first of each is never broken, so that an id can be copied.
        spare: So many columns at the end may be left out of a narrow table.
    """
    table = [headers, *rows]
    width = shutil.get_terminal_size().columns
    widths = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*table, strict=True)
    ]
    while spare and _total([min(each, _FAIR) for each in widths]) > width:
        del widths[-1]
        spare -= 1
    while _total(widths) > width and max(widths[1:]) > _LEAST:
        widths[widths.index(max(widths[1:]), 1)] -= 1
    typer.echo("\n".join(line for row in table for line in _lines(row, widths)))


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """One row of a table, of as many lines as its highest cell."""
    columns = [_fold(cell, room) for cell, room in zip(row, widths, strict=False)]
    for n in range(max(map(len, columns))):
        cells = [lines[n] if n < len(lines) else "" for lines in columns]
        yield _GAP.join(cell.ljust(room) for cell, room in zip(cells, widths, strict=True)).rstrip()


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _fold(cell: str, room: int) -> list[str]:
    """Lines of at most so many characters, broken after spaces and "::" where that is possible."""
    lines = []
    for text in cell.split("\n"):
        lines.append("")
        for piece in _BREAK.split(text):
            rest = piece
            while len(lines[-1]) + len(rest.rstrip()) > room:
                if not lines[-1]:
                    lines[-1], rest = rest[:room], rest[room:]
                lines.append("")
            lines[-1] += rest
    return lines


def parse_ago(field: str, text: str) -> dt.timedelta:
    """Read "90m", "24h", "7d" or "2w"."""
    found = _AGO.fullmatch(text)
    if not found:
        raise InputError(field, text, "must be a number and a unit: 90m, 24h, 7d or 2w")
    return dt.timedelta(**{_UNITS[found[2]]: int(found[1])})


def parse_since(text: str) -> dt.datetime:
    """Read a time as ISO 8601 (UTC, if it names no zone, like all times that are shown), or how long ago."""
    now = dt.datetime.now(dt.UTC)
    try:
        if _AGO.fullmatch(text):
            return now - parse_ago("--since", text)
        time = dt.datetime.fromisoformat(text)
        return time.astimezone(dt.UTC) if time.tzinfo else time.replace(tzinfo=dt.UTC)
    except (ValueError, OverflowError) as error:
        limit = "must be a time such as 2026-11-21 or 2026-11-21T06:00, or an age such as 24h or 7d"
        raise InputError("--since", text, limit) from error


def write_out(out: Path | None, data: bytes) -> None:
    """Write to a file, or to stdout if none is named.

    Raises:
        ReportError: The file cannot be written.
    """
    if out is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        out.write_bytes(data)  # in place: /dev/stdout and links are what they are
    except OSError as error:
        raise ReportError(f"{printable(str(out))} cannot be written: {error.strerror}") from error
    hint(f"wrote {printable(str(out))} ({plural(len(data), 'byte')})")
