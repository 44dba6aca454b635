"""A storm of equal crashes: the first few are kept in full, the others only count."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from crumplezone.reports.analysis.same import is_partial, only_match
from crumplezone.reports.records.report import Environment, Evidence, Report, Signature

FULL_PER_HOUR = 8
"""Reports of one signature that one process keeps in full within any hour."""

_HOUR = 3600.0  # seconds
_MAX_SIGNATURES = 1024


def slim(report: Report, same_as: str) -> Report:
    """Reduce a report to what counts: no stacks, memory, logs or batch.

    Args:
        report: With its signature.
        same_as: The id of a full report of the same signature.
    """
    found = report.evidence
    return Report(
        id=report.id,
        crashed_at=report.crashed_at,
        written_at=report.written_at,
        evidence=Evidence(
            exit=found.exit,
            pid=found.pid,
            phase=found.phase,
            returncode=found.returncode,
            fault=found.fault,
            assertion=found.assertion,
            detail=found.detail,
        ),
        rung=report.rung,
        model=report.model,
        environment=Environment(versions=report.environment.versions),
        ladder=report.ladder,
        result=report.result,
        blamed=report.blamed,
        signature=report.signature,
        verdict=report.verdict,
        redacted=report.redacted,
        same_as=same_as,
    )


class Storm:
    """Keeps a storm of equal crashes from filling the disk.

    Args:
        exists: Whether the store still has a report.
        clock: Seconds that never go back.
    """

    def __init__(self, exists: Callable[[str], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._exists = exists
        self._clock = clock
        # By signature, least recently seen first: its first report, and when the last full ones came.
        self._seen: dict[str, tuple[Signature, str, deque[float]]] = {}

    def admit(self, report: Report) -> Report:
        """Return a report as it is, or slim if its signature has had its share of this hour."""
        known = self._known(report.signature)
        if known is None:
            return report
        _, first, times = self._seen[known]
        is_share = len(times) == FULL_PER_HOUR and self._clock() - times[0] < _HOUR
        return slim(report, first) if is_share and self._exists(first) else report

    def count(self, report: Report) -> None:
        """Count a report that was written: what failed to be leaves nothing to refer to."""
        if report.signature is None:
            return
        signature, first, times = report.signature, "", deque[float]()
        if known := self._known(signature):
            seen, first, times = self._seen.pop(known)
            signature = seen if is_partial(signature) else signature
        if not report.same_as:
            if not times or not self._exists(first):
                first, times = report.id, deque(maxlen=FULL_PER_HOUR)
            times.append(self._clock())  # drops the oldest
        self._seen[signature.id] = signature, first, times
        if len(self._seen) > _MAX_SIGNATURES:
            del self._seen[next(iter(self._seen))]  # seen least recently

    def _known(self, signature: Signature | None) -> str | None:
        """By which id a crash is counted, if it has been seen."""
        if signature is None or signature.id in self._seen:
            return signature.id if signature else None
        found = only_match(signature, (seen for seen, _, _ in self._seen.values()))
        return found.id if found else None
