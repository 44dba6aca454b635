"""What evidence costs, on real SIGSEGVs of llama_encode: nothing of it may keep the caller waiting.

Each row is a median over the crashes, with minimum and maximum, in milliseconds.
"""

from __future__ import annotations

import argparse
import datetime as dt
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from crumplezone import Batch, Decoder, embedded_model
from crumplezone.reports.schema import Report
from crumplezone.reports.store import Store

_CAPTURE = {"maps", "system calls", "signal frame", "threads", "memory and limits"}
_ROWS = {
    "capture": "/proc capture (frame, registers, threads, maps, limits)",
    "stacks": "native and Python stacks, in the helper process",
    "report": "crash noticed to report on disk",
    "job": "the caller's whole job: crash, safe cell, result",
}


def costs(report: Report) -> dict[str, float]:
    steps = {step.name: step.ms for step in report.evidence.steps}
    written = dt.datetime.fromisoformat(report.written_at) - dt.datetime.fromisoformat(report.crashed_at)
    return {
        "capture": sum(ms for name, ms in steps.items() if name in _CAPTURE),
        "stacks": steps["stacks (pystack)"],
        "report": written.total_seconds() * 1000,
    }


def measure(crashes: int, directory: Path) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = defaultdict(list)
    with Decoder(embedded_model(), n_ctx=512, n_seq_max=2, preflight=False, reports=directory) as decoder:
        for _ in range(crashes):
            start = time.perf_counter()
            decoder.encode(Batch.of([[1, 2, 3], [4, 5]]))
            figures["job"].append((time.perf_counter() - start) * 1000)
            decoder.flush_reports()
    store = Store(directory)
    for row in store.rows():
        if not row.same_as:
            for name, ms in costs(store.read(row.id)).items():
                figures[name].append(ms)
    return figures


def main() -> None:
    """Crash, and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crashes", type=int, default=8, help="The store keeps eight in full.")
    arguments = parser.parse_args()
    logging.getLogger("crumplezone").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(arguments.crashes, Path(directory))
    for name, title in _ROWS.items():
        values = figures[name]
        print(f"{title:<58} {statistics.median(values):8.1f} ({min(values):.1f}-{max(values):.1f})")


if __name__ == "__main__":
    main()
