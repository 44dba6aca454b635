"""Equal crashes from several processes into one store, with helpers killed at random: how many signatures?

    python -m tests.support.processes.one_crash MODEL STORE [PROCESSES [CRASHES]]

Prints what it found as JSON. A crash here is `llama_encode` on a model without an encoder.
"""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from crumplezone import Batch, Decoder
from crumplezone.reports.store.store import Store

_HELPER = "crumplezone.sandbox.autopsy.unwind"
_SPARED = 0.4  # of the helpers
_TIMEOUT = 570.0  # seconds


def crash(model: str, store: str, times: int) -> None:
    """Crash so often, one after the other."""
    logging.getLogger("crumplezone").setLevel(logging.CRITICAL)
    with Decoder(
        model, n_seq_max=2, n_ctx=512, n_threads=1, preflight=False, deadline=60, reports=store
    ) as decoder:
        for _ in range(times):
            decoder.encode(Batch.of([[1, 2]]))


def hunt(over: threading.Event, seed: int = 1) -> int:
    """Kill helpers of our descendants, most of them and at any time, until it is over; returns how many."""
    dice, met, killed = random.Random(seed), set[int](), 0
    while not over.wait(0.01):
        for process in psutil.Process().children(recursive=True):
            try:
                if process.pid not in met and _HELPER in process.cmdline():
                    met.add(process.pid)
                    if dice.random() > _SPARED:
                        process.send_signal(signal.SIGKILL)
                        killed += 1
            except psutil.Error:
                continue
    return killed


def run(model: Path, store: Path, processes: int, crashes: int) -> dict[str, Any]:
    """Crash in several processes at once; returns what is in the store then."""
    shares = [crashes // processes + (each < crashes % processes) for each in range(processes)]
    command = [sys.executable, "-m", "tests.support.processes.one_crash", "crash", str(model), str(store)]
    over, killed = threading.Event(), list[int]()
    hunter = threading.Thread(target=lambda: killed.append(hunt(over)))
    begin = time.monotonic()
    workers = [subprocess.Popen([*command, str(share)]) for share in shares]
    hunter.start()
    try:
        codes = [worker.wait(_TIMEOUT) for worker in workers]
    finally:
        over.set()
        hunter.join()
        for worker in workers:
            worker.kill()
            worker.wait()
    rows = Store(store).rows()
    return {
        "crashes": crashes,
        "reports": len(rows),
        "signatures": dict(Counter(row.signature[:12] for row in rows)),
        "as signed": dict(Counter(row.own[:12] for row in rows)),
        "titles": sorted({row.title for row in rows}),
        "in full": sum(not row.same_as for row in rows),
        "helpers killed": killed[0],
        "codes": codes,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    """As the command line says."""
    if sys.argv[1] == "crash":
        crash(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    model, store, *numbers = sys.argv[1:]
    processes, crashes = (int(each) for each in (*numbers, *("8", "500")[len(numbers) :]))
    print(json.dumps(run(Path(model), Path(store), processes, crashes), indent=1))


if __name__ == "__main__":
    main()
