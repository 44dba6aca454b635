"""What evidence costs, on real SIGSEGVs of llama_encode: nothing of it may keep the caller waiting."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pairing import figure
from benchmarks.rows import Plan, Row, Yield
from crumplezone import Batch, Decoder, embedded_model
from crumplezone.reports.records.report import Report
from crumplezone.reports.store.store import Store

CRASHES = 8  # the store keeps so many in full
_CAPTURE = {"maps", "system calls", "signal frame", "threads", "memory and limits"}
_NAMES = {
    "capture": "/proc capture (frame, registers, threads, maps, limits)",
    "stacks": "native and Python stacks, in the helper process",
    "report": "crash noticed to report on disk",
}


def costs(report: Report) -> dict[str, float]:
    """Milliseconds of each part."""
    steps = {step.name: step.ms for step in report.evidence.steps}
    written = dt.datetime.fromisoformat(report.written_at) - dt.datetime.fromisoformat(report.crashed_at)
    return {
        "capture": sum(ms for name, ms in steps.items() if name in _CAPTURE),
        "stacks": steps["stacks (pystack)"],
        "report": written.total_seconds() * 1000,
    }


def measure(crashes: int, directory: Path) -> dict[str, list[float]]:
    """Milliseconds of each part, for each crash."""
    with Decoder(embedded_model(), n_ctx=512, n_seq_max=2, preflight=False, reports=directory) as decoder:
        for _ in range(crashes):
            decoder.encode(Batch.of([[1, 2, 3], [4, 5]]))
            decoder.flush_reports()
    figures: dict[str, list[float]] = defaultdict(list)
    store = Store(directory)
    for row in store.rows():
        if not row.same_as:
            for name, ms in costs(store.read(row.id)).items():
                figures[name].append(ms)
    return figures


def rows(plan: Plan) -> Iterator[Yield]:
    """A row for each part; none has an aim of its own."""
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(3 if plan.quick else CRASHES, Path(directory))
    for name, title in _NAMES.items():
        yield Row("evidence", title, figure(figures[name]), "ms", note="beside the caller's job")
