"""`crumplezone triage`: list, show, group and compare crash reports, and apply retention."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from datetime import UTC
from typing import Annotated

import typer

from crumplezone.cli.output import (
    AsJson,
    ReportId,
    Reports,
    emptiness,
    open_store,
    parse_ago,
    parse_since,
    plural,
    print_json,
    print_lines,
    print_table,
    read_report,
)
from crumplezone.cli.triage import html as page
from crumplezone.cli.triage import rerun as again
from crumplezone.diagnostics.triage.diff import Diff, compare
from crumplezone.diagnostics.triage.listing import (
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
from crumplezone.reports.formats.text import render
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Exit, Report, VerdictKind
from crumplezone.reports.store.index import Row
from crumplezone.reports.store.retention import DEFAULT_RETENTION, Retention
from crumplezone.reports.store.store import Store

_LIST_HEADERS = ("id", "crash and top frame", "signature", "verdict", "result")
_GROUP_HEADERS = ("signature", "count", "crash", "first, last seen", "verdicts", "llama.cpp", "latest")
_SIDES = {"both": " ", "a": "-", "b": "+"}


def list_reports(
    signature: Annotated[str, typer.Option(help="Only those whose signature begins so.")] = "",
    exit_kind: Annotated[Exit | None, typer.Option("--exit", help="Only those that ended so.")] = None,
    verdict: Annotated[VerdictKind | None, typer.Option(help="Only those of this verdict.")] = None,
    model: Annotated[str, typer.Option(help="Only those with this in the model's path or name.")] = "",
    since: Annotated[
        str, typer.Option(help="Only those since 2026-11-21T06:00 (UTC), or of the last 24h, 7d.")
    ] = "",
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """List crash reports, newest first.

    A table on a terminal, else tab-separated lines: id, time, exit, signal, top frame, signature, verdict,
    result. An id begins with the time of the crash, in UTC.
    """
    store = open_store(reports)
    wanted = Filter(signature, exit_kind, verdict, model, parse_since(since) if since else None)
    stored = store.rows()
    found = rows(stored, wanted)
    if as_json:
        print_json([_row_json(row) for row in found])
    elif not found:
        typer.echo(
            f"None of {plural(len(stored), 'report')} meets these filters." if stored else emptiness(store)
        )
    elif sys.stdout.isatty():
        print_table(_LIST_HEADERS, map(_list_cells, found), spare=1)
    else:
        print_lines(map(cells, found))


def show(report_id: ReportId, reports: Reports = None, as_json: AsJson = False) -> None:
    """Show one crash report in full."""
    report = read_report(open_store(reports), report_id)
    if as_json:
        print_json(report)
    else:
        # Rendered anew: report.txt may be older than this version, and is as untrusted as the rest.
        typer.echo(render(report), nl=False)


def group(reports: Reports = None, as_json: AsJson = False) -> None:
    """Group the reports by signature, most frequent first.

    A group whose stack is nearly that of a more frequent one comes right after it, marked as its
    near-duplicate: probably the same bug.
    """
    store = open_store(reports)
    found = _families(store, groups(store.rows(), store.counts()))
    if as_json:
        print_json([each.as_json() for each in found])
    elif not found:
        typer.echo(emptiness(store))
    elif sys.stdout.isatty():
        print_table(_GROUP_HEADERS, (each.table_cells() for each in found), spare=3)
    else:
        print_lines(each.line_cells() for each in found)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A report's id, or a signature; or its beginning.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """Show what differs between two reports, or between groups.

    Of a group its latest report that was kept in full is taken.
    """
    store = open_store(reports)
    one, other = _find_side(store, a), _find_side(store, b)
    found = compare(one.report, other.report)
    if as_json:
        print_json({"a": one.as_json(), "b": other.as_json(), **_fields(found)})
    else:
        _print_diff(one, other, found)


def prune(
    count: Annotated[int | None, typer.Option(min=0, help="Keep at most so many reports.")] = None,
    age: Annotated[str, typer.Option(help="Keep those of the last 24h, 7d or 8w.")] = "",
    size: Annotated[int | None, typer.Option("--bytes", min=0, help="Keep at most so many bytes.")] = None,
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """Remove duplicates, oldest first.

    The first full report of a signature always stays, and what is removed is still counted by `group`.
    Without any limit: 10,000 reports and 1 GiB.
    """
    limits = Retention(count, parse_ago("--age", age) if age else None, size)
    done = open_store(reports).prune(DEFAULT_RETENTION if limits == Retention() else limits)
    if as_json:
        print_json(done)
        return
    typer.echo(f"removed {plural(len(done.removed), 'report')}, {plural(done.freed, 'byte')}")
    for sentence in done.unmet:
        typer.echo(printable(sentence), err=True)


app = typer.Typer(
    help="Look at crash reports, run them again, and hand them on.",
    epilog="Exit codes: 0 done; 1 the crash was not shown (replay, minimise, script); 2 bad usage or input, "
    "such as an unknown id; 3 the model did not load, or the machine refused; 130 interrupted "
    "(minimise keeps the best so far).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("list")(list_reports)
for verb in (show, group, diff, again.replay, again.minimise, again.script, again.export, page.html, prune):
    app.command()(verb)


@app.callback()
def _prepare() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a symbol may be beyond a terminal's encoding


@dataclass(frozen=True)
class _Member:
    """A group, and the more frequent one that it nearly is."""

    group: Group
    near: str | None

    def as_json(self) -> dict[str, object]:
        named = {name: getattr(self.group, name) for name in self.group.__dataclass_fields__}
        return {**named, "near_duplicate_of": self.near}

    def line_cells(self) -> tuple[str, ...]:
        found = self.group
        seen = (time_text(found.first_seen), time_text(found.last_seen))
        tallies = (", ".join(_tally(counts)) for counts in (found.verdicts, found.versions))
        near = self.near[:SHORT] if self.near else "-"
        raw = (_short(found), str(found.count), _title(found), *seen, *tallies, found.latest, near)
        return tuple(map(printable, raw))

    def table_cells(self) -> tuple[str, ...]:
        """Some of several lines."""
        found = self.group
        crash = [_title(found)]
        if self.near:
            crash.append(f"(near-duplicate of {self.near[:SHORT]})")
        seen = [f"{time.astimezone(UTC):%Y-%m-%d %H:%MZ}" for time in (found.first_seen, found.last_seen)]
        several = (crash, seen, _tally(found.verdicts), _tally(found.versions))
        folded = ("\n".join(map(printable, lines)) for lines in several)
        return (printable(_short(found)), str(found.count), *folded, printable(found.latest))


def _families(store: Store, found: list[Group]) -> list[_Member]:
    """Each group after the most frequent of those that it nearly is."""
    number = near_duplicates(store, found)  # counts up in the order of the groups, most frequent first
    heads: dict[int, str] = {}
    for each in found:
        heads.setdefault(number[each.signature], each.signature)
    members = []
    for each in sorted(found, key=lambda each: number[each.signature]):
        head = heads[number[each.signature]]
        members.append(_Member(each, head if head != each.signature else None))
    return members


def _short(found: Group) -> str:
    return found.signature[:SHORT] or "-"


def _title(found: Group | Row) -> str:
    return (found.title or "-") + (" (low confidence)" if found.confidence == "low" else "")


def _tally(counts: dict[str, int]) -> list[str]:
    return [f"{name} {n}" for name, n in counts.items()] or ["-"]


def _list_cells(row: Row) -> tuple[str, ...]:
    notes = [f"same as {row.same_as}"] if row.same_as else []
    notes += ["redacted"] if row.redacted else []
    crash = row.problem or f"{_title(row)}{''.join(f' ({note})' for note in notes)}"
    raw = (row.id, crash, row.signature[:SHORT], row.verdict or "", row.result)
    return tuple(printable(cell) or "-" for cell in raw)


def _row_json(row: Row) -> dict[str, object]:
    return {name: value for name, value in _fields(row).items() if name != "stamp"}


def _fields(struct: object) -> dict[str, object]:
    names: tuple[str, ...] = struct.__struct_fields__  # type: ignore[attr-defined]
    return {name: getattr(struct, name) for name in names}


@dataclass(frozen=True)
class _Side:
    """One side of a comparison.

    Attributes:
        report: What is compared.
        group_size: Of how many present reports it stands for; 0: it was named itself.
    """

    report: Report
    group_size: int = 0

    def as_json(self) -> dict[str, object]:
        signature = self.report.signature
        return {
            "id": self.report.id,
            "signature": signature.id if signature else "",
            "group_size": self.group_size,
        }

    def __str__(self) -> str:
        signature = self.report.signature
        title = f" {signature.title}" if signature else ""
        chosen = f" (the latest in full of a group of {self.group_size})" if self.group_size else ""
        return printable(f"{self.report.id}{title}{chosen}")


def _find_side(store: Store, name: str) -> _Side:
    """The report whose id begins so, else the latest full one of the signature that begins so."""
    stored = store.rows()
    if not name or any(row.id.startswith(name) for row in stored):
        return _Side(store.read(name))
    members = [row for row in stored if any(each.startswith(name) for each in (row.signature, row.own))]
    signatures = {row.signature for row in members}
    if len(signatures) > 1:
        shown = ", ".join(sorted(signature[:SHORT] for signature in signatures)[:5])
        raise ReportError(f"{printable(name)} begins {len(signatures)} signatures ({shown}): give more of it")
    if not members:
        unknown = f"{printable(name)} begins no id and no signature in {printable(str(store.directory))}"
        raise ReportError(f"{unknown}: `crumplezone triage group` shows them" if stored else emptiness(store))
    latest = next((row for row in members if not row.same_as), members[0])
    return _Side(store.read(latest.id), len(members))


def _print_diff(a: _Side, b: _Side, found: Diff) -> None:
    typer.echo(f"- {a}\n+ {b}")
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
