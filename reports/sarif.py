"""Reports as a SARIF 2.1.0 log, for what shows the findings of analysis tools.

The format: https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/sarif-v2.1.0-errata01-os-complete.html.
A rule is a signature, and a result is all that was seen of it: SARIF counts what recurs.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from crumplezone.reports.schema import Frame, Report, Signature
from crumplezone.reports.text import crashed_thread, frame_name, printable, summary, top_frame

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_MAX_TEXT = 2048
_MAX_FRAMES = 128
_MAX_IDS = 256
_MAX_VERSIONS = 64


def render(reports: Sequence[Report]) -> dict[str, Any]:
    """Make a log with one run.

    Args:
        reports: Those of one signature become one result, which shows the first of them. One without a
            signature is a result of its own.

    Returns:
        What `json.dumps` takes; valid against the published schema.
    """
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(report.signature.id if report.signature else f"unsigned {report.id}", []).append(
            report
        )
    rules = {_rule_id(first): _rule(first) for first, *_ in groups.values()}
    driver = {
        "name": "crumplezone",
        "version": importlib.metadata.version("crumplezone"),
        "rules": list(rules.values()),
    }
    results = [_result(same) for same in groups.values()]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _text(text: str) -> str:
    return printable(text[:_MAX_TEXT])[:_MAX_TEXT]


def _rule_id(report: Report) -> str:
    return _text(report.signature.id) if report.signature else f"unsigned-{report.evidence.exit.value}"


def _rule(report: Report) -> dict[str, Any]:
    signature = report.signature
    if signature is None:
        signature = Signature("", report.evidence.exit.value, confidence="low")
    title = _text(signature.title or signature.fault_class)
    return {
        "id": _rule_id(report),
        "name": title,
        "shortDescription": {"text": title},
        "defaultConfiguration": {"level": "error"},
        "properties": {
            "faultClass": _text(signature.fault_class),
            "key": [_text(part) for part in signature.key[:_MAX_IDS]],
            "confidence": _text(signature.confidence),
        },
    }


def _result(same: list[Report]) -> dict[str, Any]:
    report, signature = same[0], same[0].signature
    thread = crashed_thread(report)
    native, python = (thread.native, thread.python) if thread else ([], [])
    where = top_frame(report) or next(iter(python), None)
    stacks = [
        _stack(title, frames, thread.tid if thread else 0)
        for title, frames in (("Native stack", native), ("Python stack", python))
        if frames
    ]
    result: dict[str, Any] = {
        "ruleId": _rule_id(report),
        "level": "error",
        "message": {"text": _text(summary(report))},
        "locations": [_location(where)] if where else [],
        "stacks": stacks,
        "occurrenceCount": len(same),
        "properties": _properties(same),
    }
    if signature:
        # Results of two tool versions are the same if their fingerprints of one name and version are equal.
        result["partialFingerprints"] = {f"crumplezoneSignature/v{signature.version}": _text(signature.id)}
    return result


def _properties(same: list[Report]) -> dict[str, Any]:
    report = same[0]
    found: dict[str, Any] = {
        "exit": report.evidence.exit.value,
        "crashedAt": _text(report.crashed_at),
        "versions": _texts(report.environment.versions.items()),
        "reports": [_text(each.id) for each in same[:_MAX_IDS]],
    }
    if report.verdict:
        found["verdict"] = report.verdict.kind.value
    if report.model:
        found["model"] = _texts(
            [("file", report.model.path.rpartition("/")[2]), ("sha256", report.model.sha256)]
        )
    return found


def _texts(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in list(pairs)[:_MAX_VERSIONS]}


def _stack(title: str, frames: list[Frame], tid: int) -> dict[str, Any]:
    found = [_stack_frame(frame, tid) for frame in frames[:_MAX_FRAMES]]
    return {"message": {"text": title}, "frames": found}


def _stack_frame(frame: Frame, tid: int) -> dict[str, Any]:
    found: dict[str, Any] = {"location": _location(frame), "threadId": tid}
    if frame.module:
        found["module"] = _text(frame.module.rpartition("/")[2])
    address = {"offset": _text(frame.offset), "buildId": _text(frame.build_id)}
    if known := {name: value for name, value in address.items() if value}:
        found["properties"] = known
    return found


def _location(frame: Frame) -> dict[str, Any]:
    name = frame.symbol or frame_name(Frame(module=frame.module, offset=frame.offset))
    logical = {"fullyQualifiedName": _text(name)}
    if frame.symbol:
        logical["kind"] = "function"
    found: dict[str, Any] = {"logicalLocations": [logical]}
    # Without debug information, unwinders name the library as the file; "<string>" is none either.
    if frame.line > 0 and not frame.file.startswith("<"):
        place = {"uri": _uri(frame.file)}
        found["physicalLocation"] = {"artifactLocation": place, "region": {"startLine": frame.line}}
    return found


def _uri(path: str) -> str:
    """A path as a URI reference: absolute paths as ``file:``, the others relative."""
    encoded = quote(path[:_MAX_TEXT], errors="replace")
    return f"file://{encoded}" if encoded.startswith("/") else encoded
