"""The triage verbs that take a crash further: replay, minimise, script, export."""

from __future__ import annotations

import datetime as dt
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from crumplezone.cli.output import AsJson, Model, Out, ReportId, Reports, open_store, print_json, write_out
from crumplezone.errors import CrumplezoneError, UsageError
from crumplezone.reports.schema import Minimal, Outcome, Report
from crumplezone.reports.text import printable

if TYPE_CHECKING:
    from crumplezone.diagnostics.minimise import Minimised

NOT_SHOWN = 1


class Format(StrEnum):
    """What a report can be exported as."""

    MARKDOWN = "markdown"
    JSON = "json"
    SARIF = "sarif"
    ZIP = "zip"


def replay(
    report_id: ReportId,
    runs: Annotated[int, typer.Option("-n", "--runs", min=1, max=1000, help="How often.")] = 3,
    model: Model = None,
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """Run the recorded batch again in fresh cells; the report keeps what that showed.

    Exit code 1: it did not crash.
    """
    from crumplezone.diagnostics.replay import replay as run_again

    store = open_store(reports)
    report = store.read(report_id)
    found = run_again(report, runs, model)
    store.update(
        msgspec.structs.replace(
            report, replays=[*report.replays, found.replay], verdict=found.verdict or report.verdict
        )
    )
    if as_json:
        print_json({"replay": found.replay, "verdict": found.verdict, "notes": found.notes})
    else:
        for number, run in enumerate(found.runs, 1):
            title = run.signature.title if run.signature else run.detail
            same = " (the same signature)" if run.same else " (another signature)" if run.signature else ""
            typer.echo(printable(f"run {number}: {run.outcome.value} {title}{same}".rstrip()))
        typer.echo(f"reproduced {found.replay.same} of {runs}; crashed {found.replay.crashed} of {runs}")
        if found.verdict:
            typer.echo(printable(f"verdict: {found.verdict.kind.value}: {found.verdict.because}"))
        for note in found.notes:
            typer.echo(printable(f"note: {note}"), err=True)
    raise typer.Exit(0 if found.replay.crashed else NOT_SHOWN)


def minimise(
    report_id: ReportId,
    tests: Annotated[int, typer.Option(min=1, help="Most runs.")] = 500,
    model: Model = None,
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest batch and context that still crash so, and keep it in the report.

    ctrl-C ends the search and keeps the best so far.
    """
    from crumplezone.diagnostics.minimise import minimise as reduce

    store = open_store(reports)
    report = store.read(report_id)
    found = reduce(report, model, tests_max=tests, on_progress=_progress if sys.stderr.isatty() else None)
    batch = found.report.batch
    assert batch is not None
    now = dt.datetime.now(dt.UTC).isoformat()
    minimal = Minimal(batch, found.report.context, now, found.tests)
    store.update(msgspec.structs.replace(report, minimal=minimal))
    if as_json:
        print_json({"minimal": minimal, "steps": found.steps, "complete": found.complete})
        return
    n_seq = len(set(batch.seq_ids))
    typer.echo(f"measured: crashed {found.crashed} of {found.measured}")
    for step in found.steps:
        typer.echo(printable(step))
    typer.echo(
        f"minimal: {batch.operation} of {len(batch.tokens)} tokens in {n_seq} sequences, {found.tests} tests"
    )
    if not found.complete:
        typer.echo("stopped early: something smaller may exist", err=True)
    typer.echo(f"next: crumplezone triage script {printable(report.id)}")


def script(report_id: ReportId, out: Out = None, model: Model = None, reports: Reports = None) -> None:
    """Write a stand-alone Python file that imports only llama_cpp and shows the crash; it is tried in a cell.

    It is made of the minimised batch, if there is one. Exit code 1: it did not show the crash.
    """
    from crumplezone.diagnostics.script import check
    from crumplezone.diagnostics.script import script as write

    report = _smallest(open_store(reports).read(report_id))
    text = write(report, model)
    run = check(text, report, model)
    write_out(out, text.encode())
    title = run.signature.title if run.signature else run.detail
    same = ", the same signature" if run.same else ", not the recorded crash"
    typer.echo(printable(f"checked in a cell: {run.outcome.value} {title}{same}"), err=True)
    raise typer.Exit(0 if run.outcome == Outcome.CRASHED and run.same else NOT_SHOWN)


def export(
    report_id: ReportId,
    form: Annotated[Format, typer.Option("--format", help="What to make of it.")] = Format.MARKDOWN,
    out: Out = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Replace tokens, prompt text and paths by hashes and base names.")
    ] = False,
    reports: Reports = None,
) -> None:
    """Export a report: Markdown for an issue, JSON, SARIF 2.1.0, or a zip of all of these to share."""
    import json

    from crumplezone.reports import bundle, markdown, sarif, schema
    from crumplezone.reports.redact import redact as redacted
    from crumplezone.reports.redact import redaction_key

    store = open_store(reports)
    report = store.read(report_id)
    if redact:
        report = redacted(report, redaction_key(store.directory))
    if form == Format.ZIP:
        target = out or Path(f"{report.id}.zip")
        write_out(target, bundle.bundle(report, _script(report)))
    elif form == Format.JSON:
        write_out(out, schema.encode(report) + b"\n")
    elif form == Format.SARIF:
        write_out(out, json.dumps(sarif.render([report]), indent=1).encode() + b"\n")
    else:
        write_out(out, markdown.render(report, _script(report)).encode("utf-8", "backslashreplace"))


def _progress(best: Minimised) -> None:
    typer.echo(printable(f"{best.tests} tests: {best.steps[-1] if best.steps else 'nothing yet'}"), err=True)


def _smallest(report: Report) -> Report:
    """The report with its minimised batch and context in the place of the recorded ones."""
    if report.minimal is None:
        return report
    return msgspec.structs.replace(report, batch=report.minimal.batch, context=report.minimal.context)


def _script(report: Report) -> str | None:
    """The script, where one can be made of the report."""
    from crumplezone.diagnostics.script import script as write

    try:
        return write(_smallest(report))
    except (UsageError, CrumplezoneError):
        return None
