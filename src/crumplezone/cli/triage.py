"""`crumplezone triage`: list, show, group and compare crash reports, and apply retention."""

from __future__ import annotations

from typing import Annotated

import typer

from crumplezone.cli import again
from crumplezone.cli.output import (
    AsJson,
    ReportId,
    Reports,
    open_store,
    parse_ago,
    parse_since,
    print_json,
    print_table,
)
from crumplezone.diagnostics.diff import Diff, compare
from crumplezone.diagnostics.triage import (
    HEADERS,
    SHORT,
    Filter,
    Group,
    cells,
    groups,
    near_duplicates,
    rows,
    time_text,
)
from crumplezone.errors import ReportError
from crumplezone.reports.index import Row
from crumplezone.reports.retention import DEFAULT_RETENTION, Retention
from crumplezone.reports.schema import Exit, Report, VerdictKind
from crumplezone.reports.store import Store
from crumplezone.reports.text import printable, render

app = typer.Typer(
    help="Look at crash reports, run them again, and hand them on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for verb in (again.replay, again.minimise, again.script, again.export):
    app.command()(verb)

_GROUP_HEADERS = (
    "signature",
    "count",
    "near",
    "title",
    "last seen",
    "first seen",
    "verdicts",
    "llama.cpp",
    "latest",
)
_SIDES = {"both": " ", "a": "-", "b": "+"}


@app.command("list")
def list_reports(
    signature: Annotated[str, typer.Option(help="Only those whose signature begins so.")] = "",
    exit_kind: Annotated[Exit | None, typer.Option("--exit", help="Only those that ended so.")] = None,
    verdict: Annotated[VerdictKind | None, typer.Option(help="Only those of this verdict.")] = None,
    model: Annotated[str, typer.Option(help="Only those with this in the model's path or name.")] = "",
    since: Annotated[str, typer.Option(help="Only those since 2026-11-21T06:00, or the last 24h, 7d.")] = "",
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """List the crash reports, newest first: a table on a terminal, else tab-separated lines."""
    store = open_store(reports)
    wanted = Filter(signature, exit_kind, verdict, model, parse_since(since) if since else None)
    found = rows(store.rows(), wanted)
    if as_json:
        print_json([_row_json(row) for row in found])
    elif not found:
        _say_empty(store, filtered=wanted != Filter())
    else:
        print_table(HEADERS, map(cells, found))


@app.command()
def show(report_id: ReportId, reports: Reports = None, as_json: AsJson = False) -> None:
    """Show one crash report in full."""
    report = open_store(reports).read(report_id)
    if as_json:
        print_json(report)
    else:
        # Rendered anew: report.txt may be older than this version, and is as untrusted as the rest.
        typer.echo(render(report), nl=False)


@app.command()
def group(reports: Reports = None, as_json: AsJson = False) -> None:
    """Group the reports by signature, most frequent first; near-duplicates have the same number."""
    store = open_store(reports)
    found = groups(store.rows(), store.counts())
    near = near_duplicates(store, found)
    if as_json:
        print_json([{**_group_json(each), "near": near[each.signature]} for each in found])
    elif not found:
        _say_empty(store, filtered=False)
    else:
        print_table(_GROUP_HEADERS, (_group_cells(each, near[each.signature]) for each in found))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A report's id, or a signature's beginning.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """Show what differs between two reports, or the latest reports of two signatures."""
    store = open_store(reports)
    one, other = _report_or_group(store, a), _report_or_group(store, b)
    found = compare(one, other)
    if as_json:
        print_json({"a": one.id, "b": other.id, **_fields(found)})
    else:
        _print_diff(one, other, found)


@app.command()
def prune(
    count: Annotated[int | None, typer.Option(min=0, help="Keep at most so many reports.")] = None,
    age: Annotated[str, typer.Option(help="Keep those of the last 24h, 7d or 8w.")] = "",
    size: Annotated[int | None, typer.Option("--bytes", min=0, help="Keep at most so many bytes.")] = None,
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """Remove duplicates, oldest first, but never the first report of a signature.

    Without a limit: 10,000 reports, 1 GiB.
    """
    limits = Retention(count, parse_ago("--age", age) if age else None, size)
    done = open_store(reports).prune(DEFAULT_RETENTION if limits == Retention() else limits)
    if as_json:
        print_json(done)
        return
    typer.echo(f"removed {len(done.removed)} reports, {done.freed} bytes")
    for sentence in done.unmet:
        typer.echo(printable(sentence), err=True)


def _say_empty(store: Store, *, filtered: bool) -> None:
    which = "that meet these filters " if filtered else ""
    typer.echo(f"No crash reports {which}in {printable(str(store.directory))}")


def _fields(struct: object) -> dict[str, object]:
    names: tuple[str, ...] = struct.__struct_fields__  # type: ignore[attr-defined]
    return {name: getattr(struct, name) for name in names}


def _row_json(row: Row) -> dict[str, object]:
    return {name: value for name, value in _fields(row).items() if name != "stamp"}


def _group_json(found: Group) -> dict[str, object]:
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


def _group_cells(found: Group, near: int) -> tuple[str, ...]:
    def tally(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in counts.items()) or "-"

    low = " (low confidence)" if found.confidence == "low" else ""
    raw = (
        found.signature[:SHORT] or "-",
        str(found.count),
        str(near),
        (found.title or "-") + low,
        time_text(found.last_seen),
        time_text(found.first_seen),
        tally(found.verdicts),
        tally(found.versions),
        found.latest,
    )
    return tuple(map(printable, raw))


def _report_or_group(store: Store, name: str) -> Report:
    try:
        return store.read(name)
    except ReportError as problem:
        found = {row.signature for row in store.rows() if row.signature.startswith(name)}
        if len(found) > 1:
            shown = ", ".join(sorted(signature[:SHORT] for signature in found)[:5])
            raise ReportError(
                f"{printable(name)} begins {len(found)} signatures ({shown}): give more"
            ) from None
        if not found:
            raise ReportError(f"{problem} It is no signature of this store either.") from None
        latest = next(row for row in store.rows() if row.signature in found and not row.same_as)
        return store.read(latest.id)


def _print_diff(a: Report, b: Report, found: Diff) -> None:
    typer.echo(f"- {printable(a.id)}\n+ {printable(b.id)}")
    typer.echo(f"signature: {'the same' if found.same_signature else 'not the same'}")
    section = ""
    for each in found.differences:
        if each.section != section:
            section = each.section
            typer.echo(f"\n{section}")
        typer.echo(printable(f"  {each.name}: {each.a or '(none)'} -> {each.b or '(none)'}"))
    if any(line.side != "both" for line in found.frames):
        typer.echo("\nframes, innermost first")
        for line in found.frames:
            typer.echo(printable(f"{_SIDES[line.side]} {line.frame}"))
    else:
        typer.echo("\nframes: the same" if found.frames else "\nframes: none on either side")
