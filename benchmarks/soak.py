"""A thousand crashes in a row: does the supervisor keep its size? `make soak`.

Each is a real SIGSEGV of llama_encode on SmolLM2, survived through the safe rung, with a report. Every tenth
of the way, and at the end: descriptors, threads, child processes and resident memory of the supervisor.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from crumplezone import Batch, Decoder, embedded_model
from crumplezone.reports.store.store import Store


def measure(process: psutil.Process) -> tuple[int, int, int, int]:
    return (
        process.num_fds(),
        threading.active_count(),
        len(process.children(recursive=True)),
        process.memory_info().rss >> 20,
    )


def crash(decoder: Decoder, batch: Batch) -> float:
    start = time.perf_counter()
    result = decoder.encode(batch)
    elapsed = time.perf_counter() - start
    assert result.reports
    assert not result.errors
    return elapsed


def soak(crashes: int, directory: Path) -> bool:
    process, took, seen = psutil.Process(), [], []
    print(f"{'crashes':>8} {'fds':>5} {'threads':>8} {'children':>9} {'RSS MB':>7} {'encode ms':>10}")
    with Decoder(embedded_model(), n_ctx=512, n_seq_max=2, preflight=False, reports=directory) as decoder:
        batch = Batch.of([[1, 2, 3], [4, 5]])
        for number in range(1, crashes + 1):
            took.append(crash(decoder, batch) * 1000)
            if number % max(1, crashes // 10) == 0:
                decoder.flush_reports()
                seen.append(measure(process))
                cells = "{:>5} {:>8} {:>9} {:>7}".format(*seen[-1])
                print(f"{number:>8} {cells} {statistics.median(took):>10.1f}", flush=True)
                took.clear()
    reports = Store(directory).rows()
    written, signatures = len(reports), {row.signature for row in reports}
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) >> 20
    print(f"{written} reports, {len(signatures)} signature, {size} MB on disk")
    first, last = seen[len(seen) // 3], seen[-1]
    return (
        last[:3] == first[:3] and last[3] <= first[3] * 1.05 and written == crashes and len(signatures) == 1
    )


def main() -> None:
    """Run the soak and exit 1 if anything grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crashes", type=int, default=1000)
    arguments = parser.parse_args()
    logging.getLogger("crumplezone").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        constant = soak(arguments.crashes, Path(directory))
    print("constant" if constant else "NOT constant")
    sys.exit(not constant)


if __name__ == "__main__":
    main()
