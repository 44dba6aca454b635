"""Reports as a SARIF 2.1.0 log, for what shows the findings of analysis tools.

The format: https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/sarif-v2.1.0-errata01-os-complete.html.
A rule is a signature, and a result is all that was seen of it: SARIF counts what recurs.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from crumplezone.reports.analysis.stack import crashed_thread, frame_name, top_frame
from crumplezone.reports.formats.text import summary
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Frame, Report, Signature
from crumplezone.reports.records.run import CaseRecord, Ending, Fixed, News, RunRecord, grouped

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_MAX_TEXT = 2048
_MAX_FRAMES = 128
_MAX_IDS = 256
_MAX_VERSIONS = 64

_UNSIGNED = {
    Ending.MISMATCH: "the native text is not that of the safe path",
    Ending.CRASH: "a crash without a signature",
    Ending.HANG: "no reply within the deadline",
    Ending.OOM: "killed for memory",
    Ending.REFUSED: "refused by validation or by llama.cpp's return code",
}


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
    rules = [_rule(_rule_id(first), _signature(first)) for first, *_ in groups.values()]
    return _log(rules, [_result(same) for same in groups.values()])


def render_run(run: RunRecord, reports: Mapping[str, Report]) -> dict[str, Any]:
    """Make the log of a diagnostic run.

    The cases of one signature are one result; one that failed without a signature is a result of its own, and
    one that could not be run is a notification. Against a baseline, results are new or unchanged, and what is
    fixed is absent.

    Args:
        run: The run.
        reports: Its crash reports by id; those that are missing leave their results without stacks.

    Returns:
        What `json.dumps` takes; valid against the published schema.
    """
    failed = [case for case in run.cases if case.ending not in {Ending.PASS, Ending.ERROR}]
    rules, results = [], []
    for same in grouped(failed):
        rule, result = _case_rule(same[0]), _case_result(same, reports)
        if run.baseline:
            is_new = any(case.news is News.NEW for case in same)
            result["baselineState"] = "new" if is_new else "unchanged"
        rules.append(rule)
        results.append({**result, "ruleId": rule["id"], "level": rule["defaultConfiguration"]["level"]})
    for fixed in run.fixed:
        rule = _fixed_rule(fixed)
        rules.append(rule)
        results.append(_absent(fixed, rule["id"]))
    log = _log(rules, results)
    log["runs"][0]["invocations"] = [_invocation(run)]
    return log


def _log(rules: Iterable[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, Any]:
    driver = {
        "name": "crumplezone",
        "version": importlib.metadata.version("crumplezone"),
        "rules": list({rule["id"]: rule for rule in rules}.values()),
    }
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _case_rule(case: CaseRecord) -> dict[str, Any]:
    if case.signature:
        return _rule(_text(case.signature.id), case.signature)
    return _ending_rule(case.ending)


def _fixed_rule(fixed: Fixed) -> dict[str, Any]:
    if fixed.signature:
        return _rule(_text(fixed.signature), Signature("", "fixed", title=fixed.title))
    return _ending_rule(Ending(fixed.title))


def _ending_rule(ending: Ending) -> dict[str, Any]:
    """Of cases that failed without a signature."""
    signature = Signature("", ending.value, title=_UNSIGNED[ending])
    return _rule(ending.value, signature, "warning" if ending is Ending.REFUSED else "error")


def _case_result(same: list[CaseRecord], reports: Mapping[str, Report]) -> dict[str, Any]:
    """All but its rule, its level and its state."""
    first = same[0]
    shown = [reports[case.report] for case in same if case.report in reports]
    result: dict[str, Any] = _result(shown) if shown else {"message": {"text": _text(_message(first))}}
    if not result.get("locations"):
        result["locations"] = [{"logicalLocations": [{"fullyQualifiedName": _text(first.id)}]}]
    texts = {"native": first.text, "safe": first.safe_text} if first.ending is Ending.MISMATCH else {}
    return {
        **result,
        "occurrenceCount": len(same),
        "partialFingerprints": _fingerprint(first.signature)
        if first.signature
        else _case_fingerprint(first.ending.value, first.id),
        "properties": {
            **result.get("properties", {}),
            "ending": first.ending.value,
            "cases": [_text(case.id) for case in same[:_MAX_IDS]],
            **_texts(texts.items()),
        },
    }


def _message(case: CaseRecord) -> str:
    return f"{case.id}: {case.detail or _UNSIGNED[case.ending]}"


def _absent(fixed: Fixed, rule_id: str) -> dict[str, Any]:
    signed = fixed.signature and Signature(fixed.signature, "")
    return {
        "ruleId": rule_id,
        "level": "none",
        "kind": "pass",
        "baselineState": "absent",
        "message": {"text": _text(f"fixed: {fixed.title}")},
        "partialFingerprints": _fingerprint(signed)
        if signed
        else _case_fingerprint(fixed.title, fixed.cases[0]),
        "properties": {"cases": [_text(case) for case in fixed.cases[:_MAX_IDS]]},
    }


def _invocation(run: RunRecord) -> dict[str, Any]:
    """What could not be run; the counterpart of exit code 3."""
    errors = [case for case in run.cases if case.ending is Ending.ERROR]
    texts = [f"{case.id}: {case.detail}" for case in errors[:_MAX_IDS]]
    if not run.complete:
        texts.append(f"interrupted after {len(run.cases)} of {run.planned} cases")
    notifications = [{"level": "error", "message": {"text": _text(text)}} for text in texts]
    return {"executionSuccessful": not texts, "toolExecutionNotifications": notifications}


def _text(text: str) -> str:
    return printable(text[:_MAX_TEXT])[:_MAX_TEXT]


def _rule_id(report: Report) -> str:
    return _text(report.signature.id) if report.signature else f"unsigned-{report.evidence.exit.value}"


def _signature(report: Report) -> Signature:
    return report.signature or Signature("", report.evidence.exit.value, confidence="low")


def _rule(rule_id: str, signature: Signature, level: str = "error") -> dict[str, Any]:
    title = _text(signature.title or signature.fault_class)
    return {
        "id": rule_id,
        "name": title,
        "shortDescription": {"text": title},
        "defaultConfiguration": {"level": level},
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
        result["partialFingerprints"] = _fingerprint(signature)
    return result


def _fingerprint(signature: Signature) -> dict[str, str]:
    # Results of two tool versions are the same if their fingerprints of one name and version are equal.
    return {f"crumplezoneSignature/v{signature.version}": _text(signature.id)}


def _case_fingerprint(ending: str, case: str) -> dict[str, str]:
    return {"crumplezoneCase/v1": _text(f"{ending} {case}")}


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
