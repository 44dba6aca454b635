"""`crumplezone triage`: list and show crash reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crumplezone.diagnostics.triage import HEADERS, Row, rows
from crumplezone.reports.store import Store, default_directory
from crumplezone.reports.text import printable, render

app = typer.Typer(help="List and show crash reports.", no_args_is_help=True)

Reports = Annotated[
    Path | None,
    typer.Option(
        "--reports", metavar="DIR", help="The store. [default: $CRUMPLEZONE_REPORTS or the state directory]"
    ),
]


@app.command("list")
def list_reports(reports: Reports = None) -> None:
    """List the crash reports, newest first: a table on a terminal, else tab-separated lines."""
    store = _store(reports)
    found = rows(store.list())
    if not found:
        typer.echo(f"No crash reports in {printable(str(store.directory))}")
    elif sys.stdout.isatty():
        Console().print(_table(found))
    else:
        for row in found:
            typer.echo("\t".join(row.cells()))


@app.command()
def show(
    report_id: Annotated[
        str, typer.Argument(metavar="ID", help="A report's id, or the beginning of only one.")
    ],
    reports: Reports = None,
) -> None:
    """Show one crash report in full."""
    # Rendered anew: report.txt may be older than this version, and is as untrusted as the rest.
    typer.echo(render(_store(reports).read(report_id)), nl=False)


def _store(reports: Path | None) -> Store:
    return Store(default_directory() if reports is None else reports)


def _table(found: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in HEADERS:
        # A folded id could not be copied.
        table.add_column(header, overflow="fold", no_wrap=header == "id")
    for row in found:
        table.add_row(*map(Text, row.cells()))  # Text, not str: "[red]" in a symbol is no markup
    return table
