"""A report as the body of an issue for llama.cpp, in GitHub's Markdown.

Most strings of a report come from the crashed child. They appear only in code spans and fenced blocks that
they cannot close, so they form no markup, no link, no mention and no reference to another issue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from crumplezone.reports.analysis.frames import interrupted
from crumplezone.reports.analysis.stack import crashed_thread, frame_name, signal_name, top_frame
from crumplezone.reports.formats.text import summary
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import BatchRecord, Frame, Report

MAX_CHARACTERS = 65_536
"""The longest body that GitHub takes for an issue."""

_MAX_LINE = 240
_MAX_FRAMES = 64
_MAX_ROWS = 64
_MAX_TITLE = 120
_MAX_SCRIPT = 24_000
_TICKS = re.compile("`+")


def render(report: Report, script: str | None = None) -> str:
    """Write the issue: a title line, then sections. At most `MAX_CHARACTERS`.

    A section that would make it too long is left out, and named at the end.

    Args:
        report: Redact it first, if the issue is for strangers.
        script: A stand-alone Python file that shows the crash, as `crumplezone triage script` writes it.
    """
    sections: list[tuple[str, Iterable[str]]] = [
        ("What happened", _what_happened(report)),
        ("How to reproduce", _reproduce(report, script)),
        ("Native stack", _native(report)),
        ("Python stack", _python(report)),
        ("Registers and code", _registers(report)),
        ("Batch", _batch(report.batch)),
        ("Context", _pairs(report.context.items())),
        ("Model", _model(report)),
        ("Environment", _environment(report)),
        ("Ladder and verdict", _ladder(report)),
        ("Signature", _signature(report)),
    ]
    text = f"# {_title(report)}\n"
    left_out: list[str] = []
    for title, lines in sections:
        body = "\n".join(lines).strip("\n")
        section = f"\n## {title}\n\n{body}\n" if body else ""
        if len(text) + len(section) > MAX_CHARACTERS - 500:  # room for the line below
            left_out.append(title)
        else:
            text += section
    if left_out:
        text += f"\nLeft out, as too long for an issue: {', '.join(left_out)}. See report.json.\n"
    return text


def _cut(text: str, limit: int = _MAX_LINE) -> str:
    shown = printable(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def _ticks(text: str, least: int) -> str:
    """Backticks that the text cannot close."""
    longest = max(map(len, _TICKS.findall(text)), default=0)
    return "`" * max(least, longest + 1)


def span(text: str, limit: int = _MAX_LINE) -> str:
    """One line as a code span."""
    shown = _cut(text, limit)
    if not shown.strip():
        return "(empty)"
    ticks = _ticks(shown, 1)
    pad = " " if shown[0] in " `" or shown[-1] in " `" else ""  # Markdown takes one space off each end
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _fence(lines: Iterable[str], language: str = "text") -> list[str]:
    """A fenced block; nothing for no lines. The lines must be printable."""
    block = list(lines)
    ticks = _ticks("\n".join(block), 3)
    return [f"{ticks}{language}", *block, ticks] if block else []


def _details(title: str, lines: list[str]) -> list[str]:
    # GitHub parses Markdown in HTML after an empty line.
    return ["", f"<details><summary>{title}</summary>", "", *lines, "", "</details>"] if lines else []


def _pairs(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """A block of "name: value", without those that are not known."""
    known = [(name, value) for name, value in pairs if value not in (None, "")]
    lines = [_cut(f"{name}: {value}") for name, value in known[:_MAX_ROWS]]
    return _fence(lines + _more(_MAX_ROWS, len(known)))


def _more(shown: int, total: int) -> list[str]:
    return [f"... and {total - shown} more"] if total > shown else []


def _title(report: Report) -> str:
    if report.signature and report.signature.title:
        return span(report.signature.title, _MAX_TITLE)
    frame = top_frame(report)
    what = signal_name(report) or report.evidence.exit.value
    return span(f"{what} in {frame_name(frame)}" if frame else what, _MAX_TITLE)


def _what_happened(report: Report) -> Iterator[str]:
    yield from _fence([_cut(summary(report), 4 * _MAX_LINE)])
    evidence, fault, assertion = report.evidence, report.evidence.fault, report.evidence.assertion
    facts: list[tuple[str, object]] = []
    if fault:
        facts += [("signal", f"{fault.name} ({fault.signal})"), ("code", fault.code_name or fault.code)]
        facts += [("address", fault.address), ("access", fault.access), ("trap", fault.trap)]
    if assertion:
        place = f"{assertion.file}:{assertion.line}" if assertion.file else ""
        facts += [("assertion", assertion.text), ("at", place)]
    facts += [("exit", evidence.exit.value), ("return code", evidence.returncode)]
    facts += [("operation", report.batch.operation if report.batch else "")]
    known = [(name, value) for name, value in facts if value not in (None, "")]
    yield from ["", *(f"- {name}: {span(str(value))}" for name, value in known)]
    if report.redacted:
        yield "- redacted: token ids and text are keyed hashes, paths are shortened"


def _reproduce(report: Report, script: str | None) -> list[str]:
    if script is None:
        return [
            "No script yet. This makes one:",
            "",
            *_fence([_cut(f"crumplezone triage script {report.id}")]),
        ]
    if len(script) > _MAX_SCRIPT:
        return ["The script is too long for an issue; `reproduce.py` of the attached zip is it."]
    lines = [printable(line.expandtabs(4)) for line in script.rstrip().split("\n")]
    return ["This file needs llama-cpp-python only:", "", *_fence(lines, "python")]


def _frames(frames: list[Frame]) -> list[str]:
    lines = [_cut(f"#{place:<3} {frame_name(frame)}") for place, frame in enumerate(frames[:_MAX_FRAMES])]
    return lines + _more(_MAX_FRAMES, len(frames))


def _native(report: Report) -> list[str]:
    thread = crashed_thread(report)
    if thread is None:
        return []
    return _fence(_frames(interrupted(thread.native)))


def _python(report: Report) -> list[str]:
    thread = crashed_thread(report)
    caller = _fence(_frames(report.caller))
    return [
        *_fence(_frames(thread.python) if thread else []),
        *_details("The caller, in the supervisor", caller),
    ]


def _registers(report: Report) -> list[str]:
    found = report.evidence
    registers = [_cut(f"{name:<7} {value}") for name, value in list(found.registers.items())[:_MAX_ROWS]]
    code = [_cut(f"code at the program counter: {found.code_bytes}")] if found.code_bytes else []
    return _details("Registers", _fence(registers + code))


def _batch(batch: BatchRecord | None) -> list[str]:
    if batch is None:
        return []
    rows: dict[int, list[tuple[int, bool]]] = {}
    for seq_id, position, output in zip(batch.seq_ids, batch.positions, batch.outputs, strict=False):
        rows.setdefault(seq_id, []).append((position, output))
    lines = ["| sequence | tokens | first position | last position | outputs |", "|--:|--:|--:|--:|--:|"]
    for seq_id, tokens in list(rows.items())[:_MAX_ROWS]:
        positions = [position for position, _ in tokens]
        wanted = sum(output for _, output in tokens)
        lines.append(f"| {seq_id} | {len(tokens)} | {min(positions)} | {max(positions)} | {wanted} |")
    left_out = f", without {batch.cut} that are left out of its middle" if batch.cut else ""
    total = f"{len(batch.tokens)} tokens in {len(rows)} sequences{left_out}."
    return [*lines, "", *_more(_MAX_ROWS, len(rows)), total]


def _model(report: Report) -> list[str]:
    model = report.model
    if model is None:
        return []
    name = model.path.rpartition("/")[2]
    facts: list[tuple[str, object]] = [("file", name), ("size, bytes", model.size), ("sha256", model.sha256)]
    return _pairs([*facts, ("description", model.description)])


def _environment(report: Report) -> list[str]:
    found = report.environment
    pairs: list[tuple[str, object]] = [*found.versions.items(), ("cpu", found.cpu), *found.variables.items()]
    wide = [
        line for text in (" ".join(found.cpu_flags), found.system_info) if text for line in _wrapped(text)
    ]
    return [*_pairs(pairs), *_details("CPU flags and llama.cpp's system info", _fence(wide))]


def _wrapped(text: str) -> list[str]:
    """A long text of words in lines, at most 4,096 characters of it."""
    shown = printable(text[:4096])
    return [shown[place : place + 100] for place in range(0, len(shown), 100)]


def _ladder(report: Report) -> list[str]:
    lines = []
    for step in report.ladder[:_MAX_ROWS]:
        sequences = f" sequences {', '.join(map(str, step.sequences[:16]))}" if step.sequences else ""
        detail = f": {step.detail}" if step.detail else ""
        lines.append(_cut(f"{step.rung:<7} {step.outcome.value:<8} {step.ms:9.1f} ms{sequences}{detail}"))
    lines += _more(_MAX_ROWS, len(report.ladder))
    if report.result:
        lines.append(_cut(f"result: {report.result}"))
    if report.verdict:
        lines.append(_cut(f"verdict: {report.verdict.kind.value}, because {report.verdict.because}"))
    return _fence(lines)


def _signature(report: Report) -> list[str]:
    found = report.signature
    if found is None:
        return []
    pairs: list[tuple[str, object]] = [("id", found.id), ("class", found.fault_class)]
    pairs += [(f"key {place}", part) for place, part in enumerate(found.key)]
    return _pairs([*pairs, ("confidence", found.confidence)])
