"""What differs between two crashes: how they ended, frames, batch shape, parameters, model, versions."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator

import msgspec

from crumplezone.reports.schema import BatchRecord, Report
from crumplezone.reports.signature import frames

Facts = dict[str, str]


class Difference(msgspec.Struct, frozen=True):
    """One fact that is not the same. A fact that one side lacks is empty there."""

    section: str
    name: str
    a: str
    b: str


class FrameLine(msgspec.Struct, frozen=True):
    """One line of two aligned stacks, innermost first."""

    side: str  # "both", "a" or "b"
    frame: str


class Diff(msgspec.Struct, frozen=True):
    """Two crashes side by side."""

    same_signature: bool
    differences: list[Difference]
    frames: list[FrameLine]


def compare(a: Report, b: Report) -> Diff:
    """Compare two reports; the native stacks are those of the crashed threads, normalised."""
    signatures = [report.signature.id if report.signature else "" for report in (a, b)]
    facts_a, facts_b = _facts(a), _facts(b)
    differences = [
        Difference(section, name, facts_a[section].get(name, ""), facts_b[section].get(name, ""))
        for section in facts_a
        for name in facts_a[section] | facts_b[section]
        if facts_a[section].get(name) != facts_b[section].get(name)
    ]
    same = bool(signatures[0]) and signatures[0] == signatures[1]
    return Diff(same, differences, list(_align(frames(a), frames(b))))


def _align(a: list[str], b: list[str]) -> Iterator[FrameLine]:
    for tag, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            yield from (FrameLine("both", frame) for frame in a[a1:a2])
        else:
            yield from (FrameLine("a", frame) for frame in a[a1:a2])
            yield from (FrameLine("b", frame) for frame in b[b1:b2])


def _facts(report: Report) -> dict[str, Facts]:
    evidence, environment = report.evidence, report.environment
    fault, model = evidence.fault, report.model
    ending = {"exit": evidence.exit.value, "phase": evidence.phase, "rung": report.rung}
    if fault:
        ending |= {"signal": fault.name, "code": fault.code_name, "address": fault.address or ""}
        ending |= {"access": fault.access}
    if evidence.assertion:
        ending["assertion"] = evidence.assertion.text
    if report.verdict:
        ending["verdict"] = report.verdict.kind.value
    return {
        "ending": ending,
        "batch": _shape(report.batch),
        "context": {name: str(value) for name, value in report.context.items()},
        "model": {"sha256": model.sha256, "description": model.description} if model else {},
        "versions": dict(environment.versions),
        "machine": {"cpu": environment.cpu, "system_info": environment.system_info},
        "variables": dict(environment.variables),
    }


def _shape(batch: BatchRecord | None) -> Facts:
    if batch is None:
        return {}
    lengths = Counter(batch.seq_ids)
    return {
        "operation": batch.operation,
        "tokens": str(len(batch.tokens)),
        "sequences": str(len(lengths)),
        "tokens per sequence": ", ".join(str(n) for n in sorted(lengths.values(), reverse=True)[:16]),
        "outputs": str(sum(batch.outputs)),
        "first positions": ", ".join(str(p) for p in _first_positions(batch)[:16]),
        "tokens per call": str(batch.chunk or "all"),
        "embeddings": str(batch.embeddings),
    }


def _first_positions(batch: BatchRecord) -> list[int]:
    first: dict[int, int] = {}
    for seq_id, position in zip(batch.seq_ids, batch.positions, strict=False):
        first.setdefault(seq_id, position)
    return list(first.values())
