"""One report as a part of the page: what happened, both stacks, the pictures, and the rest folded away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import PurePosixPath
from urllib.parse import quote

from markupsafe import Markup

from crumplezone.reports.analysis.frames import interrupted, is_runtime
from crumplezone.reports.analysis.stack import crashed_thread, top_frame
from crumplezone.reports.formats.text import sections, summary
from crumplezone.reports.html import figures as page_pictures
from crumplezone.reports.html.markup import (
    EMPTY,
    Child,
    count,
    facts,
    fold,
    join,
    lines,
    mebibytes,
    symbol,
    tag,
    text,
    time_text,
)
from crumplezone.reports.records.report import Exit, Frame, Report, Thread
from crumplezone.reports.records.run import CaseRecord
from crumplezone.reports.store.index import Row

_MAX_FRAMES = 64
_FEW_FRAMES = 16  # of a thread that did not crash
_MAX_THREADS = 16
_FEW = 3  # frames of a runtime in a row that are not folded away
_SHORT = 12
_FOLDED = (
    *("Fault", "Registers", "Modules", "Memory", "Context", "Model", "Environment", "stderr tail"),
    "Provenance",
)


def anchor(report_id: str) -> str:
    """The id of a report's element."""
    return f"r-{report_id[:128]}"


def link(report_id: str) -> str:
    """Where a link to a report leads: a fragment of this page."""
    return "#" + quote(anchor(report_id))


def kind(exit_kind: Exit | None) -> str:
    """The class, and so the colour, of how a cell ended."""
    if exit_kind is None:
        return "error"
    return exit_kind.value if exit_kind in (Exit.HANG, Exit.OOM) else "crash"


def entry(row: Row, report: Report | None, case: CaseRecord | None, *, opened: bool) -> Markup:
    """One line of the list of reports, with the report behind it.

    Args:
        row: What a listing knows of it.
        report: None: the page has no room for it, or it cannot be read.
        case: Of the run that it comes from.
        opened: Whether the report is shown at once.
    """
    notes = [f"same as {row.same_as}"] if row.same_as else []
    notes += ["redacted"] if row.redacted else []
    # A case is named after its model first, which the other lines have in common.
    shape = case.id.removeprefix(PurePosixPath(case.model).stem).strip() if case else _shape(report)
    cells = (
        tag("span", row.exit.value if row.exit else "unreadable", class_=f"tag {kind(row.exit)} known"),
        tag("span", symbol(row.problem or row.title or row.id), class_="title"),
        tag("span", shape, class_="quiet shape"),
        tag("span", *([row.verdict.value] if row.verdict else []), *notes, class_="quiet verdict"),
        tag("time", time_text(row.crashed_at, seconds=True)),
    )
    found = f"{row.id} {row.signature} {row.title} {row.top} {row.signal} {row.model} {row.llama_cpp}"
    given = {"id": anchor(row.id), "data_find": text(found, 1024)}
    if report is None or row.problem:
        return tag("div", tag("div", *cells, class_="line"), class_="report", **given)
    line = tag("summary", *cells, class_="line")
    return tag("details", line, _body(report, row, case), class_="report", open=opened, **given)


def _shape(report: Report | None) -> str:
    if report is None or report.batch is None:
        return ""
    batch = report.batch
    return f"{batch.operation} {len(set(batch.seq_ids))}x{len(batch.seq_ids)}"


def _body(report: Report, row: Row, case: CaseRecord | None) -> Markup:
    evidence = report.evidence
    pictures = [
        _part("Up to the crash", page_pictures.timeline(evidence.samples, evidence.flight)),
        _part("Batch", page_pictures.batch(report.batch, report.blamed) if report.batch else EMPTY),
        _part("Ladder", page_pictures.ladder(report)),
    ]
    return tag(
        "div",
        tag("p", symbol(summary(report), 1024), class_="what"),
        _identity(report, row, case),
        tag("div", _native(report), _python(report), class_="stacks"),
        *pictures,
        tag("div", *_rest(report), class_="rest"),
        class_="body",
    )


def _part(title: str, body: Child, **attributes: str) -> Markup:
    return tag("section", tag("h3", title), body, **attributes) if body else EMPTY


def _identity(report: Report, row: Row, case: CaseRecord | None) -> Markup:
    verdict = report.verdict
    signature = tag(
        "a", tag("code", text(row.signature, _SHORT)), href="#" + quote(f"g-{row.signature[:64]}")
    )
    lacking = [step.name for step in report.evidence.steps if not step.ok]
    return facts(
        [
            ("report", tag("code", text(row.id, 128))),
            ("signature", signature if row.signature else ""),
            ("confidence", "low: no native function is known" if row.confidence == "low" else ""),
            ("verdict", join([tag("b", verdict.kind.value), f": {verdict.because}"]) if verdict else ""),
            ("case", tag("span", case.id) if case else ""),
            ("blamed", f"sequences {', '.join(map(str, report.blamed[:16]))}" if report.blamed else ""),
            ("rung", report.rung),
            ("model", PurePosixPath(report.model.path).name if report.model else ""),
            ("llama.cpp", row.llama_cpp),
            ("peak memory", mebibytes(report.evidence.peak_rss) if report.evidence.peak_rss else ""),
            (
                "counts towards",
                tag("a", text(row.same_as, 128), href=link(row.same_as)) if row.same_as else "",
            ),
            ("not gathered", ", ".join(lacking[:8])),
        ]
    )


def _native(report: Report) -> Markup:
    thread = crashed_thread(report)
    frames = interrupted(thread.native) if thread else []
    return _part("Native stack", _stack(frames, top_frame(report)) or _nothing(report, "pystack"))


def _python(report: Report) -> Markup:
    thread = crashed_thread(report)
    found = _stack(thread.python if thread else [])
    if not found and report.evidence.faulthandler:
        found = lines(report.evidence.faulthandler.splitlines(), 4096)
    caller = fold("The caller, in the supervisor", _stack(report.caller))
    others = [each for each in report.evidence.threads if each is not thread]
    named = fold(f"{count(len(others), 'other thread')}", _threads(others))
    return _part("Python stack", join([found or _nothing(report, "pystack"), caller, named]))


def _nothing(report: Report, step: str) -> Markup:
    """Says that there is no stack, and why, if a step of the evidence knows."""
    why = next((each for each in report.evidence.steps if not each.ok and step in each.name), None)
    because = f": {why.detail}. {why.remedy}" if why else "."
    return tag("p", f"Not recorded{because}", class_="quiet")


def _threads(threads: Sequence[Thread]) -> Markup:
    shown = [
        tag(
            "li",
            tag("b", text(f"{each.tid} {each.name}", 64)),
            f" {each.doing} {each.pc}",
            fold("stacks", _stack(each.native, most=_FEW_FRAMES), _stack(each.python, most=_FEW_FRAMES)),
        )
        for each in threads[:_MAX_THREADS]
    ]
    if len(threads) > _MAX_THREADS:
        shown.append(tag("li", f"and {len(threads) - _MAX_THREADS} more"))
    return tag("ul", *shown, class_="threads") if shown else EMPTY


def _stack(frames: Sequence[Frame], top: Frame | None = None, most: int = _MAX_FRAMES) -> Markup:
    """Frames, innermost first. Many of a runtime in a row are folded away."""
    if not frames:
        return EMPTY
    numbered = list(enumerate(frames[:most]))
    shown: list[Markup] = []
    for runtime, run in groupby(numbered, lambda each: bool(each[1].module) and is_runtime(each[1])):
        same = [_frame(number, frame, runtime=runtime, top=frame is top) for number, frame in run]
        if runtime and len(same) > _FEW:
            shown.append(
                tag("li", fold(f"{len(same)} frames of a runtime", tag("ol", *same)), class_="folded")
            )
        else:
            shown += same
    if len(frames) > most:
        shown.append(tag("li", f"and {len(frames) - most} more", class_="quiet"))
    return tag("ol", *shown, class_="stack")


def _frame(number: int, frame: Frame, *, runtime: bool, top: bool) -> Markup:
    place = [text(part, 120) for part in _places(frame)]
    name = tag("code", symbol(frame.symbol or "??", 200))
    where = tag("span", Markup(" ").join(place), class_="place")
    kinds = "top" if top else "runtime" if runtime else None
    return tag("li", tag("span", str(number), class_="number"), tag("div", name, " ", where), class_=kinds)


def _places(frame: Frame) -> Iterator[str]:
    if frame.module:
        module = PurePosixPath(frame.module).name
        yield f"{module}+{frame.offset}" if frame.offset else module
    if frame.file:
        file = PurePosixPath(frame.file).name
        yield f"{file}:{frame.line}" if frame.line else file


def _rest(report: Report) -> Iterable[Markup]:
    for title, shown in sections(report):
        if title in _FOLDED:
            yield fold(title, lines(shown, tail=title == "stderr tail"))
