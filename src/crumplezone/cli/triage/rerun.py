"""The triage verbs that take a crash further: replay, minimise, script, export."""

from __future__ import annotations

import datetime as dt
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, assert_never

import typer
from msgspec.structs import replace

from crumplezone.cli.output import (
    AsJson,
    Model,
    Out,
    ReportId,
    Reports,
    about,
    hint,
    is_quiet,
    open_store,
    plural,
    print_json,
    read_report,
    to_type,
    write_out,
)
from crumplezone.errors import CrumplezoneError, InputError, NotShownError
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import BatchRecord, Minimal, Outcome, Report

if TYPE_CHECKING:
    from crumplezone.diagnostics.replay.minimise import Minimised
    from crumplezone.diagnostics.replay.replay import Replayed, Run

NOT_SHOWN, INTERRUPTED = 1, 130


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
    """Run a recorded batch again in fresh cells.

    The report keeps what that showed. Exit code 1: no run showed the recorded crash.
    """
    from crumplezone.diagnostics.replay.replay import replay as run_again

    store = open_store(reports)
    report = read_report(store, report_id)
    with about(report):
        found = run_again(report, runs, model)
    report = store.read(report.id)  # as it is now: another process may have added to it
    verdict = found.verdict or report.verdict
    store.update(replace(report, replays=[*report.replays, found.replay], verdict=verdict))
    if as_json:
        runs_json = [_run_json(run) for run in found.runs]
        print_json(
            {"replay": found.replay, "verdict": found.verdict, "notes": found.notes, "runs": runs_json}
        )
    else:
        _print_replay(found)
    raise typer.Exit(0 if found.replay.same else NOT_SHOWN)


def minimise(
    report_id: ReportId,
    tests: Annotated[int, typer.Option(min=1, help="Most runs.")] = 500,
    model: Model = None,
    reports: Reports = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest batch and context that crash so.

    The report keeps them, and `script` and `export` use them. ctrl-C ends the search and keeps the best so
    far (exit code 130). Exit code 1: it did not crash.
    """
    from crumplezone.diagnostics.replay.minimise import minimise as reduce

    store = open_store(reports)
    report = read_report(store, report_id)
    watched = sys.stderr.isatty() and not is_quiet()
    try:
        with about(report):
            found = reduce(report, model, tests_max=tests, on_progress=_progress if watched else None)
    except NotShownError as error:
        typer.echo(printable(str(error)), err=True)
        raise typer.Exit(NOT_SHOWN) from None
    interrupted = not found.complete and found.tests < tests
    minimal = _minimal(found)
    if minimal:
        store.update(replace(store.read(report.id), minimal=minimal))
    if as_json:
        facts = {name: getattr(found, name) for name in ("steps", "complete", "tests", "crashed", "measured")}
        print_json({"minimal": minimal, "interrupted": interrupted, **facts})
    else:
        _print_minimised(report, found, minimal, reports)
    if not found.complete:
        why = "interrupted" if interrupted else f"all {plural(tests, 'test')} are used up"
        kept = "the best so far is kept in the report" if minimal else "nothing smaller was found yet"
        typer.echo(f"{why}: {kept}; something smaller may exist", err=True)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


def script(report_id: ReportId, out: Out = None, model: Model = None, reports: Reports = None) -> None:
    """Write a Python file that shows the crash.

    It needs llama-cpp-python only, is made of the minimised batch if there is one, and is tried in a cell.
    Exit code 1: it was written, but did not show the recorded crash.
    """
    from crumplezone.diagnostics.replay.script import check
    from crumplezone.diagnostics.replay.script import script as write

    report = _smallest(read_report(open_store(reports), report_id))
    with about(report):
        text = write(report, model)
        run = check(text, report, model)
    write_out(out, text.encode())
    said = printable(f"checked in a cell: {_outcome(run)}")
    if run.same:
        hint(said)
    else:
        typer.echo(said, err=True)
    raise typer.Exit(0 if run.same else NOT_SHOWN)


def export(
    report_id: ReportId,
    form: Annotated[Format, typer.Option("--format", help="What to make of it.")] = Format.MARKDOWN,
    out: Out = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Replace tokens, prompt text and paths by hashes and base names.")
    ] = False,
    reports: Reports = None,
) -> None:
    """Export a report, to hand it on.

    As Markdown for an issue, as JSON, as SARIF 2.1.0, or as a zip of all of these with the script.
    """
    import json

    from crumplezone.reports.analysis.redact import redact as redacted
    from crumplezone.reports.formats import bundle, markdown, sarif
    from crumplezone.reports.records import report as schema
    from crumplezone.reports.store.redaction_key import redaction_key

    if form == Format.ZIP and out is None and sys.stdout.isatty():
        raise InputError("--out", "a terminal", "must name a file for a zip")
    store = open_store(reports)
    report = read_report(store, report_id)
    if redact:
        report = redacted(report, redaction_key(store.directory))
    match form:
        case Format.ZIP:
            data = bundle.bundle(report, _script(report))
        case Format.JSON:
            data = schema.encode(report) + b"\n"
        case Format.SARIF:
            data = json.dumps(sarif.render([report]), indent=1).encode() + b"\n"
        case Format.MARKDOWN:
            data = markdown.render(report, _script(report)).encode("utf-8", "backslashreplace")
        case _:
            assert_never(form)
    write_out(out, data)


def _run_json(run: Run) -> dict[str, object]:
    return {"outcome": run.outcome, "detail": run.detail, "signature": run.signature, "same": run.same}


def _outcome(run: Run) -> str:
    """One run in words."""
    what = run.signature.title if run.signature else run.detail
    if run.same:
        return f"the recorded crash: {what}"
    if run.outcome == Outcome.OK:
        return "no crash here"
    return f"another crash: {what}" if run.outcome == Outcome.CRASHED else f"no crash, but refused: {what}"


def _print_replay(found: Replayed) -> None:
    for number, run in enumerate(found.runs, 1):
        typer.echo(printable(f"run {number}: {_outcome(run)}"))
    kept = found.replay
    others = f"; {kept.crashed - kept.same} crashed otherwise" if kept.crashed > kept.same else ""
    typer.echo(f"reproduced {kept.same} of {kept.runs}{others}")
    if found.verdict:
        typer.echo(printable(f"verdict: {found.verdict.kind.value}: {found.verdict.because}"))
    for note in found.notes:
        typer.echo(printable(f"note: {note}"), err=True)


def _minimal(found: Minimised) -> Minimal | None:
    """What the report should keep; nothing, if the search ended before it found anything smaller."""
    batch = found.report.batch
    if batch is None or not (found.complete or found.steps):
        return None
    return Minimal(batch, found.report.context, dt.datetime.now(dt.UTC).isoformat(), found.tests)


def _print_minimised(report: Report, found: Minimised, minimal: Minimal | None, reports: Path | None) -> None:
    typer.echo(f"measured: crashed {found.crashed} of {found.measured}")
    for step in found.steps:
        typer.echo(printable(step))
    if minimal:
        typer.echo(printable(f"minimal: {_shape(minimal.batch)}, after {plural(found.tests, 'test')}"))
        if not is_quiet():
            typer.echo(printable(f"next: {to_type(f'triage script {report.id}', reports)}"))


def _shape(batch: BatchRecord) -> str:
    """A batch in words. One of `generate` is all that was in flight, not its last native call."""
    owners = [each.seq_id for each in batch.generating for _ in each.tokens] or batch.seq_ids
    sequences = plural(len(set(owners)), "sequence")
    return f"{batch.operation} of {plural(len(owners), 'token')} in {sequences}"


def _progress(best: Minimised) -> None:
    typer.echo(printable(f"{plural(best.tests, 'test')}: {'; '.join(best.steps)}"), err=True)


def _smallest(report: Report) -> Report:
    """The report with its minimised batch and context in the place of the recorded ones."""
    if report.minimal is None:
        return report
    return replace(report, batch=report.minimal.batch, context=report.minimal.context)


def _script(report: Report) -> str | None:
    """The script, where one can be made of the report. A path of this machine is nothing to its readers."""
    from crumplezone.diagnostics.replay.script import script as write

    try:
        return write(_smallest(report), Path(Path(report.model.path).name) if report.model else None)
    except CrumplezoneError:
        return None
