"""What the triage verbs share: the store, identifiers, tables and JSON."""

from __future__ import annotations

import datetime as dt
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crumplezone.errors import InputError, ReportError
from crumplezone.reports import files
from crumplezone.reports.store import Store, default_directory
from crumplezone.reports.text import printable

Reports = Annotated[
    Path | None,
    typer.Option(
        "--reports", metavar="DIR", help="The store. [default: $CRUMPLEZONE_REPORTS or the state directory]"
    ),
]
ReportId = Annotated[str, typer.Argument(metavar="ID", help="A report's id, or the beginning of only one.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Model = Annotated[
    Path | None, typer.Option("--model", metavar="FILE", help="Where the model is now, if it has moved.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here. [default: stdout]")]

_AGO = re.compile(r"(\d{1,6})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def open_store(reports: Path | None) -> Store:
    """The store that was named, or the default one."""
    return Store(default_directory() if reports is None else reports)


def print_json(value: Any) -> None:
    """Print as JSON, in ASCII: nothing in it can act on a terminal."""
    typer.echo(json.dumps(msgspec.to_builtins(value), indent=1, ensure_ascii=True))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on a terminal, else tab-separated lines. The cells must be safe to print."""
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row))
        return
    table = Table(box=None, pad_edge=False)
    for number, header in enumerate(headers):
        # A folded id could not be copied.
        table.add_column(header, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(Text, row))  # Text, not str: "[red]" in a symbol is no markup
    Console().print(table)


def parse_ago(field: str, text: str) -> dt.timedelta:
    """Read "90m", "24h", "7d" or "2w"."""
    found = _AGO.fullmatch(text)
    if not found:
        raise InputError(field, text, "must be a number and a unit: 90m, 24h, 7d or 2w")
    return dt.timedelta(**{_UNITS[found[2]]: int(found[1])})


def parse_since(text: str) -> dt.datetime:
    """Read a time as ISO 8601 (local, if it names no zone), or how long ago."""
    now = dt.datetime.now(dt.UTC)
    try:
        if _AGO.fullmatch(text):
            return now - parse_ago("--since", text)
        return dt.datetime.fromisoformat(text).astimezone(dt.UTC)
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
        files.replace(out.parent, out.name, data)
    except OSError as error:
        raise ReportError(f"{printable(str(out))} cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {printable(str(out))} ({len(data)} bytes)", err=True)
