"""What differs between two crashes: how they ended, frames, batch shape, parameters, model, versions."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import msgspec

from crumplezone.reports.analysis.same import is_same
from crumplezone.reports.analysis.signature import frames, signature_of
from crumplezone.reports.records.report import BatchRecord, Generating, Report

Facts = dict[str, str]

_SHOWN = 12  # values of a list that are shown; the others only as a hash


class ReportDifference(msgspec.Struct, frozen=True):
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
    differences: list[ReportDifference]
    frames: list[FrameLine]


def compare(a: Report, b: Report) -> Diff:
    """Compare two reports; the native stacks are those of the crashed threads, normalised."""
    facts_a, facts_b = _facts(a), _facts(b)
    facts_a["machine"] |= _only(a.environment.cpu_flags, b.environment.cpu_flags)
    facts_b["machine"] |= _only(b.environment.cpu_flags, a.environment.cpu_flags)
    differences = [
        ReportDifference(section, name, facts_a[section].get(name, ""), facts_b[section].get(name, ""))
        for section in facts_a
        for name in facts_a[section] | facts_b[section]
        if facts_a[section].get(name, "") != facts_b[section].get(name, "")
    ]
    same = bool(a.signature and b.signature) and is_same(signature_of(a), signature_of(b))
    return Diff(same, differences, list(_align(frames(a), frames(b))))


def _align(a: list[str], b: list[str]) -> Iterator[FrameLine]:
    for tag, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            yield from (FrameLine("both", frame) for frame in a[a1:a2])
        else:
            yield from (FrameLine("a", frame) for frame in a[a1:a2])
            yield from (FrameLine("b", frame) for frame in b[b1:b2])


def _facts(report: Report) -> dict[str, Facts]:
    environment, model = report.environment, report.model
    named = {"file": PurePosixPath(model.path).name, "sha256": model.sha256} if model else {}
    return {
        "ending": _ending(report),
        "batch": _shape(report.batch),
        "parameters": {name: str(value) for name, value in report.context.items()},
        "model": named | ({"description": model.description} if model else {}),
        "versions": dict(environment.versions),
        "machine": {"cpu": environment.cpu, **_settings(environment.system_info)},
        "variables": dict(environment.variables),
    }


def _ending(report: Report) -> Facts:
    evidence, fault, verdict = report.evidence, report.evidence.fault, report.verdict
    return {
        "exit": evidence.exit.value,
        "phase": evidence.phase,
        "signal": fault.name if fault else "",
        "code": fault.code_name if fault else "",
        "address": (fault.address or "") if fault else "",
        "access": fault.access if fault else "",
        "assertion": evidence.assertion.text if evidence.assertion else "",
        "detail": evidence.detail,
        "rung": report.rung,
        "result": report.result,
        "verdict": verdict.kind.value if verdict else "",
        "redacted": "yes" if report.redacted else "",
    }


def _settings(system_info: str) -> Facts:
    """What llama.cpp was built with, from "CPU : SSE3 = 1 | AVX = 1 | REPACK = 1 | "."""
    pairs = (piece.partition("=") for piece in system_info.split("|"))
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}


def _only(flags: Sequence[str], others: Sequence[str]) -> Facts:
    return {"cpu flags of this one only": " ".join(sorted({*flags} - {*others}))}


def _shape(batch: BatchRecord | None) -> Facts:
    if batch is None:
        return {}
    facts = {"operation": batch.operation, "tokens per call": str(batch.chunk or "all")}
    if not batch.generating:
        return facts | _rows(batch) | _columns(batch.tokens, batch.seq_ids)
    # What was in flight; the batch itself is only the last native call of that.
    tokens = [token for each in batch.generating for token in each.tokens]
    owners = [each.seq_id for each in batch.generating for _ in each.tokens]
    return facts | _in_flight(batch.generating) | _columns(tokens, owners)


def _rows(batch: BatchRecord) -> Facts:
    return {
        "positions": _shown(batch.positions),
        "outputs": str(sum(batch.outputs)),
        "outputs at": _shown([row for row, output in enumerate(batch.outputs) if output]),
        "embeddings": "yes" if batch.embeddings else "no",
    }


def _in_flight(sequences: list[Generating]) -> Facts:
    names = {"max_tokens": "tokens to come", "temperature": "temperatures", "seed": "seeds"}
    return {
        names.get(field, field): _shown([getattr(each, field) for each in sequences])
        for field in Generating.__struct_fields__
        if field not in ("seq_id", "tokens")
    }


def _columns(tokens: list[int], seq_ids: list[int]) -> Facts:
    lengths = Counter(seq_ids)  # in the order of their first tokens
    return {
        "tokens": str(len(tokens)),
        "sequences": str(len(lengths)),
        "sequence ids": _shown(seq_ids),
        "tokens per sequence": _shown(list(lengths.values())),
        "token ids": _shown(tokens),
    }


def _shown(values: Sequence[object]) -> str:
    """A list, of any length; two that differ never look the same."""
    text = " ".join(map(str, values[:_SHOWN]))
    if len(values) <= _SHOWN:
        return text
    digest = hashlib.sha256(repr(values).encode()).hexdigest()[:8]
    return f"{text} ... ({len(values)}, hash {digest})"
