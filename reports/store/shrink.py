"""A report that fits: what is dispensable goes first, and the report says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from msgspec.structs import replace

from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import BatchRecord, Report, Step

_TEXT_MAX = 4096  # characters at the end of a log
_LINES, _LINE_MAX = 16, 256  # of the log, and characters of each
_EDGE = 4096  # tokens at each end of a batch
_MOST = 256  # of what else may be many

_T = TypeVar("_T")


def fit(report: Report, limit: int) -> tuple[Report, bytes]:
    """Encode a report in at most so many bytes.

    Leaves out, as far as it must and in this order: the logs, the mappings, the middle of the batch, the
    other threads and all but the beginning of the ladder. A step of the evidence names each.

    Raises:
        ValueError: It is too large even so, which no report of ours can be.
        UnicodeEncodeError: See `schema.encode`.
    """
    data = schema.encode(report)
    size = len(data)
    for what, without in _DISPENSABLE:
        if len(data) <= limit:
            return report, data
        smaller = without(report)
        if smaller == report:
            continue
        step = Step("size", ok=False, detail=f"left out {what}: {size} bytes are more than {limit}")
        report = replace(smaller, evidence=replace(smaller.evidence, steps=[*smaller.evidence.steps, step]))
        data = schema.encode(report)
    if len(data) > limit:
        raise ValueError(f"it has {len(data)} bytes, more than {limit}")
    return report, data


def _logs(report: Report) -> Report:
    found = report.evidence
    return replace(
        report,
        evidence=replace(
            found,
            stderr_tail=found.stderr_tail[-_TEXT_MAX:],
            log_tail=[line[-_LINE_MAX:] for line in found.log_tail[-_LINES:]],
            faulthandler=found.faulthandler[:_TEXT_MAX],
        ),
    )


def _maps(report: Report) -> Report:
    return replace(report, evidence=replace(report.evidence, maps=[]))


def _batches(report: Report) -> Report:
    return replace(report, batch=report.batch and cut(report.batch), minimal=None)


def _rest(report: Report) -> Report:
    found = report.evidence
    crashed = [
        replace(each, native=each.native[:_MOST], python=each.python[:_MOST])
        for each in found.threads
        if each.crashed
    ]
    return replace(
        report,
        evidence=replace(found, threads=crashed[:1], steps=found.steps[-_MOST:]),
        ladder=[
            replace(step, sequences=step.sequences[:_MOST], detail=step.detail[:_TEXT_MAX])
            for step in report.ladder[:_MOST]
        ],
        blamed=report.blamed[:_MOST],
    )


def cut(batch: BatchRecord) -> BatchRecord:
    """A batch without its middle, which cannot be sent again."""
    generating = [replace(each, tokens=_edges(each.tokens)) for each in batch.generating[:_MOST]]
    tokens = _edges(batch.tokens)
    left_out = len(batch.tokens) - len(tokens)
    left_out += sum(len(each.tokens) for each in batch.generating) + sum(
        len(each.tokens) for each in batch.held
    )
    left_out -= sum(len(each.tokens) for each in generating)
    return replace(
        batch,
        tokens=tokens,
        positions=_edges(batch.positions),
        seq_ids=_edges(batch.seq_ids),
        outputs=_edges(batch.outputs),
        generating=generating,
        shared={},
        nulls=batch.nulls[:_MOST],
        held=[],
        cut=left_out,
    )


def _edges(values: list[_T]) -> list[_T]:
    return values if len(values) <= 2 * _EDGE else values[:_EDGE] + values[-_EDGE:]


_DISPENSABLE: tuple[tuple[str, Callable[[Report], Report]], ...] = (
    ("all but the end of the logs", _logs),
    ("the mappings", _maps),
    ("the middle of the batch", _batches),
    ("the other threads and most of the ladder", _rest),
)
