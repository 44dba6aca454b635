"""A diagnostic run as JUnit XML, which every CI service shows as a list of tests.

The format has no standard; this is the part that its readers agree on (https://github.com/testmoapp/junitxml).
A suite is a model, a test is a case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as ET

import msgspec

from crumplezone.reports.analysis.frames import interrupted
from crumplezone.reports.analysis.stack import crashed_thread, frame_name
from crumplezone.reports.formats.text import summary
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Frame, Report
from crumplezone.reports.records.run import CaseRecord, Ending, News, RunRecord

_MAX_TEXT = 2048
_MAX_FRAMES = 64


def render(run: RunRecord, reports: Mapping[str, Report]) -> bytes:
    r"""Write the file.

    A case that failed anew is a failure, one that failed as the baseline says is skipped with its cause, and
    one of which nothing is known is an error. A run that was interrupted has one error more: it is not green.

    Args:
        run: The run.
        reports: Its crash reports by id; one that is missing is only named.

    Returns:
        XML in UTF-8. What XML or a terminal cannot hold is escaped (``\x1b``).
    """
    root = ET.Element("testsuites", name="crumplezone ci")
    for model in dict.fromkeys(case.model for case in run.cases):
        cases = [case for case in run.cases if case.model == model]
        suite = _suite(root, model, run, _totals(cases))
        for case in cases:
            _test(suite, case, reports.get(case.report))
    root.attrib |= _totals(run.cases, complete=run.complete)
    if not run.complete:
        suite = _suite(root, "the run", run, _totals([], complete=False))
        test = ET.SubElement(suite, "testcase", name="complete", classname="the run", time="0.000")
        what = f"interrupted after {len(run.cases)} of {run.planned} cases; --resume goes on"
        ET.SubElement(test, "error", type="interrupted", message=what)
    ET.indent(root, " ")
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _text(text: str) -> str:
    """One line that is legal in XML 1.0: what `printable` leaves is neither a control nor a surrogate."""
    return printable(text[:_MAX_TEXT])[:_MAX_TEXT]


def _totals(cases: Sequence[CaseRecord], *, complete: bool = True) -> dict[str, str]:
    """Attributes of a suite, in which a run that was interrupted is one test more."""
    outcomes = Counter(_outcome(case) for case in cases)
    return {
        "tests": str(len(cases) + (not complete)),
        "failures": str(outcomes["failure"]),
        "errors": str(outcomes["error"] + (not complete)),
        "skipped": str(outcomes["skipped"]),
        "time": _seconds(sum(case.ms for case in cases)),
    }


def _seconds(ms: float) -> str:
    return f"{ms / 1000:.3f}"


def _outcome(case: CaseRecord) -> str:
    """The element that tells how a case ended; empty for one that passed."""
    if case.ending is Ending.PASS:
        return ""
    if case.ending is Ending.ERROR:
        return "error"
    return "failure" if case.news is News.NEW else "skipped"


def _suite(root: ET.Element, name: str, run: RunRecord, totals: dict[str, str]) -> ET.Element:
    named = {"name": _text(name), "timestamp": _text(run.started_at)}
    return ET.SubElement(root, "testsuite", named | totals)


def _test(suite: ET.Element, case: CaseRecord, report: Report | None) -> None:
    named = {"name": _text(case.id), "classname": _text(case.model), "time": _seconds(case.ms)}
    test = ET.SubElement(suite, "testcase", named)
    properties = ET.SubElement(test, "properties")
    for name, value in _properties(case):
        ET.SubElement(properties, "property", name=name, value=_text(value))
    if outcome := _outcome(case):
        found = ET.SubElement(test, outcome, type=case.ending.value, message=_text(_message(case)))
        found.text = "\n".join(["", *map(_text, _details(case, report)), ""])
    elif case.news is News.FIXED:
        ET.SubElement(test, "system-out").text = "fixed: the baseline says that it fails"


def _message(case: CaseRecord) -> str:
    title = case.title or case.detail
    known = "known" if case.news is News.KNOWN else ""
    return ": ".join(filter(None, (known, case.ending.value, title)))


def _properties(case: CaseRecord) -> list[tuple[str, str]]:
    pairs = [(name, str(value)) for name, value in msgspec.structs.asdict(case.shape).items()]
    pairs += [("ending", case.ending.value), ("news", case.news.value), ("report", case.report)]
    pairs += [("signature", case.signature.id if case.signature else "")]
    return [(name, value) for name, value in pairs if value]


def _details(case: CaseRecord, report: Report | None) -> list[str]:
    lines = [case.detail] if case.detail else []
    if case.ending is Ending.MISMATCH:
        lines += [f"native: {case.text}", f"safe:   {case.safe_text}"]
    if case.report:
        lines.append(f"report: reports/{case.report}")
    if report:
        thread = crashed_thread(report)
        native, python = (interrupted(thread.native), thread.python) if thread else ([], [])
        lines += [summary(report), *_stack("Native stack", native), *_stack("Python stack", python)]
    return lines


def _stack(title: str, frames: list[Frame]) -> list[str]:
    shown = [f"#{place:<3} {frame_name(frame)}" for place, frame in enumerate(frames[:_MAX_FRAMES])]
    more = [f"... and {len(frames) - _MAX_FRAMES} more"] if len(frames) > _MAX_FRAMES else []
    return [f"{title}:", *shown, *more] if shown else []
