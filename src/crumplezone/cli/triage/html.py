"""`crumplezone triage html`: crash reports as one page."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from crumplezone.cli.output import Out, Reports, emptiness, hint, open_store, read_report, write_out
from crumplezone.errors import InputError, ReportError
from crumplezone.reports.records.report import Report
from crumplezone.reports.store.store import Store


def html(
    report_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Reports, or the beginnings of their ids. [default: all]"),
    ] = None,
    out: Out = None,
    reports: Reports = None,
) -> None:
    """Write reports as one HTML page that needs no network.

    With signatures and their trend, stacks, the time up to each crash, batches and ladders. It shows two
    hundred reports in full: the latest of each signature, then the newest.
    """
    from crumplezone.reports.html import page

    if out is None and sys.stdout.isatty():
        raise InputError("--out", "a terminal", "must name a file for a page")
    store = open_store(reports)
    rows = store.rows()
    if report_ids:
        wanted = dict.fromkeys(read_report(store, each).id for each in report_ids)
        rows = [row for row in rows if row.id in wanted]
    elif not rows:
        hint(emptiness(store))
    found = list(_read(store, page.pick(rows)))
    shown = page.render(None, found, rows, {} if report_ids else store.counts())
    write_out(out, shown.encode())


def _read(store: Store, report_ids: Sequence[str]) -> Iterator[Report]:
    for report_id in report_ids:
        with contextlib.suppress(ReportError):  # removed since; its row is listed all the same
            yield store.read(report_id)
